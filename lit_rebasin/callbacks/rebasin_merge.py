"""The callback: align the trained model to the previous one after each task, and merge the two."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lit_rebasin.alignment import check_same_architecture
from lit_rebasin.callbacks.correction import correct
from lit_rebasin.callbacks.merge import merge_task
from lit_rebasin.callbacks.report import log_merge, log_settings
from lit_rebasin.callbacks.settings import MergeSettings, Method
from lit_rebasin.callbacks.step_features import check_readable
from lit_rebasin.callbacks.step_fisher import check_measurable, step_fisher
from lit_rebasin.callbacks.step_loss import NoLossError, StepLoss, draw_batches
from lit_rebasin.callbacks.step_spec import step_spec
from lit_rebasin.callbacks.task_end import epochs_per_task, rewrite_last_checkpoints, task_ends
from lit_rebasin.merging import NoFiniteLossError, has_batch_norm
from lit_rebasin.merging.path import weights_of, write_weights
from lit_rebasin.symmetry import PermutationSpec, join


class RebasinMerge(Callback):
    r"""Align and merge a network with its previous self at the end of every task.

    The first task is only remembered. After every later one, the trained weights are permuted into the basin of the previous ones and
    merged, ``theta_t = alpha * theta_{t-1} + (1 - alpha) * pi(theta_new) + delta`` (Pena et al., CVPR 2023, eq. 12), in place and before the
    validation that closes the task. Works in two ways:

    * one ``trainer.fit`` walks the whole stream, with a datamodule that has ``epochs_per_task`` (such as ``ContinualDataModule``);
    * one ``trainer.fit`` a task, each with a fresh Trainer and any data, and this callback (the same object, or one that was given the state
      of a checkpoint) in all of them.

    Of the LightningModule only ``training_step`` is asked, which returns the loss; it is run some more times at the end of a task, with its
    logs and metrics set aside. Parameters that no task before has trained, such as the head of a new task, and frozen ones are taken from the
    new model as they are.

    Args:
        alpha: Weight of the previous model in [0, 1]; or how to choose it: ``"line-search"`` for the lowest loss on training batches along the
            path, ``"fisher"`` for the closed form :func:`~lit_rebasin.merging.fisher_alpha` of the new task against the mean of those before,
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
            :func:`~lit_rebasin.merging.repair` of every layer and those; ``"data-free"``, :func:`~lit_rebasin.merging.reset_batch_norm`;
            ``"none"``.
        batches: Training batches, of the task just learned and whatever replay its loader mixes in, that each merge uses.
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
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = MergeSettings(alpha, method, cost, init, options or {}, statistics, batches, seed)
        self.previous: dict[str, Tensor] | None = None
        self.n_tasks = 0
        self.history: list[dict[str, Any]] = []
        self.spec: PermutationSpec | None = None
        self._trained: set[str] = set()  # parameters that some finished task has changed
        self._initial: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}  # the mean over the tasks so far, in the frame of the previous model
        self._fisher_tasks = 0
        self._steps_before = 0  # optimizer steps of earlier fits, so that their curves do not overlap
        self._pending = False  # whether anything was trained since the last merge
        self._traced = False  # whether the spec takes account of the present task

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
        if self.settings.statistics == "data-free" and not has_batch_norm(pl_module):
            raise MisconfigurationException(
                f'RebasinMerge(statistics="data-free") is for BatchNorm, of which {type(pl_module).__name__} has none.'
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand, so its training_step cannot be run for its loss alone: "
                "use automatic optimization."
            )

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Compare the model with the one that is remembered, before training."""
        if self.previous is not None:
            check_same_architecture(weights_of(pl_module), self.previous)
            if self.settings.measures_fisher and not self._fisher:
                raise MisconfigurationException(
                    f"RebasinMerge(alpha={self.settings.alpha!r}) needs the Fisher information of the tasks so far, which this state lacks, "
                    "for it was saved with another alpha: give alpha a number, or line-search."
                )
        log_settings(trainer, self.settings)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Go on counting steps where the last fit ended, and note what is not trained yet."""
        self._pending = self._traced = False
        loop = trainer.fit_loop.epoch_loop
        # A fresh Trainer counts from 0 again; one that resumes a checkpoint has its count already. The counter serves logging only.
        if loop._batches_that_stepped == 0:
            loop._batches_that_stepped = self._steps_before
        if self.previous is None:
            self.spec = None
            self._initial = {name: tensor.cpu().clone() for name, tensor in weights_of(pl_module).items()}

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Find the permutation groups on the first batch of a task, so that a model without any fails at once."""
        self._pending = True
        if self.settings.measures_fisher and not self._traced:
            check_measurable(StepLoss(trainer, pl_module), batch)
        if self._traced or self.settings.method == "identity":
            return
        try:
            found = step_spec(StepLoss(trainer, pl_module), batch)
        except NoLossError:  # the training skips this batch too
            return
        # A task may run other parts than those before it, such as a head of its own; what moves must move in all of them.
        self.spec = join([self.spec, found]) if self.spec is not None else found
        self._traced = True
        if self.spec.groups and self.settings.reads_features:
            check_readable(StepLoss(trainer, pl_module), self.spec, batch)
        if not self.spec.groups:
            reasons = sorted(set(self.spec.fixed.values()))
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no permutable group, so there is nothing to align. Why its axes are fixed: "
                f"{'; '.join(reasons) or 'its training_step calls no module with weights'}. "
                'RebasinMerge(method="identity") merges without aligning.'
            )

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge after the last batch of a task, so that the validation and the checkpoints that follow see the merged model."""
        if task_ends(trainer):
            self._finish_task(trainer, pl_module)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Merge if the fit was stopped before its last batch could be foreseen, and save that model over the last checkpoint."""
        if self._pending and epochs_per_task(trainer):
            rank_zero_warn(
                f"The fit ended in the middle of task {self.n_tasks}, which is not merged: resume it to go on."
            )
        elif self._pending:
            self._finish_task(trainer, pl_module)
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
        return {
            "previous": self.previous or {},
            "n_tasks": self.n_tasks,
            "history": self.history,
            "trained": sorted(self._trained),
            "steps_before": self._steps_before,
            "spec": self.spec.to_json() if self.spec is not None else None,
            "fisher": self._fisher,
            "fisher_tasks": self._fisher_tasks,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        self.previous = dict(state_dict["previous"]) or None
        self.n_tasks = state_dict["n_tasks"]
        self.history = list(state_dict["history"])
        self._trained = set(state_dict["trained"])
        self._steps_before = state_dict["steps_before"]
        # States of versions that measured none lack it.
        self._fisher, self._fisher_tasks = dict(state_dict.get("fisher", {})), state_dict.get("fisher_tasks", 0)
        self.spec = PermutationSpec.from_json(state_dict["spec"]) if state_dict["spec"] is not None else None

    def _finish_task(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        task = self.n_tasks
        trained = {name: tensor.clone() for name, tensor in weights_of(pl_module).items()}
        if not self._traced and self.settings.method != "identity":
            raise ValueError(
                f"{type(pl_module).__name__}.training_step returned None on every batch of task {task}, but the merge needs its loss: "
                "return a tensor, or a dict with the key 'loss'."
            )
        broken = self._not_finite(pl_module)
        if broken and self.previous is None:
            raise ValueError(
                f"Training left NaN or infinity in {broken!r}, and there is no previous model to go back to."
            )
        if broken:
            self._refuse(pl_module, f"training left NaN or infinity in {broken!r}")
        elif self.previous is None:
            self._measure_fisher(trainer, pl_module, trained)
        else:
            try:
                self._merge(trainer, pl_module, task, trained, self.previous)
            except NoFiniteLossError as error:
                self._refuse(pl_module, str(error).rstrip("."))
            except BaseException:
                write_weights(pl_module, trained)
                raise
        # The loop counts this batch only later, but the checkpoint of this task is written in between.
        self._steps_before = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        self._pending = self._traced = False
        self.n_tasks = task + 1
        self._remember(pl_module)

    def _not_finite(self, pl_module: "pl.LightningModule") -> str | None:
        """Return a tensor that training has broken; one that was not finite before, such as a mask, is none."""
        before = self.previous if self.previous is not None else self._initial
        for name, tensor in weights_of(pl_module).items():
            if not tensor.isfinite().all() and (name not in before or before[name].isfinite().all()):
                return name
        return None

    def _refuse(self, pl_module: "pl.LightningModule", reason: str) -> None:
        """Go back to the previous model, and say so."""
        write_weights(pl_module, self.previous or {})
        rank_zero_warn(f"The merge after task {self.n_tasks} is refused: {reason}. The previous model is kept.")
        self.history.append({"task": self.n_tasks, "refused": reason})

    def _merge(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        task: int,
        trained: Mapping[str, Tensor],
        previous: Mapping[str, Tensor],
    ) -> None:
        previous = {name: tensor.to(pl_module.device) for name, tensor in previous.items()}
        spec = self.spec if self.spec is not None else PermutationSpec()  # plain averaging needs none
        step = StepLoss(trainer, pl_module)
        with step.quiet():
            torch.manual_seed(self.settings.seed + task)
            shared = self._shared(pl_module, trained, previous)
            outcome = merge_task(step, trainer, trained, previous, spec, shared, self.settings, task, self._fisher)
            _check_finite(outcome.numbers["loss_after"])
            write_weights(pl_module, outcome.weights)
            correct(pl_module, step, outcome, self.settings.statistics)
            _check_finite(outcome.numbers["loss_after"])
            write_weights(pl_module, trainer.strategy.broadcast(weights_of(pl_module)))
        self._add_fisher(outcome.fisher)
        self.history.append({"task": task, **outcome.numbers})
        log_merge(trainer, outcome, task)
        numbers = outcome.numbers
        rank_zero_info(
            f"Task {task}: merged with alpha {numbers['alpha']:.2f}, {numbers['moved']} neurons moved, "
            f"loss on training batches {numbers['loss_before']:.4f} -> {numbers['loss_after']:.4f}."
        )

    def _measure_fisher(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", trained: Mapping[str, Tensor]
    ) -> None:
        """Take in the Fisher information of the first task."""
        if not self.settings.measures_fisher:
            return
        step = StepLoss(trainer, pl_module)
        with step.quiet():
            torch.manual_seed(self.settings.seed)
            batches = step.with_loss(draw_batches(trainer, self.settings.batches))
            self._add_fisher(step_fisher(step, trained, batches))

    def _add_fisher(self, fisher: Mapping[str, Tensor]) -> None:
        if fisher:
            self._fisher_tasks += 1
        for name, diagonal in fisher.items():
            mean = self._fisher.get(name, torch.zeros_like(diagonal, device="cpu"))
            self._fisher[name] = mean + (diagonal.cpu() - mean) / self._fisher_tasks

    def _shared(
        self, pl_module: "pl.LightningModule", trained: Mapping[str, Tensor], previous: Mapping[str, Tensor]
    ) -> set[str]:
        """Return the parameters that both models have trained."""
        trainable = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        fresh = {name for name in trainable - self._trained if not torch.equal(trained[name], previous[name])}
        return trainable - fresh

    def _remember(self, pl_module: "pl.LightningModule") -> None:
        """Keep the model as the reference of the next task."""
        now = {name: tensor.cpu().clone() for name, tensor in weights_of(pl_module).items()}
        before = self.previous if self.previous is not None else self._initial
        parameters = {name for name, _ in pl_module.named_parameters()}
        self._trained |= {name for name in parameters if name not in before or not torch.equal(now[name], before[name])}
        self.previous = now


def _check_finite(loss: float) -> None:
    if not isfinite(loss):
        raise NoFiniteLossError("the loss of the merged model on training batches is NaN or infinite")
