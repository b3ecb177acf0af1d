"""Several methods over several seeds on one stream."""

import os
import sys
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from typing_extensions import override

from lit_rebasin.cli.app import (
    ContinualCLI,
    UsageError,
    build_run,
    check_methods,
    log_outcome,
    package_versions,
    prepare_folder,
    set_threads,
)
from lit_rebasin.cli.methods import METHODS
from lit_rebasin.cli.report import results_table, write_report
from lit_rebasin.metrics import average_accuracy, backward_transfer, forgetting


def benchmark(cli: ContinualCLI) -> dict[str, Any]:
    """Run every method with every seed, print the table and write the report.

    Returns:
        What ``results.json`` holds.
    """
    methods, seeds = _methods(cli.config.methods), _seeds(cli.config.seeds)
    set_threads(cli.config.threads)
    folder = prepare_folder(cli.config.output_dir)
    console = Console(stderr=True)
    matrices: dict[str, list[Tensor]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("starting", total=len(methods) * len(seeds))
        for method in methods:
            for seed in seeds:
                place = folder / method / f"seed_{seed}"
                watch = _Watch(progress, bar, f"{method} · seed {seed}")
                quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
                started = perf_counter()
                run = build_run(cli, method, seed, place, [watch], num_sanity_val_steps=0, **quiet)
                watch.n_tasks = run.data.n_tasks
                run.trainer.fit(run.model, datamodule=run.data)
                seconds[method].append(perf_counter() - started)
                matrices[method].append(_complete(run.monitor.matrix, run.data.n_tasks))
                log_outcome(run)
    results = _results(cli, matrices, seconds, run.data.stream.name, len(matrices[methods[0]][0]))
    write_report(folder, results)
    Console().print(results_table(results))
    Console(soft_wrap=True).print(f"Results, pictures and TensorBoard logs: {folder}")
    return results


def _complete(matrix: Tensor, n_tasks: int) -> Tensor:
    """Return the square part of the matrix that a fit of the first tasks alone has filled."""
    trained = int((~matrix.diagonal().isnan()).sum())
    if trained == 0:
        raise UsageError(
            "no task was finished: trainer.max_epochs or trainer.max_steps ends the run before data.epochs_per_task epochs"
        )
    return matrix[:trained, :trained] if trained < n_tasks else matrix


def _results(
    cli: ContinualCLI, matrices: dict[str, list[Tensor]], seconds: dict[str, list[float]], name: str, n_tasks: int
) -> dict[str, Any]:
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_validation=True))
    for key in ("methods", "seeds", "method", "seed_everything", "output_dir", "ckpt_path"):
        config.pop(key, None)
    return {
        "benchmark": name,
        "n_tasks": n_tasks,
        "protocol": {
            **config,
            "seeds": _seeds(cli.config.seeds),
            "versions": package_versions(),
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "command": " ".join(["lit-rebasin", *sys.argv[1:]]),
        },
        "methods": {
            method: {
                "accuracy": [average_accuracy(matrix) for matrix in found],
                "forgetting": [forgetting(matrix) for matrix in found],
                "backward_transfer": [backward_transfer(matrix) for matrix in found],
                "seconds": seconds[method],
                "accuracy_matrix": [matrix.tolist() for matrix in found],
            }
            for method, found in matrices.items()
        },
    }


def _methods(given: list[str] | str) -> list[str]:
    names = given.split(",") if isinstance(given, str) else list(given)
    names = list(dict.fromkeys(name.strip() for name in names))
    check_methods(names)
    return sorted(names, key=list(METHODS).index)


def _seeds(given: list[int] | int | str) -> list[int]:
    words = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        seeds = [int(word) for word in words]
    except ValueError:
        raise UsageError(f"seeds must be whole numbers such as 0,1,2, got {given!r}") from None
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must be different whole numbers from 0, got {given!r}")
    return seeds


class _Watch(pl.Callback):
    """Moves the progress bar on, and says what is running."""

    def __init__(self, progress: Progress, bar: TaskID, title: str) -> None:
        self.progress, self.bar, self.title = progress, bar, title
        self.n_tasks = 0

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        task = int(trainer.datamodule.task)  # type: ignore[attr-defined]
        self.progress.update(self.bar, description=f"{self.title} · task {task + 1}/{self.n_tasks}")

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.progress.advance(self.bar, 1 / (trainer.max_epochs or 1))
