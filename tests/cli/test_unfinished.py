import json
import signal
import sys

import pytest
import torch
import yaml

from lit_rebasin.callbacks.refusal import WorseMergeError
from lit_rebasin.cli import main

from .words import CONFIG, SMALL

FAILING = """
from pathlib import Path
from torch import nn

class Net(nn.Sequential):
    "The third network that is made fails when it is called, of a fault when it is trained."

    def __init__(self, note, error):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        note = Path(note)
        note.write_text(note.read_text() + "." if note.exists() else ".")
        self.error = error if len(note.read_text()) == 3 else None

    def forward(self, x):
        if self.error and (self.training or self.error != "fault"):
            raise {"Ctrl-C": KeyboardInterrupt, "error": RuntimeError, "fault": TypeError}[self.error]("bang")
        return super().forward(x)
"""


UNFIT = "model.backbone does not take images of 1 x 8 x 8, as rotated-digits has"


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Words that give `benchmark` a network of the working directory which fails in the third run."""
    (tmp_path / "failing_net.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "failing_net", raising=False)
    on_interrupt = signal.getsignal(signal.SIGINT)

    def words(error):
        backbone = {"class_path": "failing_net.Net", "init_args": {"note": str(tmp_path / "note"), "error": error}}
        config = {
            "data": {"benchmark": "rotated-digits", "replay_per_class": 1},
            "model": {"backbone": backbone},
            "merge": {"method": "identity"},
            "trainer": {"accelerator": "cpu"},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        return ["benchmark", "--config", "c.yaml", *SMALL, "--methods", "finetune,average", "--seeds", "0,1"]

    yield words
    signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves it ignored after an interruption


@pytest.mark.parametrize(("error", "code", "says"), [("Ctrl-C", 130, "interrupted"), ("error", 2, f"{UNFIT}: bang")])
def test_finished_runs_outlive_what_ends_a_later_one(failing, tmp_path, capsys, error, code, says):
    assert main([*failing(error), "--output_dir", "out"]) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"lit-rebasin: error: {says}. The finished runs are in out/results.json; missing: average seed 0, average seed 1; --resume goes on"
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: len(found["accuracy"]) for name, found in results["methods"].items()} == {"finetune": 2}
    assert results["protocol"]["missing"] == ["average seed 0", "average seed 1"]
    assert "Not finished: average seed 0, average seed 1." in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "accuracy_matrix.png").exists()


def test_a_fault_keeps_its_traceback_and_the_finished_runs(failing, tmp_path):
    with pytest.raises(TypeError, match="bang") as caught:
        main([*failing("fault"), "--output_dir", "out"])
    assert "missing: average seed 0, average seed 1" in caught.value.__notes__[0]
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["methods"]) == ["finetune"]


def test_results_are_replaced_only_on_request(failing, tmp_path, capsys):
    words = [*failing("none"), "--methods", "finetune", "--seeds", "0", "--output_dir", "out"]
    assert main(words) == 0
    first = (tmp_path / "out" / "results.json").read_text()
    assert main([*words, "--merge.alpha", "0.25"]) == 2
    assert "out holds results already" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_text() == first
    assert main([*words, "--merge.alpha", "0.25", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]["merge"]["alpha"] == 0.25


def test_a_stream_that_ends_early_is_no_result(tmp_path, capsys):
    stop = {"monitor": "train_loss", "patience": 0, "divergence_threshold": 0.0, "check_on_train_epoch_end": True}
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}
    (tmp_path / "stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    words = [
        "--config",
        str(tmp_path / "stop.yaml"),
        "--methods",
        "average",
        "--seeds",
        "0",
        "--output_dir",
        str(tmp_path),
    ]
    assert main(["benchmark", "--config", CONFIG, *SMALL, "--data.n_tasks", "3", *words]) == 1
    assert "1 of 3 tasks finished" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_the_first_tasks_alone_are_a_stream(tmp_path):
    words = ["--trainer.max_epochs", "2", "--methods", "finetune", "--seeds", "0", "--output_dir", str(tmp_path)]
    assert main(["benchmark", "--config", CONFIG, *SMALL, "--data.n_tasks", "3", *words]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["n_tasks"] == 2
    assert torch.tensor(results["methods"]["finetune"]["accuracy_matrix"]).shape == (1, 2, 2)


def test_merges_that_are_refused_are_told(tmp_path, monkeypatch, capsys):
    def refused(loss, *_):
        asked.append(loss)
        if len(asked) <= 2:  # of the first seed
            raise WorseMergeError("its loss is <far> [worse]")

    asked = []
    monkeypatch.setattr("lit_rebasin.callbacks.task_merger.check_loss", refused)
    words = ["benchmark", "--config", CONFIG, *SMALL, "--methods", "average", "--seeds", "0,1"]
    assert main([*words, "--data.n_tasks=3", "--output_dir", str(tmp_path)]) == 0
    sentence = (
        "average seed 0: the merge after task {} was refused: its loss is <far> [worse]; the trained model was kept."
    )
    said = " ".join(capsys.readouterr().err.split())
    written = (tmp_path / "results.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())["methods"]["average"]
    assert results["refused"] == [
        [{"task": task, "refused": "its loss is <far> [worse]", "kept": "trained"} for task in (1, 2)],
        [],
    ]
    assert results["moved"] == [[None, None], [0, 0]]
    for task in (1, 2):
        assert sentence.format(task) in said
        assert f"\n\n{sentence.format(task)}\n" in written
    assert "seed 1:" not in said
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    for task in (1, 2):
        reason = "its loss is &lt;far&gt; [worse]; the trained model is kept"
        assert f"<p>The merge after task {task} of seed 0 was refused: {reason}.</p>" in page
    assert "may have been refused" not in page
    # They outlive a resumption, which runs nothing here.
    assert main([*words, "--data.n_tasks=3", "--output_dir", str(tmp_path), "--resume"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["methods"]["average"] == results
    assert sentence.format(1) in " ".join(capsys.readouterr().err.split())


def test_a_method_of_which_every_merge_is_refused_is_shown(tmp_path, monkeypatch):
    def refused(*_):
        raise WorseMergeError("far worse")

    monkeypatch.setattr("lit_rebasin.callbacks.task_merger.check_loss", refused)
    words = ["benchmark", "--config", CONFIG, *SMALL, "--methods", "average", "--seeds", "0"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "The merge after task 1 of seed 0 was refused: far worse; the trained model is kept." in page
    assert "without RebasinMerge" not in page
    assert "earlier version" not in page
