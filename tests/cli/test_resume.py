"""Runs that were killed, against those that were not."""

import gc
import json
import random
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from lit_rebasin.cli import main
from lit_rebasin.cli.build import build_run

from .words import CONFIG, ROOT, SMALL

STREAM = [
    "--config",
    CONFIG,
    *SMALL,
    *("--data.n_tasks", "3", "--data.epochs_per_task", "1", "--threads", "1"),
    # A network that draws in every step.
    "--model.backbone=avalanche.models.SimpleMLP",
    *("--model.backbone.num_classes", "10", "--model.backbone.input_size", "64", "--model.backbone.drop_rate", "0.5"),
]
METHODS = ["--methods", "finetune,average,rebasin", "--seeds", "0"]
KILLED = -signal.SIGKILL


def run_jobs(folder, jobs):
    """Run commands one after another; return their exit codes."""
    folder.mkdir(exist_ok=True)
    for job in jobs:
        job["log"] = str(folder / "log")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.cli.killed", str(folder / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def said(folder):
    return (folder / "log").read_text(errors="replace")


def entries(value, name=""):
    """Yield what a checkpoint holds by name, but for times and the folder it lies in."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from entries(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            yield from entries(item, f"{name}/{key}")
    elif not name.endswith(("seconds", "_path", "dirpath", "output_dir")):
        yield name, value


def checkpoint(folder):
    path = folder / "fit" / "rebasin" / "seed_0" / "checkpoints" / "last.ckpt"
    return dict(entries(torch.load(path, weights_only=True)))


def assert_same_fit(folder, whole):
    found, expected = checkpoint(folder), checkpoint(whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
    assert not list(folder.rglob("*.tmp"))


def rows(folder):
    """The table of a benchmark without the times."""
    lines = (folder / "results.md").read_text().splitlines()
    return [line.split("|")[:-2] for line in lines if line.startswith("|")]


def numbers(folder):
    """What a benchmark came to, but for how long it took."""
    results = json.loads((folder / "results.json").read_text())
    assert not results["protocol"]["missing"]
    kept = ("accuracy", "forgetting", "backward_transfer", "accuracy_matrix", "moved")
    return {name: {key: found.get(key) for key in kept} for name, found in results["methods"].items()}


def fit(folder, goes_on=False, **job):
    again = ["--ckpt_path", "last"] if goes_on else []
    return {"words": ["fit", *STREAM, "--output_dir", str(folder), *again], **job}


def benchmark(folder, goes_on=False, **job):
    again = ["--resume"] if goes_on else []
    return {"words": ["benchmark", *STREAM, *METHODS, "--output_dir", str(folder), *again], **job}


def killed_fits(tmp_path, shares):
    """A whole fit, and one for each list of shares that is killed so often, and then left alone."""
    jobs = [fit(tmp_path / "whole")]
    for number, moments in enumerate(shares):
        folder = tmp_path / f"cut_{number}"
        jobs += [fit(folder, goes_on=k > 0, share=share) for k, share in enumerate(moments)]
        jobs.append(fit(folder, goes_on=True))
    codes = run_jobs(tmp_path, jobs)
    assert codes[0] == 0, said(tmp_path)
    # One that was to be killed late may be done before.
    assert all(code in ((0, KILLED) if "share" in job else (0,)) for job, code in zip(jobs, codes, strict=True)), said(
        tmp_path
    )
    for number in range(len(shares)):
        assert_same_fit(tmp_path / f"cut_{number}", tmp_path / "whole")
    return codes.count(KILLED)


def test_a_fit_that_was_killed_ends_as_if_it_never_was(tmp_path):
    assert killed_fits(tmp_path, [[0.35], [0.6, 0.3]]) >= 2


@pytest.mark.slow
def test_thirty_kills_at_random_moments(tmp_path):
    draw, kills = random.Random(0), 0
    for turn in range(4):  # a fit may be done before its moment, which depends on the machine
        kills += killed_fits(tmp_path / str(turn), [[draw.uniform(0.05, 0.95) for _ in range(4)] for _ in range(8)])
        if kills >= 30:
            return
    pytest.fail(f"only {kills} kills")


def test_a_fit_that_was_killed_as_it_wrote_a_checkpoint(tmp_path):
    jobs = [fit(tmp_path / "whole")]
    cases = [("half", ".ckpt", 1), ("half", "last.ckpt", 2), ("rename", ".ckpt", 3)]
    for number, case in enumerate(cases):
        folder = tmp_path / f"cut_{number}"
        jobs += [fit(folder, sabotage=case), fit(folder, goes_on=True)]
    assert run_jobs(tmp_path, jobs) == [0, *[KILLED, 0] * len(cases)], said(tmp_path)
    for number in range(len(cases)):
        assert_same_fit(tmp_path / f"cut_{number}", tmp_path / "whole")


def test_a_benchmark_that_was_killed_ends_as_if_it_never_was(tmp_path):
    cuts = [tmp_path / f"cut_{number}" for number in range(3)]
    jobs = [
        benchmark(tmp_path / "whole"),
        # Within one run and then within another; as the second finished run was to be noted; and before anything was.
        benchmark(cuts[0], when=(str(cuts[0]), "average/seed_0/**/last.ckpt")),
        benchmark(cuts[0], goes_on=True, when=(str(cuts[0]), "rebasin/seed_0/**/last.ckpt")),
        benchmark(cuts[0], goes_on=True),
        benchmark(cuts[1], sabotage=("rename", "results.json", 2)),
        benchmark(cuts[1], goes_on=True),
        benchmark(cuts[2], sabotage=("half", "last.ckpt", 2)),
        benchmark(cuts[2], goes_on=True),
    ]
    codes = run_jobs(tmp_path, jobs)
    assert [code for code in codes if code != KILLED] == [0] * 4, said(tmp_path)
    assert codes.count(KILLED) == 4
    for folder in cuts:
        assert numbers(folder) == numbers(tmp_path / "whole")
        assert not list(folder.rglob("*.tmp"))
        assert not list(folder.rglob("*.ckpt"))


def test_a_benchmark_in_the_place_of_another_goes_on_after_a_kill_in_its_first_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    other = ["--merge.alpha", "0.25"]
    for_average = ["--methods", "average", "--seeds", "0,1"]
    jobs = [
        {"words": command(whole, *for_average, *other)},
        {"words": command(cut, *for_average), "sabotage": ["rename", "last.ckpt", 6]},  # in the second run
        {"words": command(cut, *for_average, *other, "--overwrite"), "sabotage": ["half", "last.ckpt", 2]},
        {"words": command(cut, *for_average, *other, "--resume")},
    ]
    assert run_jobs(tmp_path, jobs) == [0, KILLED, KILLED, 0], said(tmp_path)
    assert numbers(cut) == numbers(whole)


def test_a_fit_in_the_place_of_another_does_not_go_on_from_it(tmp_path, capsys):
    folder = tmp_path / "out"
    other = ["--merge.alpha", "0.25"]
    again = fit(folder, sabotage=("half", ".ckpt", 1))
    again["words"] += other
    assert run_jobs(tmp_path, [fit(folder), again]) == [0, KILLED], said(tmp_path)
    assert main(["fit", *STREAM, *other, "--output_dir", str(folder), "--ckpt_path", "last"]) == 2
    assert re.search(
        "last.ckpt is of a run with merge.alpha=0.5, not 0.25; .*leave --ckpt_path out", capsys.readouterr().err
    )


def test_the_table_is_of_the_results_after_a_kill_between_them(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    two = ["--methods", "finetune,average", "--seeds", "0"]
    jobs = [
        {"words": command(whole, *two)},
        {"words": command(cut, *two), "sabotage": ["rename", "results.md", 2]},
        {"words": command(cut, *two, "--resume")},
    ]
    assert run_jobs(tmp_path, jobs) == [0, KILLED, 0], said(tmp_path)
    assert rows(cut) == rows(whole)
    assert len(rows(whole)) == 4
    assert "Not finished" not in (cut / "results.md").read_text()
    assert not list(cut.rglob("*.ckpt"))


def test_a_trial_ends_with_a_sweep_that_is_killed(tmp_path):
    long = ["sweep", *STREAM, "--data.epochs_per_task", "9999", "--method", "average", "--vary", "merge.alpha=0.5"]
    job = {"words": [*long, "--output_dir", str(tmp_path / "out")], "when": [str(tmp_path), "out/**/config.yaml"]}
    assert run_jobs(tmp_path, [job]) == [KILLED], said(tmp_path)


@pytest.mark.slow
def test_workers_end_with_a_benchmark_that_is_killed(tmp_path):
    words = ["benchmark", *STREAM, "--methods", "average", "--seeds", "0,1", "--processes", "2", "--output_dir"]
    folder = tmp_path / "cut"
    jobs = [
        {"words": [*words, str(tmp_path / "whole")]},
        {"words": [*words, str(folder)], "when": [str(folder), "average/seed_1/**/last.ckpt"]},
    ]
    jobs.append({"words": [*words, str(folder), "--resume"]})
    assert run_jobs(tmp_path, jobs) == [0, KILLED, 0], said(tmp_path)
    assert numbers(folder) == numbers(tmp_path / "whole")


def command(folder, *words):
    return ["benchmark", *STREAM, "--output_dir", str(folder), *words]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main(command(folder, "--methods", "average", "--seeds", "0")) == 0
    return folder


def test_what_is_finished_is_not_run_again(finished, tmp_path):
    before = json.loads((finished / "results.json").read_text())
    assert main(command(finished, "--methods", "average,rebasin", "--seeds", "0", "--resume")) == 0
    after = json.loads((finished / "results.json").read_text())
    assert after["methods"]["average"] == before["methods"]["average"]
    assert after["methods"]["rebasin"]["accuracy_matrix"][0]


def test_what_is_left_open_goes_on_as_it_was_begun(tmp_path, capsys):
    words = ["benchmark", "--config", CONFIG, *SMALL[2:], "--methods", "average", "--seeds", "0"]
    options = {"normalize": False, "max_steps": 3}
    given = ["--data.n_tasks", "2", "--merge.method=frank-wolfe", "--merge.options", json.dumps(options)]
    words += ["--output_dir", str(tmp_path)]
    assert main([*words, *given]) == 0
    assert main([*words, *given, "--trainer.max_epochs", "2", "--resume"]) == 0  # as it was filled in
    assert main([*words, *given, "--resume", "--threads", "64"]) == 2
    assert "holds a benchmark with threads=" in capsys.readouterr().err
    assert main([*words, *given[2:], "--resume"]) == 2
    assert "holds a benchmark with data.n_tasks=2, not 20" in capsys.readouterr().err
    assert main([*words, *given[:-1], '{"normalize": false}', "--resume"]) == 2
    assert "holds a benchmark with merge.options.max_steps=3, not None" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "average", "--seeds", "0"], "holds results already; .* --resume to go on"),
        (["--methods", "average", "--seeds", "0", "--resume", "--overwrite"], "choose one"),
        (["--methods", "finetune", "--seeds", "0", "--resume"], "holds average with seed 0, which"),
        (["--methods", "average", "--seeds", "1", "--resume"], "holds average with seed 0, which"),
        (
            ["--methods", "average", "--seeds", "0", "--resume", "--merge.alpha", "0.25"],
            "holds a benchmark with merge.alpha=0.5, not 0.25; go on with what it was begun with",
        ),
        (
            ["--methods", "average", "--seeds", "0", "--resume", "--data.n_tasks", "2"],
            "holds a benchmark with data.n_tasks=3, not 2;",
        ),
        (
            ["--methods", "average", "--seeds", "0", "--resume", "--trainer.max_epochs", "2"],
            "holds a benchmark with trainer.max_epochs=3, not 2;",
        ),
        (
            ["--methods", "average", "--seeds", "0", "--resume", "--per_method", "{average: {merge.alpha: 0.5}}"],
            "holds a benchmark with per_method.average.merge.alpha=None, not 0.5;",
        ),
    ],
)
def test_what_does_not_go_on(finished, words, says, capsys):
    before = (finished / "results.json").read_bytes()
    assert main(command(finished, *words)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(says, error), error
    assert (finished / "results.json").read_bytes() == before


def test_results_stay_where_the_benchmark_in_their_place_does_not_begin(finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    words = ["--methods", "average", "--seeds", "0", "--overwrite", "--data.batch_size", "0"]
    assert main(command(finished, *words)) == 2
    assert "batch_size must be" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_run_of_another_configuration_does_not_go_on(tmp_path, capsys):
    folder = tmp_path / "cut"
    words = ["--methods", "average", "--seeds", "0"]
    (job,) = [{"words": command(folder, *words), "sabotage": ("rename", "last.ckpt", 2)}]
    assert run_jobs(tmp_path, [job]) == [KILLED]
    (place,) = folder.rglob("last.ckpt")
    held = place.read_bytes()
    assert main(command(folder, *words, "--resume", "--model.optimizer.lr", "0.5")) == 2
    assert "seed_0 holds a run with model.optimizer.init_args.lr=" in capsys.readouterr().err
    assert place.read_bytes() == held
    place.write_bytes(held[:1000])
    assert main(command(folder, *words, "--resume")) == 2
    assert "last.ckpt is no file of tensors" in capsys.readouterr().err


def test_a_benchmark_that_begins_anew_leaves_no_checkpoint_of_before(tmp_path):
    stale = tmp_path / "average" / "seed_0" / "checkpoints" / "last.ckpt"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    assert main(command(tmp_path, "--methods", "average", "--seeds", "0")) == 0
    assert not stale.exists()
    assert not Path(tmp_path, "average", "seed_0", "checkpoints").exists()


def test_a_run_is_freed_before_the_next_begins(tmp_path, monkeypatch):
    made, alive = [], []

    def build(*args, **kwargs):
        alive.append(sum(reference() is not None for reference in made))
        run = build_run(*args, **kwargs)
        made.append(weakref.ref(run.data))
        return run

    monkeypatch.setattr("lit_rebasin.cli.runs.build_run", build)
    gc.disable()
    try:
        assert main(command(tmp_path, "--methods", "average,rebasin", "--seeds", "0")) == 0
    finally:
        gc.enable()
    assert alive == [0, 0]
