"""What all monitors have in common: examples that they keep aside, when they measure, and where the numbers go."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure
from typing_extensions import override

from lit_rebasin.callbacks.kept_examples import KeptExamples
from lit_rebasin.callbacks.log_figure import log_figure
from lit_rebasin.callbacks.step_loss import NoLossError, StepLoss
from lit_rebasin.continual.task_end import epochs_per_task, task_ends


class Monitor(Callback):
    """Measures something on examples kept aside, and leaves the training as it is.

    The examples are the first of the validation of the task in hand, if there was one before (Lightning's sanity check is one) and
    ``training_step`` takes them too, else of the first training batches of the task. The network runs with dropout off and BatchNorm on the
    statistics of the batch; of the LightningModule only ``training_step`` is asked.

    Args:
        every_n_epochs: How many epochs lie between two measurements; a task ends with one in any case, and with ``None`` there are no others.
        examples: How many examples are kept aside.

    Attributes:
        history: One entry a measurement: the epoch, counted from 0 in each fit, the task, and the numbers as they are logged.
    """

    def __init__(self, every_n_epochs: int | None, examples: int) -> None:
        super().__init__()
        for name, number in (("every_n_epochs", every_n_epochs), ("examples", examples)):
            may_lack = number is None and name == "every_n_epochs"
            if not may_lack and (type(number) is not int or number < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}.")
        self.every_n_epochs, self.examples = every_n_epochs, examples
        self.history: list[dict[str, Any]] = []
        self.task = 0
        self._finished = 0  # tasks, where a fit is one
        self._reasons: set[str] = set()  # why a measurement has failed
        self._epoch = 0  # of the last batch; at the end of a fit the Trainer counts one more
        # Optimizer steps of finished tasks, and those that the Trainer does not count, for a fresh one begins with 0.
        self._steps, self._steps_before = 0, 0
        self._unfinished = False  # whether the task in hand has not been measured at its end
        self._training: KeptExamples | None = None  # of the task in hand
        self._validation: dict[int, KeptExamples] = {}  # by loader, on the CPU
        self._usable: bool | None = None  # whether training_step takes them, once that is known

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuse a module whose ``training_step`` cannot be run for its loss alone."""
        if stage == "fit" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand, so {type(self).__name__} cannot run its training_step without training it: "
                "use automatic optimization, or leave the monitor out."
            )

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Forget the examples of an earlier fit, which may be of another task."""
        self._training, self._validation, self._usable = None, {}, None

    @override
    def on_validation_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first examples of every loader; nothing is drawn for it."""
        if self._usable is False:
            return
        if batch_idx == 0 or dataloader_idx not in self._validation:
            self._validation[dataloader_idx] = KeptExamples(self.examples)
        self._validation[dataloader_idx].add(batch, torch.device("cpu"))

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Note which task is trained, and keep its first examples."""
        task = self._task_of(trainer)
        if task != self.task or self._training is None:
            self._training = KeptExamples(self.examples)
        self._training.add(batch)
        self.task, self._epoch, self._unfinished = task, trainer.current_epoch, True
        if _counted(trainer) == 0:
            self._steps_before = self._steps

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure at the end of an epoch that it is due in, and of every task."""
        every = self.every_n_epochs
        if task_ends(trainer):
            self._end_task(trainer, pl_module)
        elif every and trainer.is_last_batch and (trainer.current_epoch + 1) % every == 0:
            self._take(trainer, pl_module)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Measure a task whose end was not foreseen; in a stream it is cut short, and a resumed fit goes on with it."""
        if self._unfinished and not epochs_per_task(trainer):
            self._end_task(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far."""
        return {
            "history": self.history,
            "task": self.task,
            "finished": self._finished,
            "steps": self._steps,
            "steps_before": self._steps_before,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        self.history = list(state_dict["history"])
        self.task, self._finished = state_dict["task"], state_dict["finished"]
        # States of older versions lack what they did not know.
        self._steps, self._steps_before = state_dict.get("steps", 0), state_dict.get("steps_before", 0)

    def _measure(self, trainer: "pl.Trainer", step: StepLoss, batch: Any) -> dict[str, float]:
        """Return the numbers by tag; called inside :meth:`StepLoss.quiet`."""
        raise NotImplementedError

    def _figures(self) -> Mapping[str, Callable[[], Figure]]:
        """Return by tag what draws a picture; called at the end of a task."""
        return {}

    def _take(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Measure, and log what comes of it."""
        step = StepLoss(pl_module, trainer.precision_plugin)
        with self._forgiving():
            with step.quiet():
                numbers = self._measure(trainer, step, self._examples(trainer, step))
            self._log(trainer, numbers)

    def _end_task(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Measure, and give pictures to the loggers that take some."""
        self._unfinished, self._finished = False, self.task + 1
        self._take(trainer, pl_module)
        for tag, draw in self._figures().items():
            with self._forgiving():
                log_figure(trainer.loggers, tag, draw, self._step(trainer))
        self._steps = self._step(trainer) + 1  # the loop counts this batch only later

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Let a measurement fail without the training: a warning says so once for each reason."""
        try:
            yield
        except Exception as error:
            # Lightning skips a batch by None; which batches are, may depend on their index.
            what = (
                f"{error} It was given the examples kept aside, with batch_idx 0."
                if isinstance(error, NoLossError)
                else str(error)
            )
            if what not in self._reasons:
                self._reasons.add(what)
                rank_zero_warn(f"{type(self).__name__} could not measure task {self.task}: {what}")

    def _log(self, trainer: "pl.Trainer", numbers: dict[str, float]) -> None:
        """Keep the numbers, and give them to all loggers."""
        self.history.append({"task": self.task, "epoch": self._epoch, **numbers})
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=self._step(trainer))

    def _step(self, trainer: "pl.Trainer") -> int:
        """Return the optimizer step in all fits, as the curves of the module count it."""
        return self._steps_before + _counted(trainer)

    def _task_of(self, trainer: "pl.Trainer") -> int:
        every = epochs_per_task(trainer)
        return trainer.current_epoch // every if every else self._finished

    def _examples(self, trainer: "pl.Trainer", step: StepLoss) -> Any:
        """Return the examples that are kept aside for the task in hand; called inside :meth:`StepLoss.quiet`."""
        training = self._training.batch if self._training else None
        if self._usable is False or not self._validation:
            return training
        loader = max((index for index in self._validation if index <= self.task), default=min(self._validation))
        strategy, device = trainer.strategy, trainer.lightning_module.device
        held = strategy.batch_to_device(self._validation[loader].batch, device, dataloader_idx=0)
        if self._usable is None:
            self._usable = self._takes(step, held)
        return held if self._usable else training

    def _takes(self, step: StepLoss, held: Any) -> bool:
        """Return whether ``training_step`` can work with examples of the validation, which may be of another form."""
        try:
            with torch.no_grad(), suppress(NoLossError):
                step.loss(held)
        except Exception as error:
            rank_zero_warn(
                f"{type(self).__name__} measures on training examples, for training_step cannot work with those of the validation: {error}"
            )
            return False
        return True


def _counted(trainer: "pl.Trainer") -> int:
    return trainer.fit_loop.epoch_loop._batches_that_stepped
