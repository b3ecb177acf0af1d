"""Bad inputs of every kind, each tried in a folder of its own."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
import yaml

from lit_rebasin.cli import main

from . import bad_checkpoints, bad_configurations, bad_data_sets, bad_places, bad_resumed, bad_runs
from .bad_inputs import BENCHMARK, FIT, Place

TABLES = [bad_configurations, bad_checkpoints, bad_resumed, bad_data_sets, bad_runs, bad_places]
ROWS = [row for table in TABLES for row in table.ROWS]
LONGEST = 400  # characters of a sentence


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished fit, a finished benchmark, and one that was stopped in its second task."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, words in {"fit": FIT, "done": BENCHMARK, "cut": BENCHMARK}.items():
        with pytest.MonkeyPatch.context() as patch:
            if kind == "cut":
                patch.setattr("lit_rebasin.cli.benchmark.write_results", _stopped)
            patch.chdir(folder)
            assert main([*words, f"--output_dir={folder / kind}"]) == (1 if kind == "cut" else 0)
    return folder


def _stopped(*_):
    raise RuntimeError("stopped")


@pytest.fixture
def place(folder, runs, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # as outside of pytest
    return Place(folder, runs, monkeypatch)


@contextmanager
def limit_lifted_after():
    """Lift a limit on files before pytest itself writes on, which may be to one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(folder):
    """Return what lies in a folder: the bytes of files, None for folders."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_bad_input_is_one_sentence_and_changes_nothing(place, row, capsys):
    with limit_lifted_after():
        row.prepare(place)
        before = contents(place.folder)
        code = main([*row.words])
    *_, last = lines = capsys.readouterr().err.splitlines()
    assert code == row.code
    assert "Traceback" not in "".join(lines)
    assert len([line for line in lines if line.startswith("lit-rebasin: error: ")]) == 1
    assert last.startswith("lit-rebasin: error: ")
    assert re.search(row.says, last.removeprefix("lit-rebasin: error: ")), last
    assert len(last) <= LONGEST, last
    after = contents(place.folder)
    assert after.keys() == before.keys()
    assert after == before


def test_every_row_has_a_name_of_its_own():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60


def whole_files(folder):
    """Return the names of what lies in a folder, once each is seen to be whole."""
    for path in folder.rglob("*.ckpt"):
        assert torch.load(path, weights_only=True)["state_dict"]
    for path in folder.rglob("*.yaml"):
        assert yaml.safe_load(path.read_text())
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_is_full_at_a_checkpoint_leaves_no_half_of_it(place, capsys):
    with limit_lifted_after():
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, most))  # enough for logs and pictures
        code = main([*FIT, "--model.backbone.hidden_size=512"])
    assert code == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert re.search(r"^lit-rebasin: error: .*seed_0/checkpoints/.*.ckpt cannot be written \(", last), last
    names = whole_files(place.folder / "out")
    assert {"config.yaml", "command.txt"} <= names
    assert not [name for name in names if name.endswith((".tmp", ".ckpt"))]


def take_interrupts():
    """Undo what a shell does to the work that it puts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM.*--ckpt_path last")],
)
def test_an_interrupted_fit_leaves_whole_checkpoints(tmp_path, number, code, says):
    words = [*FIT, "--data.epochs_per_task=20000", "--threads=1"]
    saver = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    words += [saver, "--trainer.callbacks.dirpath=out/often", "--trainer.callbacks.every_n_train_steps=1"]
    command = [sys.executable, "-W", "ignore", "-m", "lit_rebasin", *words]
    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, preexec_fn=take_interrupts, **options) as process:
        until = time.monotonic() + 120
        while not list(tmp_path.rglob("*.ckpt")) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        *lines, last = process.stderr.read().decode().splitlines()
        assert process.wait(60) == code
    assert re.match(f"lit-rebasin: error: {says}", last)
    assert "Traceback" not in "".join(lines)
    names = whole_files(tmp_path / "out")
    assert [name for name in names if name.endswith(".ckpt")]
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fit", "--help"]])
def test_a_reader_that_closes_the_pipe_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "lit_rebasin", *words], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1
