"""The callback: align the trained model to the previous one after each task, and merge the two."""

from collections.abc import Generator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lit_rebasin.callbacks.averages import check_averages, restart_averages, take_averages
from lit_rebasin.callbacks.report import log_settings, log_task_end
from lit_rebasin.callbacks.settings import MergeSettings, Method
from lit_rebasin.callbacks.start import Start
from lit_rebasin.callbacks.step_loss import StepLoss, as_trained, draw_batches
from lit_rebasin.callbacks.task_merger import TaskMerger
from lit_rebasin.continual.task_end import epochs_per_task, rewrite_last_checkpoints, task_ends
from lit_rebasin.continual.trainer_checks import forgets


class RebasinMerge(TaskMerger, Callback):
    r"""Align and merge a network with its previous self at the end of every task.

    The first task is only remembered. After every later one, the trained weights are permuted into the basin of the previous ones and
    merged, ``theta_t = alpha * theta_{t-1} + (1 - alpha) * pi(theta_new) + delta`` (after Pena et al., CVPR 2023, eq. 12, whose
    theta_new is theta_{t-1} itself), in place and before the validation that closes the task. Works in two ways:

    * one ``trainer.fit`` walks the whole stream, with a datamodule that has ``epochs_per_task`` (such as ``ContinualDataModule``);
    * one ``trainer.fit`` a task, each with a fresh Trainer and any data, and this callback (the same object, or one that was given the state
      of a checkpoint) in all of them.

    Of the LightningModule only ``training_step`` is asked, which returns the loss; it is run some more times at the end of a task, with its
    logs and metrics set aside. Parameters that no task before has trained, such as the head of a new task, and frozen ones are taken from the
    new model as they are.

    Args:
        alpha: Weight of the previous model in [0, 1]; or how to choose it: ``"line-search"`` for the lowest loss on training batches along the
            path, ``"fisher"`` for the closed form :func:`~lit_rebasin.fisher_alpha` of the new task against the mean of those before,
            and ``"layer-fisher"`` for one a layer.
        method: How to align, by any name that :func:`~lit_rebasin.align` knows. ``"identity"`` does not align (plain averaging).
        cost: What ``"sinkhorn"`` and ``"straight-through"`` minimise: ``"incremental"``, which is the default, the loss of the merge, with
            ``"sinkhorn"`` together with a trained residual; ``"midpoint"`` or ``"random-point"``, the loss on the path; ``"l2"``, ``"l1"`` or
            ``"cosine"``, the distance of the weights.
        init: The method that finds the start. Default: ``"weights"`` for ``"sinkhorn"`` and ``"straight-through"``, else the identity.
        options: Further arguments of the method by name, as :func:`~lit_rebasin.align` takes them, and for the residual of the incremental cost
            ``residual_learning_rate`` (0 leaves it out), ``residual_weight_decay`` and ``residual_clip``. The soft permutations of
            ``"sinkhorn"`` start nearly hard here, ``{"sharpness": 8, "noise": 0, "learning_rate": 0.1}``, as the residual needs it.
        statistics: What the merged weights are given: ``"reestimate"``, BatchNorm statistics estimated anew; ``"repair"`` and ``"rescale"``,
            :func:`~lit_rebasin.repair` of every layer and those; ``"data-free"``, :func:`~lit_rebasin.reset_batch_norm`;
            ``"none"``.
        batches: Training batches, of the task just learned and whatever replay its loader mixes in, that each merge uses.
        examples: ``"kept"`` takes in their place all that a datamodule such as ``ContinualDataModule`` keeps for replay, the task just learned
            among it, in ``batches`` batches.
        start: Where each task but the first begins: at the ``"previous"`` network; ``"fresh"``, with every layer initialised anew, which
            needs the alignment; or ``"perturbed"``, half of either.
        combine: ``"average"`` takes the point of the path at alpha. ``"regmean"`` takes :func:`~lit_rebasin.regmean`: every layer is
            fitted to both networks on the inputs of each, those of the previous one as they were at the merges that made it. For this it reads
            as many batches as the layers have need of, at most a pass over the training data.
        margin: A merge whose loss on its batches is greater than both the previous and the trained model's by more than this, in units of the
            loss, or NaN, or that runs out of memory, is undone: the model is what it was before it, with a warning, and ``history`` says why.
        seed: Seed of everything drawn in a merge; the random states of Python, NumPy, torch and of the loaders are not touched.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        trainer = Trainer(max_epochs=25, reload_dataloaders_every_n_epochs=1, callbacks=[RebasinMerge(alpha=0.8)])
        trainer.fit(model, ContinualDataModule("rotated-digits", epochs_per_task=5, replay_per_class=5))
    """

    def __init__(
        self,
        alpha: float | Literal["line-search", "fisher", "layer-fisher"] = 0.8,
        method: Method = "weights",
        cost: Literal["incremental", "midpoint", "random-point", "l2", "l1", "cosine"] | None = None,
        init: Method | None = None,
        options: dict[str, Any] | None = None,
        statistics: Literal["reestimate", "repair", "rescale", "data-free", "none"] = "reestimate",
        batches: int = 10,
        examples: Literal["training", "kept"] = "training",
        start: Start = "previous",
        combine: Literal["average", "regmean"] = "average",
        margin: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            MergeSettings(alpha, method, cost, init, options or {}, statistics, batches, seed, start, combine, margin)
        )
        if examples not in ("training", "kept"):
            raise ValueError(f"examples must be 'training' or 'kept', got {examples!r}.")
        self.examples = examples
        self._steps_before = 0  # optimizer steps of earlier fits, so that their curves do not overlap
        self._pending = False  # whether anything was trained since the last merge

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuse what a merge cannot work with, before any work is done."""
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if "FSDP" in strategy or "DeepSpeed" in strategy or "ModelParallel" in strategy:
            raise MisconfigurationException(
                f"RebasinMerge needs whole weights on every device, which {strategy} does not keep."
            )
        if forgets(trainer) and not epochs_per_task(trainer):
            raise MisconfigurationException(
                "RebasinMerge remembers the network of the fit before, but this strategy trains every fit in processes that are gone after it: "
                "use strategy='ddp', or train all tasks in one fit, with a datamodule that has epochs_per_task."
            )
        data: Any = getattr(trainer, "datamodule", None)
        if self.examples == "kept" and (not hasattr(data, "kept_examples") or data.replay_per_class == 0):
            raise MisconfigurationException(
                'RebasinMerge(examples="kept") needs a datamodule that keeps some, such as ContinualDataModule(replay_per_class=5).'
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand, so its training_step cannot be run for its loss alone: "
                "use automatic optimization."
            )

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refuse a model that cannot be merged, before training."""
        self._check(pl_module)
        check_averages(trainer)
        log_settings(trainer, self.settings)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Go on counting steps where the last fit ended."""
        self._pending = self._traced = False
        loop = trainer.fit_loop.epoch_loop
        # A fresh Trainer counts from 0 again; one that resumes a checkpoint has its count already. The counter serves logging only.
        if loop._batches_that_stepped == 0:
            loop._batches_that_stepped = self._steps_before

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Begin a task, and find the permutation groups on its first batch, so that a model without any fails at once."""
        if not self._pending and self._begin_task(pl_module) and self.settings.start != "previous":
            restart_averages(trainer, pl_module)
        self._pending = True
        self._look_at(StepLoss(pl_module, trainer.precision_plugin), batch)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge after the last batch of a task, so that the validation and the checkpoints that follow see the merged model."""
        if task_ends(trainer):
            self._merge_in(trainer, pl_module)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Merge if the fit was stopped before its last batch could be foreseen, and save that model over the last checkpoint."""
        if self._pending and epochs_per_task(trainer):
            rank_zero_warn(
                f"The fit ended in the middle of task {self.n_tasks}, which is not merged: resume it to go on."
            )
        elif self._pending:
            self._merge_in(trainer, pl_module)
            rewrite_last_checkpoints(trainer)
        self._initial = {}

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Speak up about a task without data, which Lightning skips."""
        if trainer.num_training_batches == 0 and trainer.limit_train_batches != 0:
            raise MisconfigurationException(
                f"Task {self.n_tasks} has no training batches: its training loader is empty."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the previous weights, the counters and the history, as tensors and plain types."""
        return {**super().state_dict(), "steps_before": self._steps_before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        super().load_state_dict(state_dict)
        self._steps_before = state_dict["steps_before"]

    def _merge_in(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Merge the task that was just trained."""
        take_averages(trainer, pl_module)
        step = StepLoss(pl_module, trainer.precision_plugin)
        outcome = self._finish_task(
            step, lambda: self._draw(trainer), trainer.strategy.broadcast, trainer.is_global_zero
        )
        restart_averages(trainer, pl_module)
        # The loop counts this batch only later, but the checkpoint of this task is written in between.
        self._steps_before = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        self._pending = False
        log_task_end(trainer, outcome, self.history, self.n_tasks - 1)

    def _draw(self, trainer: "pl.Trainer") -> Generator[Any, None, None]:
        if self.examples == "training":
            return draw_batches(trainer)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        kept = data.kept_examples(data.task + 1)
        count = min(self.settings.batches, max(1, len(kept[1]) // 2))  # BatchNorm has no statistics of a single example
        order = torch.randperm(len(kept[1])).tensor_split(count)  # a merge sees all of it
        return (as_trained(trainer, [part[chosen] for part in kept]) for chosen in order)
