"""The callback that watches how a network is connected with another one: the loss between them, and where their neurons are."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torchmetrics import Metric
from typing_extensions import override

from lit_rebasin.alignment import weight_matching
from lit_rebasin.callbacks.monitor import Monitor
from lit_rebasin.callbacks.reference import Reference, as_weights_of, held_weights
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.callbacks.step_spec import step_spec
from lit_rebasin.merging import LinearPath, PathLosses, is_plane, loss_plane
from lit_rebasin.merging.path import weights_of
from lit_rebasin.metrics import (
    effective_dimension,
    layer_neurons,
    neuron_distances,
    path_figure,
    plane_figure,
    width_bound,
)
from lit_rebasin.symmetry import permute

T = TypeVar("T")

# What the width bound allows the outputs on a path to be off by.
_ERROR = 0.05
# Layers that the theory covers: linear ones, and functions with slope at most 1 that are 0 at 0.
_COVERED = (nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Identity, nn.Flatten, nn.Dropout)
_PLANE = 11  # points of the plane along either axis


class ConnectivityMonitor(Monitor):
    """Log the loss between a network and another, as trained and aligned, and how far their neurons are apart (Ferbach et al., AISTATS 2024).

    The other network is the one that the task began with, or one that is given, such as a twin of another run. Put this callback before
    ``RebasinMerge`` to see the network as it was trained and not the merge. The network is aligned by weight matching. Tags begin with
    ``connectivity/``, where a network is given with ``connectivity_reference/``; see ``docs/connectivity.md``. The first task is compared with
    nothing but a network that is given. Behind ``RebasinMerge(start="fresh")`` the network that a task begins with is the fresh one.

    Args:
        reference: The other network: a module of the same architecture, its state dict, or the path of a checkpoint, of which no code is run;
            of the LightningModule, or of the network in it. Default: the network that the task began with.
        every_n_epochs: How many epochs lie between two measurements; ``None`` for the ends of tasks alone.
        examples: How many examples are kept aside.

    Attributes:
        history: One entry a measurement: the epoch, the task and the numbers.

    Raises:
        ValueError: If a checkpoint cannot be read; and when the fit begins, if the reference is of another architecture.

    Example::

        trainer = Trainer(max_epochs=25, callbacks=[ConnectivityMonitor(), RebasinMerge(alpha=0.5)])
    """

    def __init__(
        self,
        reference: Reference | None = None,
        every_n_epochs: int | None = None,
        examples: int = 256,
    ) -> None:
        super().__init__(every_n_epochs, examples)
        self.reference = None if reference is None else held_weights(reference)
        self._begun: dict[str, Tensor] | None = None  # the network that the task began with
        self._drawn: dict[str, Callable[[], Figure]] = {}
        self._at_start = -1

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refuse a reference of another architecture before anything is trained."""
        super().on_fit_start(trainer, pl_module)
        if self.reference is not None:
            self.reference = as_weights_of(pl_module, self.reference)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Keep the network that a task begins with."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._at_start != self.task:
            self._at_start = self.task
            self._begun = (
                {name: tensor.cpu().clone() for name, tensor in weights_of(pl_module).items()} if self.task else None
            )

    @override
    def _measure(self, trainer: "pl.Trainer", step: StepLoss, batch: Any) -> dict[str, float]:
        weights = weights_of(step.module)
        numbers = _dimensions(step.module, weights)
        reference = self.reference if self.reference is not None else self._begun
        self._drawn = {}
        if reference is None:
            return self._named(numbers)
        reference = {name: reference[name].to(tensor.device) for name, tensor in weights.items()}
        spec = step_spec(step, batch)
        ours, theirs = (_parameters(step.module, one) for one in (weights, reference))
        alignment = weight_matching(ours, theirs, spec)
        aligned = permute(weights, spec, alignment.permutations)
        third = _parameters(step.module, aligned)
        before, accuracies = _along(step, LinearPath(reference, weights), batch)
        after, aligned_accuracies = (before, accuracies)
        if alignment.moved:
            after, aligned_accuracies = _along(step, LinearPath(reference, aligned), batch)
        numbers |= {
            "connectivity/moved": float(alignment.moved),
            "connectivity/barrier": before.barrier,
            "connectivity/barrier_aligned": after.barrier,
            "connectivity/area": before.area,
            "connectivity/area_aligned": after.area,
            **{f"connectivity/{name}_middle": float(values[len(values) // 2]) for name, values in accuracies.items()},
            **{f"connectivity/{name}_middle_aligned": float(v[len(v) // 2]) for name, v in aligned_accuracies.items()},
        }
        has_layers = bool(layer_neurons(step.module, theirs))
        for name, distance in (neuron_distances(step.module, third, theirs) if has_layers else {}).items():
            numbers[f"connectivity/wasserstein/{name}"] = distance.wasserstein
            numbers[f"connectivity/energy/{name}"] = distance.energy
            numbers[f"connectivity/paired/{name}"] = distance.paired
        name_of_other = "previous" if self.reference is None else "reference"
        shares = next(zip(accuracies.values(), aligned_accuracies.values(), strict=True), None)
        self._drawn["connectivity/path"] = partial(
            path_figure, before.alphas, before.losses, after.losses, None, self.task, name_of_other, shares
        )
        if trainer.loggers and is_plane(theirs, ours, third):
            # What is no parameter, such as running variances, has no place in a distance of the weights.
            plane = loss_plane(
                theirs, ours, third, lambda one: step.mean({**weights, **one}, [batch])[0], points=_PLANE
            )
            self._drawn["connectivity/plane"] = partial(plane_figure, plane, (name_of_other, "new", "aligned"))
        return self._named(numbers)

    @property
    @override
    def state_key(self) -> str:
        """Tell monitors with a reference and without one apart, of which a Trainer may have both."""
        return self._generate_state_key(reference=self.reference is not None, every_n_epochs=self.every_n_epochs)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far, and the network that the task began with."""
        return {**super().state_dict(), "begun": self._begun, "at_start": self._at_start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        super().load_state_dict(state_dict)
        self._begun, self._at_start = state_dict["begun"], state_dict["at_start"]

    @override
    def _figures(self) -> Mapping[str, Callable[[], Figure]]:
        return self._named(self._drawn)

    def _named(self, found: Mapping[str, T]) -> dict[str, T]:
        """Return tags that tell a given reference from the network that the task began with, for a Trainer may watch both."""
        prefix = "connectivity/" if self.reference is None else "connectivity_reference/"
        return {prefix + tag.removeprefix("connectivity/"): value for tag, value in found.items()}


def _along(step: StepLoss, path: LinearPath, batch: Any) -> tuple[PathLosses, dict[str, Tensor]]:
    """Return the losses along a path, and whatever accuracies ``training_step`` logs."""
    logged: list[dict[str, float]] = []

    def loss(weights: Mapping[str, Tensor]) -> Tensor:
        value, numbers = step.mean(weights, [batch])
        logged.append(numbers)
        return value

    losses = path.losses(loss)
    names = [name for name in logged[0] if "acc" in name]
    return losses, {name: torch.tensor([numbers[name] for numbers in logged]) for name in names}


def _parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name, _ in module.named_parameters()}


def _dimensions(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the effective dimension of every layer's neurons, and the width that the theory bounds where it speaks of such networks."""
    clouds = layer_neurons(module, weights)
    dimensions = {name: effective_dimension(points) for name, points in clouds.items() if len(points) > 1}
    found = {f"connectivity/effective_dimension/{name}": dimension for name, dimension in dimensions.items()}
    if all(isinstance(part, _COVERED) for part in module.modules() if _is_layer(part)):
        hidden = [name for name in list(clouds)[:-1] if name in dimensions]
        found |= {f"connectivity/log10_width_bound/{name}": width_bound(dimensions[name], _ERROR) for name in hidden}
    return found


def _is_layer(part: nn.Module) -> bool:
    """Return whether a module computes something of the network by itself."""
    return not isinstance(part, Metric | _Loss) and not any(True for _ in part.children())
