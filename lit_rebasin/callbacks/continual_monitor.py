"""The callback that watches what is remembered: the accuracy of every task, after every task."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lit_rebasin.metrics import accuracy_matrix_figure, after_task, average_accuracy, backward_transfer, forgetting


class ContinualMonitor(Callback):
    """Fill the accuracy matrix from the validation that closes each task, and log what it says.

    The validation must run over one loader a task, in the order of the stream, and log ``metric`` for each of them. Tags are listed in
    ``docs/tensorboard.md``; their step is the index of the task. Without loggers only the matrix is kept.

    Args:
        metric: Name under which ``validation_step`` logs the accuracy.

    Attributes:
        matrix: ``(T, T)``, accuracy on task ``s`` after training task ``t`` at ``[t, s]``; NaN where it is not measured yet.
    """

    def __init__(self, metric: str = "val_acc") -> None:
        super().__init__()
        self.metric = metric
        self.rows: list[list[float]] = []
        self._fresh = False  # whether something was trained since the last row

    @property
    def matrix(self) -> Tensor:
        """The accuracy matrix so far."""
        n = max([len(self.rows), *map(len, self.rows)])
        matrix = torch.full((n, n), float("nan"), dtype=torch.float64)
        for task, row in enumerate(self.rows):
            matrix[task, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return matrix

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Note that there is something new to evaluate."""
        self._fresh = True

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Take a row of the matrix, if this validation closes a task."""
        if trainer.sanity_checking or not self._fresh or not self._closes_a_task(trainer):
            return
        self._fresh = False
        self.rows.append(self._accuracies(trainer))
        self._report(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the rows of the matrix."""
        return {"rows": self.rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rows of a checkpoint."""
        self.rows = [list(row) for row in state_dict["rows"]]

    def _closes_a_task(self, trainer: "pl.Trainer") -> bool:
        epochs_per_task = getattr(getattr(trainer, "datamodule", None), "epochs_per_task", None)
        done = trainer.current_epoch + 1
        at_end = done % epochs_per_task == 0 if epochs_per_task else done == trainer.max_epochs
        stopped = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        return stopped or (trainer.is_last_batch and at_end)

    def _accuracies(self, trainer: "pl.Trainer") -> list[float]:
        logged = trainer.callback_metrics
        names = [self.metric] if self.metric in logged else []
        while f"{self.metric}/dataloader_idx_{len(names)}" in logged:
            names.append(f"{self.metric}/dataloader_idx_{len(names)}")
        if not names:
            raise MisconfigurationException(
                f"ContinualMonitor(metric={self.metric!r}) found no such metric in the validation; log it in validation_step, or name one of "
                f"{sorted(name.split('/dataloader_idx_')[0] for name in logged)}."
            )
        return [float(logged[name]) for name in names]

    def _report(self, trainer: "pl.Trainer") -> None:
        task = len(self.rows) - 1
        seen = after_task(self.matrix, task)
        numbers = {f"accuracy/task_{s:02d}": float(value) for s, value in enumerate(seen[-1]) if not value.isnan()}
        numbers["accuracy/average"] = average_accuracy(seen)
        numbers["accuracy/forgetting"] = forgetting(seen)
        numbers["accuracy/backward_transfer"] = backward_transfer(seen)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=task)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("accuracy/matrix", accuracy_matrix_figure(self.matrix), global_step=task)
            logger.save()
