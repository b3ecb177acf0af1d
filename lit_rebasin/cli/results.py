"""What ``results.json`` holds."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_rebasin.cli.app import ContinualCLI, command_line, package_versions
from lit_rebasin.cli.build import FILLED, Run, left_open
from lit_rebasin.metrics import average_accuracy, backward_transfer, forgetting


@dataclass(frozen=True)
class Outcome:
    """What one method with one seed came to.

    Attributes:
        matrix: The accuracies.
        seconds: Of the run, by the clock.
        cpu_seconds: Of its processors, all threads and processes of its own together.
        moved: How many neurons each merge has moved; ``None`` where the method does not merge so, or for a merge that was refused.
        refused: The merges that were refused: the task, why, and which network was kept.
    """

    matrix: Tensor
    seconds: float
    cpu_seconds: float
    moved: list[int | None] | None
    refused: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What all runs of a benchmark have in common, as it was filled in."""

    benchmark: str
    scenario: str
    n_tasks: int
    trainer: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> "Setting":
        """Return that of a run."""
        trainer = {name: run.config.trainer[name] for name in FILLED}
        return cls(run.data.stream.name, run.data.stream.scenario, run.data.n_tasks, trainer)


def make_results(
    cli: ContinualCLI,
    setting: Setting,
    seeds: Sequence[int],
    planned: Sequence[tuple[str, int]],
    found: Mapping[tuple[str, int], Outcome],
) -> dict[str, Any]:
    """Return the content of ``results.json``.

    Args:
        cli: The parsed configuration.
        setting: Of any of the runs.
        seeds: Those asked for.
        planned: All runs, by method and seed.
        found: What those come to that are finished.
    """
    missing = [f"{method} seed {seed}" for method, seed in planned if (method, seed) not in found]
    outcomes: dict[str, list[Outcome]] = {}
    for run in planned:
        if run in found:
            outcomes.setdefault(run[0], []).append(found[run])
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_validation=True))
    for key in ("methods", "seeds", "method", "seed_everything", "output_dir", "overwrite", "resume", "ckpt_path"):
        config.pop(key, None)
    config["trainer"] |= setting.trainer
    config["data"] |= {"n_tasks": setting.n_tasks, "scenario": setting.scenario}
    return {
        "benchmark": setting.benchmark,
        "n_tasks": len(next(iter(outcomes.values()))[0].matrix),
        "protocol": {
            **config,
            "seeds": list(seeds),
            "missing": missing,
            "left_open": left_open(cli),
            "versions": package_versions(),
            "commit": _commit(),
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "command": command_line(),
        },
        "methods": {method: _numbers(found) for method, found in outcomes.items()},
    }


def _commit() -> str | None:
    """Return the commit of the source that runs, if it lies in a git checkout."""
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():
        return None
    words = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _numbers(found: Sequence[Outcome]) -> dict[str, Any]:
    matrices = [outcome.matrix.double() for outcome in found]
    numbers = {
        "accuracy": [average_accuracy(matrix) for matrix in matrices],
        "forgetting": [forgetting(matrix) for matrix in matrices],
        "backward_transfer": [backward_transfer(matrix) for matrix in matrices],
        "seconds": [outcome.seconds for outcome in found],
        "cpu_seconds": [outcome.cpu_seconds for outcome in found],
        "accuracy_matrix": [matrix.tolist() for matrix in matrices],
    }
    if found[0].moved is not None:
        numbers["moved"] = [outcome.moved for outcome in found]
        numbers["refused"] = [outcome.refused for outcome in found]
    plain: dict[str, Any] = _without_nan(numbers)
    return plain


def _without_nan(value: Any) -> Any:
    """Return nested lists and dicts with null for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and isnan(value) else value
