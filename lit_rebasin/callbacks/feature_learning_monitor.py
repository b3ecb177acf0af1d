"""The callback that watches whether features are learned in every layer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_rebasin.callbacks.monitor import Monitor
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.continual.task_end import task_ends
from lit_rebasin.merging.path import weights_of
from lit_rebasin.metrics import FeatureSpeed, feature_speed_figure, recorded
from lit_rebasin.metrics.hessian import checked_loss
from lit_rebasin.metrics.tracks import SEQUENTIAL, WEIGHTED, trained_modules

# A layer whose features change by less than this share of what those of the fastest layer do stands still.
_STILL = 1e-4
_NUMBERS = ("speed", "cosine", "forward", "backward")


class FeatureLearningMonitor(Monitor):
    """Log how far one step of training moves the features of every layer (Chizat and Netrapalli, NeurIPS 2024).

    For each linear, convolutional, recurrent and attention layer, at the first step of an epoch: ``speed``, the relative change of its outputs;
    ``cosine``, of the angle between the change and minus the gradient of the loss with respect to them; ``forward`` and ``backward``, the root
    mean square of the outputs and of that gradient. Tags are ``feature_learning/speed/`` and so on, followed by the layer, and the picture
    ``feature_learning/speed``; see ``docs/feature_learning.md``. A layer that stands still is named in a warning, once.

    Args:
        every_n_epochs: How many epochs lie between two measurements.
        examples: How many examples are kept aside.

    Attributes:
        history: One entry a measurement: the epoch, the task and the numbers.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[FeatureLearningMonitor()])
    """

    def __init__(self, every_n_epochs: int = 1, examples: int = 128) -> None:
        super().__init__(every_n_epochs, examples)
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # features and gradients by layer
        self._probe: Any = None  # the examples that they are of
        self._done = (-1, -1)  # the task and epoch that were measured last
        self._epochs = 0  # that were begun, in all fits
        self._latest = (-1, -1)  # the task and epoch of the last of them
        self._begun: dict[
            int, tuple[int, int]
        ] = {}  # by task, how many epochs had passed, and the number of its first one
        self._warned: set[str] = set()

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin to count epochs anew."""
        super().on_fit_start(trainer, pl_module)
        self._before, self._done = {}, (-1, -1)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Count the epochs through all fits, each of which may count anew."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        now = (self.task, trainer.current_epoch)
        if now != self._latest:
            self._latest = now
            self._begun.setdefault(self.task, (self._epochs, trainer.current_epoch))
            self._epochs += 1

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Read features and gradients before the first step of an epoch."""
        now = (self.task, trainer.current_epoch)
        if now == self._done or trainer.current_epoch % (self.every_n_epochs or 1):
            return
        self._done = now
        step = _full_precision(trainer, pl_module)
        self._before = {}
        with self._forgiving(), step.quiet():
            self._probe = self._examples(trainer, step)
            self._before = _features_and_gradients(step, self._probe)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the features after the step, and draw what was measured when a task ends."""
        if self._before:
            step = _full_precision(trainer, pl_module)
            with self._forgiving(), torch.no_grad():
                with step.quiet(), recorded(step.module, list(self._before)) as calls:
                    step.loss(self._probe)
                self._log(trainer, self._numbers({call.name: call.output for call in calls}))
            self._before, self._probe = {}, None
        if task_ends(trainer):
            self._end_task(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far, and the count of epochs."""
        return {**super().state_dict(), "epochs": self._epochs, "latest": self._latest, "begun": self._begun}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        super().load_state_dict(state_dict)
        self._epochs, self._latest = state_dict["epochs"], tuple(state_dict["latest"])
        self._begun = dict(state_dict["begun"])

    @override
    def _take(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Measure nothing at the end of an epoch: what is measured is the first step of one."""

    @override
    def _figures(self) -> Mapping[str, Callable[[], Figure]]:
        curves: dict[str, list[tuple[float, float]]] = {}
        prefix = "feature_learning/speed/"
        for entry in self.history:
            passed, first = self._begun[entry["task"]]
            for tag, value in entry.items():
                if tag.startswith(prefix):
                    curves.setdefault(tag.removeprefix(prefix), []).append((passed + entry["epoch"] - first, value))
        tasks = [passed for passed, _ in self._begun.values() if passed]
        return {"feature_learning/speed": partial(feature_speed_figure, curves, tasks)} if curves else {}

    def _numbers(self, after: Mapping[str, Tensor]) -> dict[str, float]:
        found: dict[str, dict[str, float]] = {}
        for name, (features, gradient) in self._before.items():
            if name in after and after[name].shape == features.shape:
                speed = FeatureSpeed(sync_on_compute=False)  # each process has examples of its own
                speed.update(features, after[name], gradient)
                found[name] = {one: float(value) for one, value in speed.compute().items()}
        self._warn_of_still_layers(found)
        return {f"feature_learning/{one}/{name}": layer[one] for one in _NUMBERS for name, layer in found.items()}

    def _warn_of_still_layers(self, found: Mapping[str, Mapping[str, float]]) -> None:
        fastest = max((layer["speed"] for layer in found.values()), default=0.0)
        for name, layer in found.items():
            # Where no gradient comes back, weight decay alone still moves a layer.
            if (layer["speed"] < _STILL * fastest or layer["backward"] == 0) and name not in self._warned:
                self._warned.add(name)
                cause = (
                    "no gradient comes back to it"
                    if layer["backward"] == 0
                    else f"the gradient that comes back to it is {layer['backward']:.1e}"
                )
                rank_zero_warn(
                    f"Layer {name} stands still: one step changes its features by {layer['speed']:.1e} of their size, those of the fastest "
                    f"layer by {fastest:.1e}; {cause}. lit_rebasin.suggest_scales(model, batch) proposes initial scales and learning rates."
                )


def _full_precision(trainer: "pl.Trainer", module: "pl.LightningModule") -> StepLoss:
    """Return the step without autocast, in which a small change of the features would be lost in rounding."""
    mixed = isinstance(trainer.precision_plugin, MixedPrecision)
    return StepLoss(module, Precision() if mixed else trainer.precision_plugin)


def _features_and_gradients(step: StepLoss, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
    gradients: dict[str, Tensor] = {}
    # Copies, for the user's own hooks are on the parameters.
    parameters = {
        name: parameter.detach().requires_grad_()
        for name, parameter in step.module.named_parameters()
        if parameter.requires_grad
    }
    with recorded(step.module, _layers(step), gradients) as calls, torch.enable_grad():
        loss = checked_loss(step.at({**weights_of(step.module), **parameters}, batch))
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    if not calls:
        raise ValueError(
            "training_step calls no linear, convolutional, recurrent or attention layer as a module; those inside a compiled one are not seen."
        )
    return {call.name: (call.output, gradients.get(call.name, torch.zeros_like(call.output))) for call in calls}


def _layers(step: StepLoss) -> list[str]:
    return [name for name, module in trained_modules(step.module) if isinstance(module, (*WEIGHTED, *SEQUENTIAL))]
