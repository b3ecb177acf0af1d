import json
import time

import pytest

from lit_rebasin.cli import main

SMALL = [
    "--data.benchmark=rotated-digits",
    "--data.n_tasks=2",
    "--data.epochs_per_task=1",
    "--data.replay_per_class=2",
    "--model.backbone=avalanche.models.SimpleMLP",
    "--model.backbone.input_size=64",
    "--model.backbone.hidden_size=16",
    "--trainer.accelerator=cpu",
]


def sweep(folder, *words):
    return main(["sweep", *SMALL, "--output_dir", str(folder), *words])


@pytest.mark.slow
def test_trials_are_listed_by_accuracy_and_not_run_again(tmp_path, capsys):
    vary = ["--vary", "merge.alpha=0.1,0.9", "--seeds", "100,101", "--processes", "2"]
    assert sweep(tmp_path, *vary) == 0
    table = capsys.readouterr().out
    kept = json.loads((tmp_path / "sweep.json").read_text())
    means = [sum(trial["accuracy"]) / 2 for trial in kept["trials"]]
    assert means == sorted(means, reverse=True)
    assert {trial["settings"]["merge.alpha"] for trial in kept["trials"]} == {"0.1", "0.9"}
    assert "0.1" in table
    assert f"{100 * means[0]:.1f}" in table
    results = [tmp_path / f"trial_{n:03d}" / "results.json" for n in range(2)]
    protocol = json.loads(results[0].read_text())["protocol"]
    assert protocol["data"]["validation_fraction"] == 0.1
    assert protocol["seeds"] == [100, 101]
    times = [path.stat().st_mtime_ns for path in results]
    assert sweep(tmp_path, *vary, "--vary", "merge.batches=10") == 0  # the same and one key more: other trials
    results[1].unlink()
    assert sweep(tmp_path, *vary) == 0
    assert results[0].stat().st_mtime_ns == times[0]
    assert results[1].stat().st_mtime_ns > times[1]


def test_a_draw_of_the_combinations_is_the_same_each_time(tmp_path, monkeypatch):
    seen = []

    def listed(trial, *_):
        seen.append(trial.name)

    monkeypatch.setattr("lit_rebasin.cli.sweep._run", listed)
    for turn, seed in enumerate(("0", "0", "1")):
        vary = ["--vary", "merge.alpha=0.1,0.2,0.3,0.4,0.5", "--vary", "merge.batches=1,2,3"]
        assert sweep(tmp_path / str(turn), *vary, "--trials", "4", "--draw_seed", seed) == 0
    assert seen[:4] == seen[4:8] != seen[8:]
    assert len(set(seen[:4])) == 4


