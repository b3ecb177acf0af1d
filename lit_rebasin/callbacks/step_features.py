"""What a LightningModule's training step computes on a batch, neuron by neuron."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.merging.path import weights_of
from lit_rebasin.symmetry import FeatureReader, Features, Group, PermutationSpec

# Where the module's tensors are in a module that runs its training step.
_PREFIX = "step.module."


class StepFeatures:
    """Reads the features of networks from the graph of ``training_step``, so that it may call them in any way.

    Use inside :meth:`StepLoss.quiet`.

    Args:
        step: The training step.
        spec: The symmetries of its module.
    """

    def __init__(self, step: StepLoss, spec: PermutationSpec) -> None:
        # A graph may know a tied weight by any of its names, the callback by the first.
        first = {id(tensor): name for name, tensor in reversed(_all_tensors(step.module))}
        self._names = {name: first[id(tensor)] for name, tensor in _all_tensors(step.module)}
        self.step, self.spec = step, self._prefixed(spec)
        self._readers: dict[str, FeatureReader] = {}

    def read(self, weights: Mapping[str, Tensor], batch: Any, averaged: Collection[str] = ()) -> Features:
        """Return the features of a network on one batch, in evaluation mode.

        Args:
            weights: Parameters and buffers of the module by name.
            batch: A training batch, on the device of the weights.
            averaged: Groups whose neurons are averaged over what else their dimension holds.

        Raises:
            ValueError: If the training step cannot be exported.
        """
        leaves, structure = pytree.tree_flatten(batch)
        key = repr(structure)
        if key not in self._readers:
            self._readers[key] = FeatureReader(_OfLeaves(self.step, structure), self.spec)
        held = {_PREFIX + name: weights[first] for name, first in self._names.items()}
        with self.step.silent():
            found = self._readers[key].read(held, tuple(leaves), averaged)
        layers: dict[str, list[Tensor]] = {}
        for name, values in found.layers.items():
            layers.setdefault(self._names[name.removeprefix(_PREFIX)], []).extend(values)
        return Features(found.groups, layers)

    def _prefixed(self, spec: PermutationSpec) -> PermutationSpec:
        groups = {}
        for name, group in spec.groups.items():
            axes = [
                replace(axis, tensor=_PREFIX + other)
                for axis in group.axes
                for other, first in self._names.items()
                if first == axis.tensor
            ]
            groups[name] = Group(name, group.size, tuple(axes))
        return PermutationSpec(groups, {})


def check_readable(step: StepLoss, spec: PermutationSpec, batch: Any) -> None:
    """Raise a MisconfigurationException where features cannot be read."""
    with step.quiet():
        try:
            StepFeatures(step, spec).read(weights_of(step.module), batch)
        except ValueError as error:
            raise MisconfigurationException(
                "The methods covariance and activations compare what networks compute in training_step, whose graph cannot be had: choose "
                f"another method for RebasinMerge. {error}"
            ) from error


class _OfLeaves(nn.Module):
    """A training step as a module whose inputs are the parts of a batch of any form."""

    def __init__(self, step: StepLoss, structure: pytree.TreeSpec) -> None:
        super().__init__()
        self.step, self.structure = step, structure

    def forward(self, *leaves: Any) -> Tensor:
        found: Tensor = self.step(pytree.tree_unflatten(list(leaves), self.structure))
        return found


def _all_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a module by every name that they go by."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
