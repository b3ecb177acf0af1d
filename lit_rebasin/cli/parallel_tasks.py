"""The tasks of a stream trained side by side, each from fresh weights in a process of its own, and merged in order."""

import tempfile
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rebasin.callbacks import RebasinMerge
from lit_rebasin.callbacks.report import log_accuracies, log_task_end
from lit_rebasin.callbacks.start import begin
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.cli.app import ContinualCLI, hush
from lit_rebasin.cli.build import QUIET, Run, build_run, merge_settings
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.workers import workers
from lit_rebasin.continual.evaluate import evaluate
from lit_rebasin.metrics import ContinualAccuracy


def check_parallel(cli: ContinualCLI, method: str) -> None:
    """Raise a `UsageError` where the tasks of a method depend on each other."""
    merge = merge_settings(cli, method)
    if merge["start"] != "fresh" or merge["examples"] != "training":
        raise UsageError(
            f"--parallel_tasks trains the tasks of {method!r} apart from each other, which needs --merge.start fresh and "
            "merge.examples training"
        )
    if cli.config.model.distillation:
        raise UsageError(
            f"--parallel_tasks trains the tasks of {method!r} apart from each other, so there is no network after the last task: set "
            "model.distillation to 0"
        )


def run_in_parallel(
    cli: ContinualCLI, run: Run, processes: int, threads: int | None, on_epochs: Callable[[int, int], None]
) -> Tensor:
    """Train all tasks in processes of their own, and merge them in order meanwhile, as a fit of the stream would.

    Args:
        cli: The configuration.
        run: Its method and seed; the network is trained in place.
        processes: How many at a time.
        threads: Of each process.
        on_epochs: Called with the index of a task and its epochs when it is trained.

    Returns:
        The accuracy matrix.
    """
    with tempfile.TemporaryDirectory() as folder, workers(processes) as pool:
        tasks = [(cli.arguments, run.record.method, run.record.seed, t, folder, threads) for t in range(run.n_tasks)]
        trained = pool.map(_train, tasks)

        def arrivals() -> Iterator[int]:
            for task, _ in enumerate(trained):
                on_epochs(task, run.data.epochs_per_task)
                yield task

        return _merged(run, Path(folder), arrivals())


def _train(arguments: tuple[list[str], str, int, int, str, int | None]) -> None:
    """Train one task, and keep its weights."""
    words, method, seed, task, folder, threads = arguments
    if threads is not None:
        torch.set_num_threads(threads)
    hush()
    cli = ContinualCLI("benchmark", words)
    epochs = cli.config.data.epochs_per_task
    run = build_run(cli, method, seed, Path(folder) / "logs", [], **QUIET, limit_val_batches=0, max_epochs=epochs)
    trainer = run.trainer
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, RebasinMerge | type(run.monitor))]  # type: ignore[attr-defined]
    trainer.loggers = []
    run.data.first_task = task
    if task:
        begin(run.model, "fresh", seed + task)
    trainer.fit(run.model, datamodule=run.data)
    torch.save(run.model.state_dict(), Path(folder) / f"task_{task}.pt")


def _merged(run: Run, folder: Path, arrivals: Iterator[int]) -> Tensor:
    """Merge the networks of the tasks in order, each as soon as it is there, and measure each merge."""
    (merge,) = [one for one in run.trainer.callbacks if isinstance(one, RebasinMerge)]  # type: ignore[attr-defined]
    model, data, trainer = run.model, run.data, run.trainer
    device = trainer.strategy.root_device
    model.to(device)
    step = StepLoss(model, trainer.precision_plugin)
    metric = ContinualAccuracy(run.n_tasks).to(device)
    merge._check(model)
    for task in arrivals:
        merge._begin_task(model)
        model.load_state_dict(torch.load(folder / f"task_{task}.pt", map_location=device))
        # The batches of the last epoch, as the callback draws them where a fit walks the stream.
        last = (task + 1) * data.epochs_per_task - 1
        loader = data.training_loader(task, partial(int, last))

        def draw(loader: Any = loader) -> Generator[Any, None, None]:
            return ([part.to(device) for part in batch] for batch in loader)

        merge._look_at(step, next(draw()))
        outcome = merge._finish_task(step, draw)
        log_task_end(trainer, outcome, merge.history, task)
        evaluate(metric, model, data.val_dataloader()[: run.n_tasks], task, device)
        log_accuracies(trainer.loggers, metric.compute().cpu().reshape(run.n_tasks, run.n_tasks), task)
    return metric.compute().cpu().reshape(run.n_tasks, run.n_tasks)
