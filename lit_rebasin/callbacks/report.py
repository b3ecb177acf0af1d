"""What merges and tasks leave in the loggers. The tags are listed in ``docs/tensorboard.md``."""

from collections.abc import Iterable
from dataclasses import asdict
from math import isfinite

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lit_rebasin.callbacks.merge import MergeOutcome
from lit_rebasin.callbacks.settings import MergeSettings
from lit_rebasin.metrics import (
    accuracy_matrix_figure,
    after_task,
    average_accuracy,
    backward_transfer,
    forgetting,
    path_figure,
)


def log_settings(trainer: "pl.Trainer", settings: MergeSettings) -> None:
    """Log the arguments of the callback as hyper-parameters of the run."""
    for logger in trainer.loggers:
        logger.log_hyperparams({f"rebasin_merge/{name}": value for name, value in asdict(settings).items()})


def log_merge(trainer: "pl.Trainer", outcome: MergeOutcome, task: int) -> None:
    """Log the numbers of a merge at step ``task``, its alignment's cost curve, and the path as a figure."""
    for logger in trainer.loggers:
        logger.log_metrics({f"merge/{name}": value for name, value in outcome.numbers.items()}, step=task)
        for step, cost in enumerate(outcome.alignment.history):
            logger.log_metrics({f"alignment/cost_task_{task:02d}": cost}, step=step)
        if isinstance(logger, TensorBoardLogger):
            alpha = outcome.numbers["alpha"]
            figure = path_figure(outcome.after.alphas, outcome.before.losses, outcome.after.losses, alpha, task)
            logger.experiment.add_figure("merge/path", figure, global_step=task)
        logger.save()


def log_accuracies(loggers: Iterable[Logger], matrix: Tensor, task: int) -> None:
    """Log what the accuracy matrix says after ``task``, at that step, and the matrix as a figure."""
    seen = after_task(matrix, task)
    numbers = {f"accuracy/task_{s:02d}": float(value) for s, value in enumerate(seen[-1])}
    numbers["accuracy/average"] = average_accuracy(seen)
    numbers["accuracy/forgetting"] = forgetting(seen)
    numbers["accuracy/backward_transfer"] = backward_transfer(seen)
    numbers = {name: value for name, value in numbers.items() if isfinite(value)}
    for logger in loggers:
        logger.log_metrics(numbers, step=task)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("accuracy/matrix", accuracy_matrix_figure(matrix), global_step=task)
        logger.save()
