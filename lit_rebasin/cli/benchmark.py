"""Several methods over several seeds on one stream."""

import logging
import warnings
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override

from lit_rebasin.cli.app import ContinualCLI, Run, build_run, log_outcome, prepare_folder, set_threads, write_record
from lit_rebasin.cli.completeness import check_trainer, complete
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.methods import METHODS, check_methods
from lit_rebasin.cli.report import results_table, write_pictures, write_results
from lit_rebasin.cli.results import Outcome, make_results
from lit_rebasin.continual.datamodule import LARGEST_SEED

QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


def run_benchmark(arguments: Sequence[str]) -> None:
    """Run several methods over several seeds."""
    _hush()
    benchmark(ContinualCLI("benchmark", arguments))


def benchmark(cli: ContinualCLI) -> dict[str, Any]:
    """Run every method with every seed, and print the table.

    Results are written after each run, so that those of finished runs outlive an interruption or an error in a later one.

    Returns:
        What ``results.json`` holds.
    """
    methods, seeds = _methods(cli.config.methods), _seeds(cli.config.seeds)
    check_methods(methods, cli.config.data.replay_per_class)
    check_trainer(vars(cli.config.trainer), cli.config.data.epochs_per_task)
    set_threads(cli.config.threads)
    folder = prepare_folder(cli.config.output_dir)
    if (folder / "results.json").exists() and not cli.config.overwrite:
        raise UsageError(
            f"{folder} holds results already; choose another --output_dir, or pass --overwrite to replace them"
        )
    planned = [(method, seed) for method in methods for seed in seeds]
    outcomes: dict[str, list[Outcome]] = {}
    results: dict[str, Any] = {}
    try:
        with _progress() as progress:
            bar = progress.add_task("starting", total=len(planned))
            for done, (method, seed) in enumerate(planned, start=1):
                place = folder / method / f"seed_{seed}"
                watch = _Watch(progress, bar, f"{method} · seed {seed}")
                started = perf_counter()
                run = build_run(cli, method, seed, place, [watch], **QUIET)
                write_record(cli, run, place)
                outcomes.setdefault(method, []).append(_fit(run, started))
                missing = [f"{name} seed {number}" for name, number in planned[done:]]
                results = make_results(cli, run, seeds, outcomes, missing)
                write_results(folder, results)
    except BaseException as error:
        if results:
            lacking = ", ".join(results["protocol"]["missing"])
            error.add_note(f"The finished runs are in {folder / 'results.json'}; missing: {lacking}")
        raise
    finally:
        if results:
            write_pictures(folder, results)
    Console().print(results_table(results))
    Console(soft_wrap=True).print(f"Results, pictures and TensorBoard logs: {folder}")
    return results


def _fit(run: Run, started: float) -> Outcome:
    run.trainer.fit(run.model, datamodule=run.data)
    seconds = perf_counter() - started
    matrix = complete(run.monitor.matrix, run.n_tasks)
    log_outcome(run, matrix)
    return Outcome(matrix, seconds)


def _methods(given: list[str] | str | None) -> list[str]:
    names = given.split(",") if isinstance(given, str) else given or []
    names = list(dict.fromkeys(name.strip() for name in names))
    return sorted(names, key=lambda name: list(METHODS).index(name) if name in METHODS else len(METHODS))


def _seeds(given: list[int] | int | str | None) -> list[int]:
    words = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given or []
    try:
        seeds = [int(word) for word in words]
    except ValueError:
        raise UsageError(f"seeds must be whole numbers such as 0,1,2, got {given!r}") from None
    if not seeds or min(seeds) < 0 or max(seeds) > LARGEST_SEED or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must be different whole numbers from 0 to {LARGEST_SEED}, got {given!r}")
    return seeds


def _hush() -> None:
    """Silence what Lightning and its dependencies say about things that a benchmark does on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


class _Watch(pl.Callback):
    """Moves the progress bar on, and says what is running."""

    def __init__(self, progress: Progress, bar: TaskID, title: str) -> None:
        self.progress, self.bar, self.title = progress, bar, title

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.progress.update(self.bar, description=f"{self.title} · task {data.task + 1}/{data.n_tasks}")

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.progress.advance(self.bar, 1 / (trainer.max_epochs or 1))
