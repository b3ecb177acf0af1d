"""What callbacks do where a Trainer has two processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from .monitored import MONITORS

ROOT = Path(__file__).parents[2]


def trained(folder, watched):
    """Run the script; return the weights and the histories of both processes."""
    folder.mkdir()
    names = {"PATH", "HOME", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR"}
    environment = {name: value for name, value in os.environ.items() if name in names} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.two_processes", str(folder), watched]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weights = [torch.load(folder / f"weights_{rank}.pt") for rank in range(2)]
    return weights, [json.loads((folder / f"histories_{rank}.json").read_text()) for rank in range(2)]


def test_monitors_measure_on_every_rank_and_change_nothing(tmp_path):
    alone, _ = trained(tmp_path / "alone", "none")
    watched, histories = trained(tmp_path / "watched", "monitors")
    for weights in (alone[1], *watched):
        assert all(torch.equal(alone[0][name], tensor) for name, tensor in weights.items())
    for history in histories:
        for kind in MONITORS:
            entries = history[kind.__name__]
            assert entries[-1]["task"] == 1
            assert all(math.isfinite(value) for entry in entries for value in entry.values())
