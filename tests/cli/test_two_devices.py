"""Benchmarks of which each run is trained by two processes."""

import json
import signal
import subprocess
import sys
import time

import pytest

from .words import CONFIG, ROOT, SMALL

WORDS = [
    *("benchmark", "--config", CONFIG, *SMALL, "--data.n_tasks", "3", "--methods", "average,rebasin", "--seeds", "0"),
    # A network that draws in every step, and otherwise than that of the other process.
    "--model.backbone=avalanche.models.SimpleMLP",
    *("--model.backbone.num_classes=10", "--model.backbone.input_size=64", "--model.backbone.drop_rate=0.5"),
    *("--trainer.devices=2", "--trainer.strategy=ddp", "--output_dir"),
]


def command(folder, *words):
    return [sys.executable, "-W", "ignore", "-m", "lit_rebasin", *WORDS, str(folder), *words]


def done(folder, *words):
    """Run it to its end, and return what it printed and what it came to."""
    ended = subprocess.run(command(folder, *words), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results["protocol"]["missing"] == []
    return ended.stdout, {name: found["accuracy_matrix"] for name, found in results["methods"].items()}


@pytest.mark.slow
def test_two_processes_write_once_and_go_on_after_a_kill_as_if_there_was_none(tmp_path):
    printed, expected = done(tmp_path / "whole")
    assert printed.count("rotated-digits, 3 tasks, 1 seed") == 1
    cut = tmp_path / "cut"
    with subprocess.Popen(command(cut), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 200
        while not list(cut.glob("rebasin/seed_0/**/last.ckpt")) and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    _, found = done(cut, "--resume")
    assert found == expected
    assert not [path for path in cut.rglob("*") if path.suffix in (".tmp", ".ckpt")]