def test_members_of_a_list_keep_their_kind(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("lit_rebasin.cli.sweep._run", lambda trial, *_: seen.append([*trial.settings.values()]))
    vary = ["--vary", 'merge.options=[null, {"steps": 3, "noise": 0.5}]', "--vary", 'model.mixup=[true, "false"]']
    assert sweep(tmp_path, "--merge.method=sinkhorn", "--model.distillation=1", *vary) == 0
    assert sorted(seen) == sorted(
        [text, flag] for text in ("null", '{"steps": 3, "noise": 0.5}') for flag in ("true", "false")
    )


def test_a_trial_that_fails_is_named_and_the_others_are_kept(tmp_path, capsys):
    assert sweep(tmp_path, "--vary", "model.backbone.input_size=60,64") == 1
    error = capsys.readouterr().err
    assert "1 of 2 trials failed; the first, with model.backbone.input_size=60" in error
    assert "model.backbone does not take images of 1 x 8 x 8, as rotated-digits has" in error
    assert len(json.loads((tmp_path / "sweep.json").read_text())["trials"]) == 1


def test_a_trial_that_leaves_no_results_has_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lit_rebasin.cli.sweep.Commands.run", lambda *_: (0, "a warning\n"))
    assert sweep(tmp_path, "--vary", "merge.alpha=0.1") == 1
    assert "it left no results that are complete, and exit code 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["trials.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "sweep needs what to vary"),
        (["--vary", "merge.alpha"], "--vary takes a key and values"),
        (["--vary", "a=1", "--vary", "a=2"], "--vary names a twice"),
        (["--vary", "a=[0.5,"], "--vary a=[0.5,: the values are no list in JSON"),
        (["--vary", "a=1", "--validation_fraction", "0"], "a sweep never looks at test data"),
        (["--vary", "a=1", "--data.validation_fraction=0"], "use --method and --validation_fraction"),
        (["--vary", "a=1", "--methods", "replay"], "sweep has no option --methods"),
        (["--vary", "a=1", "--processes", "0"], "--processes and --trials must be at least 1"),
        (["--vary", "a=1", "--method", "magic"], "there is no method 'magic'"),
        (["--vary", "a=1", "--data.n_taskz", "3"], "data.n_taskz"),
        (["--vary", "merge.alpha=0.5,,0.7"], "a value is empty, or there twice"),
        (["--vary", "merge.alpha=0.5,0.5"], "a value is empty, or there twice"),
        (["--vary", "merge.alpha=0.5,7"], "with merge.alpha=7: per_method of 'rebasin': alpha is the weight"),
        (["--vary", "merge.alhpa=0.5"], "with merge.alhpa=0.5: per_method of 'rebasin': "),
        (["--vary", "data.n_tasks=2,3"], "with data.n_tasks=2: per_method of 'rebasin': data.n_tasks is the same"),
        (["--vary", "ewc_lambda=1"], "there is no key 'ewc_lambda'"),
        (["--vary", "merge.alpha=0.5", "--seeds", "0,0"], "seeds must be different whole numbers"),
    ],
)
def test_errors(words, message, tmp_path, capsys):
    assert sweep(tmp_path / "new", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_another_sweep_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lit_rebasin.cli.sweep._run", lambda *_: None)
    assert sweep(tmp_path, "--vary", "merge.alpha=0.1") == 0
    assert sweep(tmp_path, "--vary", "merge.alpha=0.1", "--seeds", "7") == 2
    assert "holds trials of a sweep with other seeds" in capsys.readouterr().err
    assert sweep(tmp_path, "--vary", "merge.alpha=0.1", "--merge.batches=3") == 2
    assert "holds trials of a sweep with other words" in capsys.readouterr().err


def test_a_sweep_of_a_file_that_has_changed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lit_rebasin.cli.sweep._run", lambda *_: None)
    file, out = tmp_path / "c.yaml", tmp_path / "out"
    words = [f"--config={file}", "--vary", "merge.alpha=0.1"]
    for batches, code in ((3, 0), (3, 0), (4, 2)):
        file.write_text(f"merge: {{batches: {batches}}}\n")
        assert sweep(out, *words) == code
    assert "holds trials of a sweep with other files" in capsys.readouterr().err


def test_a_trial_that_is_not_finished_is_run_again(tmp_path, monkeypatch):
    run = []

    def noted(trial, *_):
        run.append(trial.name)
        trial.folder.mkdir(parents=True, exist_ok=True)
        missing = ["rebasin seed 101"] if len(run) == 1 else []
        numbers = {"accuracy": [0.5], "forgetting": [0.1]}
        results = {"protocol": {"missing": missing}, "methods": {"rebasin": numbers}}
        (trial.folder / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr("lit_rebasin.cli.sweep._run", noted)
    for _ in range(3):
        assert sweep(tmp_path, "--vary", "merge.alpha=0.1") == 0
    assert run == ["merge.alpha=0.1"] * 2


@pytest.mark.slow
def test_what_is_varied_goes_before_what_makes_a_method_and_what_the_file_says_of_it(tmp_path):
    (tmp_path / "c.yaml").write_text("per_method:\n  clewi: {merge.alpha: 0.5, data.replay_per_class: 3}\n")
    words = [f"--config={tmp_path / 'c.yaml'}", "--method", "clewi", "--vary", "merge.alpha=0.0,1.0"]
    assert sweep(tmp_path / "out", *words) == 0
    configs = [(tmp_path / "out" / f"trial_{n:03d}" / "clewi" / "seed_100" / "config.yaml").read_text() for n in (0, 1)]
    assert ["alpha: 0.0" in text for text in configs] == [True, False]
    assert ["alpha: 1.0" in text for text in configs] == [False, True]
    assert all("replay_per_class: 3" in text and "method: activations" in text for text in configs)


@pytest.mark.slow
def test_an_argument_of_a_strategy_is_varied(tmp_path):
    assert sweep(tmp_path, "--method", "ewc", "--vary", "ewc_lambda=0,1e6") == 0
    kept = json.loads((tmp_path / "sweep.json").read_text())["trials"]
    assert kept[0]["accuracy"] != kept[1]["accuracy"]


def test_test_data_cannot_be_varied_in(tmp_path, capsys):
    assert sweep(tmp_path, "--vary", "data.validation_fraction=0.0") == 2
    assert "data.validation_fraction is the same for all methods" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "out").touch()
    assert sweep(tmp_path / "out", "--vary", "merge.alpha=0.5") == 2
    assert "choose another" in capsys.readouterr().err


def test_an_interruption_begins_no_other_trial_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    run = []

    def finished(trial, *_):
        run.append(trial.name)
        time.sleep(0.5)
        trial.folder.mkdir(parents=True)
        numbers = {"accuracy": [0.5], "forgetting": [0.1]}
        results = {"protocol": {"missing": []}, "methods": {"rebasin": numbers}}
        (trial.folder / "results.json").write_text(json.dumps(results))

    def interrupted(futures, *_, **__):
        yield next(iter(futures))
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_rebasin.cli.sweep._run", finished)
    monkeypatch.setattr("lit_rebasin.cli.sweep.track", interrupted)
    assert sweep(tmp_path, "--vary", "merge.alpha=0.1,0.2,0.3,0.4,0.5") == 130
    said = capsys.readouterr()
    assert len(run) == 2
    assert "interrupted. 2 of 5 trials are finished; the same command goes on with the others" in said.err
    assert "50.0" in said.out
    assert len(json.loads((tmp_path / "sweep.json").read_text())["trials"]) == 2


def test_classes_of_a_method_reach_its_trials(tmp_path, monkeypatch):
    commands = []

    def noted(_, words):
        commands.append(words)
        return 1, "noted"

    monkeypatch.setattr("lit_rebasin.cli.sweep.Commands.run", noted)
    own = '{"average": {"data.replay_transform": {"class_path": "lit_rebasin.RandomShift"}}}'
    assert sweep(tmp_path, "--method", "average", f"--per_method={own}", "--vary", "merge.alpha=0.5") != 0
    given = json.loads(commands[0][-1].removeprefix("--per_method="))
    assert given["average"]["data.replay_transform"]["class_path"] == "lit_rebasin.RandomShift"
    assert given["average"]["merge.alpha"] == 0.5


def test_a_draw_of_endless_combinations_lists_none_of_the_others(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("lit_rebasin.cli.sweep._run", lambda trial, *_: seen.append(dict(trial.settings)))
    keys = [
        "merge.alpha",
        "merge.margin",
        "model.optimizer.lr",
        "model.distillation",
        "model.temperature",
    ]
    vary = [word for key in keys for word in ("--vary", f"{key}={','.join(f'0.{n:03d}' for n in range(1, 200))}")]
    assert sweep(tmp_path, *vary, "--trials=3") == 0
    assert len(seen) == 3
    assert len({tuple(settings.items()) for settings in seen}) == 3
    assert all([*settings] == keys for settings in seen)
    assert sweep(tmp_path, *vary) == 2
    assert f"--vary has {199**5} combinations; draw at most 10000 of them with --trials" in capsys.readouterr().err


def test_a_file_of_any_name_that_has_changed_is_another_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lit_rebasin.cli.sweep._run", lambda *_: None)
    file = tmp_path / "mine.cfg"
    file.write_text("data: {batch_size: 10}\n")
    words = ["--config", str(file), "--vary", "merge.alpha=0.5"]
    assert sweep(tmp_path / "out", *words) == 0
    file.write_text("data: {batch_size: 20}\n")
    assert sweep(tmp_path / "out", *words) == 2
    assert "holds trials of a sweep with other files" in capsys.readouterr().err
