"""What merges and tasks leave in the loggers. The tags are listed in ``docs/tensorboard.md``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lit_rebasin.callbacks.log_figure import log_figure
from lit_rebasin.callbacks.merge import MergeOutcome
from lit_rebasin.callbacks.settings import MergeSettings
from lit_rebasin.metrics import (
    accuracy_matrix_figure,
    accuracy_over_tasks_figure,
    after_task,
    alpha_figure,
    average_accuracy,
    backward_transfer,
    displacement_figure,
    forgetting,
    path_figure,
)


def log_settings(trainer: "pl.Trainer", settings: MergeSettings) -> None:
    """Log the arguments of the callback as hyper-parameters of the run."""
    for logger in trainer.loggers:
        logger.log_hyperparams({f"rebasin_merge/{name}": value for name, value in asdict(settings).items()})


def log_task_end(
    trainer: "pl.Trainer", outcome: MergeOutcome | None, history: Sequence[Mapping[str, Any]], task: int
) -> None:
    """Log what has become of a task: a merge, its refusal, or nothing, as after the first one.

    Args:
        trainer: Whose loggers.
        outcome: How the merge came about, if there was one.
        history: All merges so far, as `RebasinMerge` keeps them.
        task: The one that has ended.
    """
    if outcome is not None:
        _log_merge(trainer, outcome, history)
    elif history and "refused" in history[-1] and history[-1]["task"] == task:
        _log_refusal(trainer, history[-1])


def _log_merge(trainer: "pl.Trainer", outcome: MergeOutcome, history: Sequence[Mapping[str, Any]]) -> None:
    """Log a merge: its numbers at the step of its task, the cost of its alignment, the loss along its path, and pictures."""
    task = history[-1]["task"]
    numbers = {f"merge/{name}": value for name, value in outcome.numbers.items()}
    numbers |= {f"displacement/{name}": share for name, share in outcome.alignment.displacement.items()}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=task)
        for step, cost in enumerate(outcome.alignment.history):
            logger.log_metrics({f"alignment/cost_task_{task:02d}": cost}, step=step)
        for step, losses in _points(outcome, task):
            logger.log_metrics(losses, step=step)
    _draw_merge(trainer.loggers, outcome, history)
    for logger in trainer.loggers:
        logger.save()


def _log_refusal(trainer: "pl.Trainer", entry: Mapping[str, Any]) -> None:
    """Log that a merge was undone, at the step of its task; TensorBoard shows why, too."""
    for logger in trainer.loggers:
        logger.log_metrics({"merge/refused": 1.0}, step=entry["task"])
        if isinstance(logger, TensorBoardLogger):
            text = f"{entry['refused']}; the {entry['kept']} model is kept"
            logger.experiment.add_text("merge/refused_because", text, entry["task"])
        logger.save()


def _points(outcome: MergeOutcome, task: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the points of the path by their step, alpha in per cent, with the losses there that are finite."""
    paths = {f"path/before_task_{task:02d}": outcome.before, f"path/after_task_{task:02d}": outcome.after}
    for index, alpha in enumerate(outcome.after.alphas.tolist()):
        losses = {tag: float(path.losses[index]) for tag, path in paths.items()}
        yield round(100 * alpha), {tag: loss for tag, loss in losses.items() if isfinite(loss)}


def _draw_merge(loggers: Sequence[Logger], outcome: MergeOutcome, history: Sequence[Mapping[str, Any]]) -> None:
    task, after = history[-1]["task"], outcome.after
    alpha = outcome.numbers["alpha"]
    log_figure(
        loggers, "merge/path", lambda: path_figure(after.alphas, outcome.before.losses, after.losses, alpha, task), task
    )
    shares = {entry["task"]: entry["displacement"] for entry in history if entry.get("displacement")}
    if task in shares:  # a merge without alignment has no groups
        log_figure(loggers, "merge/displacement", lambda: displacement_figure(shares), task)
    alphas = {entry["task"]: torch.tensor([entry["alpha"]]) for entry in history if "alpha" in entry}
    log_figure(loggers, "merge/alpha_over_tasks", lambda: alpha_figure({"": alphas}), task)


def log_accuracies(loggers: Sequence[Logger], matrix: Tensor, task: int) -> None:
    """Log what the accuracy matrix says after ``task``, at that step, and as figures."""
    seen = after_task(matrix, task)
    numbers = {f"accuracy/task_{s:02d}": float(value) for s, value in enumerate(seen[-1])}
    numbers["accuracy/average"] = average_accuracy(seen)
    numbers["accuracy/forgetting"] = forgetting(seen)
    numbers["accuracy/backward_transfer"] = backward_transfer(seen)
    numbers = {name: value for name, value in numbers.items() if isfinite(value)}
    for logger in loggers:
        logger.log_metrics(numbers, step=task)
    log_figure(loggers, "accuracy/matrix", lambda: accuracy_matrix_figure(matrix), task)
    log_figure(loggers, "accuracy/over_tasks", lambda: accuracy_over_tasks_figure({"": [seen]}), task)
    for logger in loggers:
        logger.save()
