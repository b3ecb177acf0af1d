"""What the Trainer's arguments must be like, in a benchmark such that every stream is trained and measured to the end of every task."""

from collections.abc import Mapping
from math import inf
from typing import Any

from torch import Tensor

from lit_rebasin.cli.errors import UsageError

_MOST = 2**31 - 1


def check_amounts(options: Mapping[str, Any]) -> None:
    """Raise a `UsageError` for amounts with which Lightning would divide by zero, or that it passes over without a word."""
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval", "limit_train_batches"):
        amount = options[name]
        if isinstance(amount, int | float) and not amount > 0:
            raise UsageError(f"trainer.{name} must be above 0, got {amount}")
        if isinstance(amount, int | float) and amount > _MOST:
            raise UsageError(f"trainer.{name} must be at most {_MOST}, got {amount}")
    for name in ("log_every_n_steps", "min_epochs", "min_steps"):
        amount = options[name]
        if amount is not None and amount < 0:
            raise UsageError(f"trainer.{name} must be at least 0, got {amount}")
    clip = options["gradient_clip_val"]
    if clip is not None and not 0 <= clip < inf:
        raise UsageError(f"trainer.gradient_clip_val must be a finite number of at least 0, got {clip}")


def check_places(options: Mapping[str, Any]) -> None:
    """Raise a `UsageError` for places of the Trainer's that are the command's own."""
    if options["default_root_dir"] is not None:
        raise UsageError(
            f"trainer.default_root_dir {options['default_root_dir']} would not be heeded: everything goes to output_dir"
        )
    if options["logger"] is False:
        raise UsageError(
            "trainer.logger false would not be heeded, as reports are read from the logs: leave it out, or give loggers to "
            "have beside TensorBoard"
        )


def check_trainer(options: Mapping[str, Any], epochs_per_task: int) -> None:
    """Raise a `UsageError` for Trainer arguments that would end a task early, leave it without a validation, or mix up runs."""
    if options["logger"] not in (None, True):
        raise UsageError(
            "trainer.logger would mix up the runs of a benchmark, which have TensorBoard's files each: leave it out, or use fit, a command "
            "a run"
        )
    every = options["check_val_every_n_epoch"]
    if every is None or epochs_per_task % every:
        raise UsageError(
            f"trainer.check_val_every_n_epoch {every} misses the end of tasks of {epochs_per_task} epochs; "
            "leave it out, or pass a divisor of data.epochs_per_task"
        )
    epochs = options["max_epochs"]
    if epochs is not None and (epochs < 1 or epochs % epochs_per_task):
        raise UsageError(
            f"trainer.max_epochs {epochs} ends inside a task of {epochs_per_task} epochs; leave it out for the whole stream, or pass a "
            "multiple of data.epochs_per_task"
        )
    unfit = {
        "fast_dev_run": bool(options["fast_dev_run"]),
        "max_steps": options["max_steps"] != -1,
        "max_time": options["max_time"] is not None,
        "overfit_batches": options["overfit_batches"] != 0,
        "limit_val_batches": not is_all(options["limit_val_batches"]),
        "val_check_interval": options["val_check_interval"] not in (None, 1.0),
    }
    for name, is_unfit in unfit.items():
        if is_unfit:
            raise UsageError(
                f"trainer.{name} {options[name]} would leave tasks of the benchmark unfinished or not measured; leave it out"
            )


def check_devices(options: Mapping[str, Any], alone: Mapping[str, bool]) -> None:
    """Raise a `UsageError` for several devices beside what makes its own processes, or knows of one alone."""
    one = (str(options["devices"]) in ("auto", "1") or options["devices"] == [0]) and options["num_nodes"] == 1
    for name, is_alone in alone.items():
        if is_alone and not one:
            raise UsageError(f"trainer.devices {options['devices']} does not go with {name}; leave one of them out")


def is_all(share: float | None) -> bool:
    """Return whether a limit of the Trainer's lets every batch through; 1 is one batch, 1.0 is all."""
    return share is None or (isinstance(share, float) and share == 1)


def complete(matrix: Tensor, n_tasks: int) -> Tensor:
    """Return the square matrix of the tasks that a run was to train.

    Args:
        matrix: What the monitor has measured; a fit of the first tasks alone measures the later ones too.
        n_tasks: Number of tasks that were to be trained.

    Raises:
        RuntimeError: If a task is missing.
    """
    square = matrix[:n_tasks, :n_tasks]
    if square.shape != (n_tasks, n_tasks) or square.isnan().any():
        finished = int((~square.diagonal().isnan()).sum())
        raise RuntimeError(
            f"the stream ended early, with {finished} of {n_tasks} task{'s' * (n_tasks > 1)} finished and measured, so it is no result; "
            "take out what stops the training, such as EarlyStopping in trainer.callbacks"
        )
    return square
