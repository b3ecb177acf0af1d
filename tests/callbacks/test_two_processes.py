"""What callbacks do where a Trainer has two processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .monitored import MONITORS

ROOT = Path(__file__).parents[2]


def begin(folder, case, devices=2):
    """Run the script to its end, and return how it ended."""
    folder.mkdir()
    names = {"PATH", "HOME", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR"}
    environment = {name: value for name, value in os.environ.items() if name in names} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.two_processes", str(folder), case, str(devices)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def run(folder, case, devices=2):
    """Run the script; return the weights and what was found, of each process."""
    done = begin(folder, case, devices)
    assert done.returncode == 0, done.stderr
    weights = [torch.load(folder / f"weights_{rank}.pt") for rank in range(devices)]
    return weights, [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(devices)]


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_ranks_end_with_the_merge_of_the_first_and_monitors_change_nothing(tmp_path):
    alone, plain = run(tmp_path / "plain", "tasks")
    watched, found = run(tmp_path / "monitored", "monitored")
    for weights in (alone[1], *watched):
        assert same(alone[0], weights)
    assert [histories["alignments"] for histories in (*plain, *found)] == [1, 0, 1, 0]
    merges = [histories["RebasinMerge"] for histories in (*plain, *found)]
    for history in merges:
        assert [entry["task"] for entry in history] == [1]
        assert {**history[0], "seconds": 0} == {**merges[0][0], "seconds": 0}
    for histories in found:
        for kind in MONITORS:
            entries = histories[kind.__name__]
            assert entries[-1]["task"] == 1
            assert all(math.isfinite(value) for entry in entries for value in entry.values())


@pytest.mark.slow
def test_ranks_agree_on_a_merge_that_is_refused(tmp_path):
    weights, (first, second) = run(tmp_path / "refused", "refused")
    assert same(*weights)
    assert first["RebasinMerge"] == second["RebasinMerge"]
    assert [entry["kept"] for entry in first["RebasinMerge"]] == ["trained"]


@pytest.mark.slow
def test_the_information_that_the_first_process_has_is_enough_for_both(tmp_path):
    weights, (first, second) = run(tmp_path / "fisher", "fisher")
    assert same(*weights)
    (entry,) = first["RebasinMerge"]
    assert entry == second["RebasinMerge"][0]
    assert 0 < entry["alpha"] < 1


@pytest.mark.slow
def test_a_fault_in_the_process_that_merges_ends_both(tmp_path):
    done = begin(tmp_path / "faulty", "faulty")
    assert done.returncode == 1
    assert "TypeError: a fault of the method" in done.stderr
    assert not list((tmp_path / "faulty").glob("weights_*"))


@pytest.mark.slow
def test_one_process_and_two_agree(tmp_path):
    _, (single,) = run(tmp_path / "one", "stream", 1)
    two, both = run(tmp_path / "two", "stream", 2)
    assert same(*two)
    assert both[0]["ContinualMonitor"] == both[1]["ContinualMonitor"]
    for rows, expected in zip(both[0]["ContinualMonitor"], single["ContinualMonitor"], strict=True):
        assert rows == pytest.approx(expected, abs=0.01)
    assert len(single["ContinualMonitor"]) == 3


@pytest.mark.slow
def test_the_same_networks_are_merged_into_the_same(tmp_path):
    one, (single,) = run(tmp_path / "one", "given", 1)
    two, _ = run(tmp_path / "two", "given", 2)
    assert same(one[0], two[0])
    assert same(one[0], two[1])
    assert [entry["moved"] for entry in single["RebasinMerge"]][-1] > 10
