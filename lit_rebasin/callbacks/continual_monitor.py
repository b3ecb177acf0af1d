"""The callback that watches what is remembered: the accuracy of every task, after every task."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lit_rebasin.callbacks.report import log_accuracies
from lit_rebasin.continual.task_end import epochs_per_task, task_ends


class ContinualMonitor(Callback):
    """Fill the accuracy matrix from the validation that closes each task, and log what it says.

    The validation must run over one loader a task, in the order of the stream, and log ``metric`` for each of them. A task whose fit ended
    without one (early stopping) is measured by ``trainer.validate`` with the same callback; a task that is not measured leaves a row of NaN and
    a warning. Tags are listed in ``docs/tensorboard.md``; their step is the index of the task. Without loggers only the matrix is kept.

    Args:
        metric: Name under which ``validation_step`` logs the accuracy.

    Attributes:
        matrix: ``(T, T)``, accuracy on task ``s`` after training task ``t`` at ``[t, s]``; NaN where it is not measured.
        task: Index of the task that is trained, or was trained last; -1 before the first.
    """

    def __init__(self, metric: str = "val_acc") -> None:
        super().__init__()
        self.metric = metric
        self.rows: list[list[float]] = []  # one a task; empty where it was not measured
        self.task = -1
        self._training = False  # whether `task` is not finished yet
        self._warned_of = -1

    @property
    def matrix(self) -> Tensor:
        """The accuracy matrix so far."""
        n = max([len(self.rows), *map(len, self.rows)])
        matrix = torch.full((n, n), float("nan"), dtype=torch.float64)
        for task, row in enumerate(self.rows):
            matrix[task, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return matrix

    @override
    def on_train_batch_start(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Note which task is trained: that of the epoch in a stream, else one more whenever the last one was finished."""
        every = epochs_per_task(trainer)
        task = trainer.current_epoch // every if every else self.task + (not self._training)
        if task != self.task:
            self._warn_if_not_measured()
        elif not self._training and self.rows[task]:
            self.rows[task] = []  # a task that is trained further is measured again
        self.task, self._training = task, True

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Note the end of a task."""
        if task_ends(trainer):
            self._finish_task()

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Take a row of the matrix, if this is the first validation after a task."""
        if trainer.sanity_checking or self._training or self.task < 0 or self.rows[self.task]:
            return
        self.rows[self.task] = self._accuracies(trainer)
        log_accuracies(trainer.loggers, self.matrix, self.task)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Close a task whose end was not foreseen, and speak up if it was not measured."""
        if self._training and not epochs_per_task(
            trainer
        ):  # in a stream it is cut short, and a resumed fit goes on with it
            self._finish_task()
        self._warn_if_not_measured()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the rows of the matrix, and where the stream stands."""
        return {"rows": self.rows, "task": self.task, "training": self._training}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds.

        Raises:
            ValueError: If it is damaged.
        """
        for key in ("rows", "task", "training"):
            if key not in state_dict:
                raise ValueError(f"The state of {type(self).__name__} is damaged: it lacks {key}.")
        rows, task = state_dict["rows"], state_dict["task"]
        is_placed = task >= -1 and (state_dict["training"] or task < len(rows))
        if not is_placed or not all(isinstance(accuracy, int | float) for row in rows for accuracy in row):
            raise ValueError(f"The state of {type(self).__name__} is damaged: task {task} with rows {rows}.")
        self.rows = [list(row) for row in rows]
        self.task, self._training = state_dict["task"], state_dict["training"]

    def _finish_task(self) -> None:
        self._training = False
        self.rows += [[] for _ in range(self.task + 1 - len(self.rows))]

    def _warn_if_not_measured(self) -> None:
        finished = self.task if not self._training else -1
        if finished <= self._warned_of or self.rows[finished]:
            return
        self._warned_of = finished
        rank_zero_warn(
            f"Task {finished} ended without a validation, so its row of the accuracy matrix is NaN. Where a fit walks the stream, set "
            "Trainer(check_val_every_n_epoch) to the datamodule's epochs_per_task or a divisor of it; where a fit is one task, to a divisor of "
            "max_epochs, or call trainer.validate(model, loaders) after the fit (early stopping leaves no other way)."
        )

    def _accuracies(self, trainer: "pl.Trainer") -> list[float]:
        logged = trainer.callback_metrics
        n = len(trainer.num_val_batches)
        names = [self.metric] if n == 1 else [f"{self.metric}/dataloader_idx_{index}" for index in range(n)]
        if not all(name in logged for name in names):
            raise MisconfigurationException(
                f"ContinualMonitor(metric={self.metric!r}) found no such metric in the validation; log it in validation_step, or name one of "
                f"{sorted({name.split('/dataloader_idx_')[0] for name in logged})}."
            )
        return [float(logged[name]) for name in names]
