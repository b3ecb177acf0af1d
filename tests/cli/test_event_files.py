import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rebasin import ContinualMonitor, RebasinMerge
from lit_rebasin.cli.event_files import RunLog, event_folders, read_log
from lit_rebasin.cli.merge_sections import mean_shares, merge_section, paths_of

from ..callbacks.user_code import UserModule, loader, make_trainer


def test_what_the_callbacks_have_logged_is_read_again(tmp_path):
    module, merge, monitor = UserModule(), RebasinMerge(alpha=0.3, start="fresh"), ContinualMonitor()
    for task in range(3):
        logger = TensorBoardLogger(tmp_path, name="mine", version=0)
        trainer = make_trainer(tmp_path, merge, monitor, logger=logger)
        trainer.fit(module, loader(shift=task), [loader(shift=seen, shuffle=False) for seen in range(3)])
    log = read_log(event_folders(tmp_path))
    lower = torch.ones(3, 3).tril().bool()
    torch.testing.assert_close(log.matrix[lower], monitor.matrix[lower], rtol=1e-6, atol=1e-6)
    assert log.matrix[~lower].isnan().all()
    assert list(log.alphas) == [entry["task"] for entry in merge.history] == [1, 2]
    for entry in merge.history:
        task = entry["task"]
        assert entry["moved"] > 0
        assert log.alphas[task] == pytest.approx(0.3)
        assert log.displacement[task] == pytest.approx(entry["displacement"])
        for paths, kind in ((log.before, "before"), (log.after, "after")):
            losses = torch.tensor(list(paths[task].values()), dtype=torch.float64)
            chord = losses[0] + (losses[-1] - losses[0]) * torch.linspace(0, 1, 21, dtype=torch.float64)
            assert list(paths[task]) == list(range(0, 101, 5))
            assert float((losses - chord)[1:-1].max()) == pytest.approx(entry[f"barrier_{kind}"], abs=1e-4)


def test_versions_come_in_their_order(tmp_path):
    for name in ("b/version_10", "b/version_9", "a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "events.out.tfevents.1").touch()
    assert event_folders(tmp_path) == [tmp_path / name for name in ("a", "b/version_9", "b/version_10")]
    assert read_log(event_folders(tmp_path)).is_empty


FIRST = RunLog(
    alphas={1: 0.5, 3: 0.5},
    before={1: {0: 1.0, 50: 3.0}},
    after={1: {0: 1.0, 50: 2.0}},
    displacement={1: {"a": 0.5, "b": 1.0}},
)
SECOND = RunLog(alphas={1: 0.25}, before={1: {0: 4.0, 100: 6.0}}, after={1: {0: 5.0}}, displacement={1: {"a": 0.0}})


def test_runs_are_put_together_by_task_and_point():
    (paths,) = paths_of([FIRST, SECOND]).values()
    nan = float("nan")
    assert paths.alphas.tolist() == [0, 0.5, 1]
    assert paths.merged_at.tolist() == [0.5, 0.25]
    for losses, expected in ((paths.before, [[1, 3, nan], [4, nan, 6]]), (paths.after, [[1, 2, nan], [5, nan, nan]])):
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert mean_shares([FIRST, SECOND]) == {1: {"a": 0.25, "b": 1.0}}


def test_tasks_that_some_run_has_not_merged_in_are_named():
    section = merge_section("mine", "mine", [FIRST, SECOND])
    assert "Not every run has merged these tasks in: 2, 3. A merge may have been refused." in section
    assert "Alpha of every merge of mine: task 1 0.38; task 3 0.50." in section


def test_logs_of_an_earlier_version_lack_the_paths():
    section = merge_section("mine", "mine", [RunLog(alphas={1: 0.5})])
    assert "The loss along the path is not in these logs, which an earlier version has written." in section
    assert "figure-alpha-mine" in section
    assert "figure-paths-mine" not in section


@pytest.mark.parametrize(("share", "said"), [(0.0, True), (0.5, False)])
def test_an_alignment_that_moves_nothing_is_said(share, said):
    log = RunLog({}, {1: 0.5}, {1: {0: 1.0, 50: 2.0}}, {1: {0: 1.0, 50: 2.0}}, {1: {"a": share}})
    assert ("The alignment leaves every neuron where it is." in merge_section("mine", "mine", [log])) is said
