"""One method with one seed, from the configuration to its accuracy matrix, here or in a process of its own."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from lit_rebasin.callbacks import RebasinMerge
from lit_rebasin.callbacks.report import log_accuracies
from lit_rebasin.cli.app import ContinualCLI, hush, set_threads
from lit_rebasin.cli.build import QUIET, Run, build_run, log_outcome
from lit_rebasin.cli.completeness import complete
from lit_rebasin.cli.endings import sigterm_left_to_lightning
from lit_rebasin.cli.former import Former
from lit_rebasin.cli.methods import METHODS
from lit_rebasin.cli.parallel_tasks import run_in_parallel
from lit_rebasin.cli.results import Outcome, Setting
from lit_rebasin.cli.resume import checkpoint_to_resume
from lit_rebasin.cli.resumed_checkpoint import restoring
from lit_rebasin.cli.run_record import RunRecord, recorded
from lit_rebasin.cli.workers import workers
from lit_rebasin.continual import ContinualClassifier

# Called with the share of a run that is done since the last call, and where it is.
Report = Callable[[float, str], None]


def run_here(
    cli: ContinualCLI, method: str, seed: int, folder: Path, report: Report, former: Former | None
) -> tuple[Outcome, Setting]:
    """Train a method with a seed; its logs and configuration go to ``folder``, where what a ``former`` benchmark left makes way."""
    if METHODS[method].baseline:
        import lit_rebasin.continual.baselines  # noqa: F401 - slow, and no part of a run's seconds
    gc.collect()  # network and data of the run before hang in cycles, which Python is in no hurry to free
    watch = _Watch(report, f"{method} · seed {seed}")
    savers = _savers(cli, method, folder)
    run = build_run(cli, method, seed, folder, [watch, *savers], **{**QUIET, "enable_checkpointing": bool(savers)})
    checkpoint = checkpoint_to_resume(cli, run, folder)
    with recorded(cli, run, folder, former) as record:
        matrix = _matrix(cli, run, watch, checkpoint, record)
    log_outcome(run, matrix)
    return Outcome(matrix, watch.seconds, watch.cpu_seconds, *_merges(run)), Setting.of(run)


def _savers(cli: ContinualCLI, method: str, folder: Path) -> list[ModelCheckpoint]:
    """Return what writes a checkpoint at the end of every task, where a run can go on from one."""
    if not METHODS[method].resumes or cli.config.parallel_tasks > 1:
        return []
    return [
        ModelCheckpoint(
            folder / "checkpoints",
            filename="last",
            every_n_epochs=cli.config.data.epochs_per_task,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
    ]


def run_side_by_side(
    cli: ContinualCLI,
    planned: Sequence[tuple[str, int]],
    places: Sequence[Path],
    processes: int,
    former: Former | None,
) -> Iterator[tuple[int, tuple[Outcome, Setting]]]:
    """Yield the places of methods with their seeds among those planned, and what they come to, run in several processes at a time."""
    jobs = [
        (cli.arguments, method, seed, place, cli.config.threads, former)
        for (method, seed), place in zip(planned, places, strict=True)
    ]
    with workers(processes) as pool:
        futures = {pool.submit(_in_process, job): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _in_process(
    job: tuple[list[str], str, int, Path, int | None, Former | None],
) -> tuple[Outcome, Setting]:
    words, method, seed, place, threads, former = job
    set_threads(threads)
    hush()
    cli = ContinualCLI("benchmark", words).for_method(method)
    return run_here(cli, method, seed, place, lambda share, text: None, former)


def _cpu_seconds() -> float:
    """Return what this process, and those it has waited for, have used."""
    return sum(os.times()[:4])


def _merges(run: Run) -> tuple[list[int | None] | None, list[dict[str, Any]]]:
    """Return how many neurons each merge has moved, if there are merges, and those that were refused."""
    for callback in run.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RebasinMerge):
            moved = [entry.get("moved") for entry in callback.history]
            return moved, [entry for entry in callback.history if "refused" in entry]
    return None, []


def _matrix(cli: ContinualCLI, run: Run, watch: "_Watch", checkpoint: Path | None, record: RunRecord) -> Tensor:
    """Train a method with a seed, and return its accuracy matrix."""
    if METHODS[run.record.method].baseline:
        record.of_other_loops()
        return _baseline(run, cli.strategy_options(run.record.method), watch)
    if cli.config.parallel_tasks > 1 and METHODS[run.record.method].merge is not None:
        record.of_other_loops()
        return run_in_parallel(
            cli,
            run,
            cli.config.parallel_tasks,
            cli.config.threads,
            lambda task, epochs: watch.advance(task, run.n_tasks, epochs, epochs),
        )
    with restoring(run, checkpoint), sigterm_left_to_lightning():
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=checkpoint)
    return complete(run.monitor.matrix, run.n_tasks)


def _baseline(run: Run, options: dict[str, Any], watch: "_Watch") -> Tensor:
    from lit_rebasin.continual.baselines import run_baseline  # Avalanche is slow to import

    def report(matrix: Tensor, task: int) -> None:
        log_accuracies(run.trainer.loggers, matrix, task)

    assert isinstance(run.model, ContinualClassifier)  # as all baselines train
    return run_baseline(
        run.record.method,
        run.model,
        run.data,
        options=options,
        n_tasks=run.n_tasks,
        device=run.trainer.strategy.root_device,
        on_epoch=lambda task: watch.advance(task, run.n_tasks, run.data.epochs_per_task),
        on_task=report,
    )


class _Watch(pl.Callback):
    """Reports how far a run is, and how long it has taken, before it was stopped and since."""

    def __init__(self, report: Report, title: str) -> None:
        self.report, self.title = report, title
        self._started, self._worked = perf_counter(), _cpu_seconds()

    @property
    def seconds(self) -> float:
        """By the clock."""
        return perf_counter() - self._started

    @property
    def cpu_seconds(self) -> float:
        """Of the processors."""
        return _cpu_seconds() - self._worked

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._started -= state_dict["seconds"]
        self._worked -= state_dict["cpu_seconds"]

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.report(trainer.current_epoch / (trainer.max_epochs or 1), self.title)

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.report(0, self._place(data.task, data.n_tasks))

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.report(1 / (trainer.max_epochs or 1), self._place(data.task, data.n_tasks))

    def advance(self, task: int, n_tasks: int, epochs_per_task: int, epochs: int = 1) -> None:
        """Note epochs that Lightning knows nothing of."""
        self.report(epochs / (n_tasks * epochs_per_task), self._place(task, n_tasks))

    def _place(self, task: int, n_tasks: int) -> str:
        return f"{self.title} · task {task + 1}/{n_tasks}"
