"""What may be permuted in a network, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn


@dataclass(frozen=True, order=True)
class Axis:
    """Entries along one dimension of one tensor, read as a row-major product ``(before, group size, after)``.

    A permutation of the group moves the middle factor. ``before`` and ``after`` are 1 for an ordinary neuron axis; a flattened feature map
    has ``after = H * W``, attention heads have ``after = head_dim``, the gates of an LSTM ``before = 4``. The entries lie at
    ``start + step * k`` along the dimension: where dimensions are concatenated, each part has a ``start``; where they are interleaved
    (shuffled), a ``step``. ``length`` is the length of the dimension where these entries do not fill it.
    """

    tensor: str
    dim: int
    before: int = 1
    after: int = 1
    start: int = 0
    step: int = 1
    length: int | None = None

    def entries(self, size: int) -> Tensor:
        """Return where the entries of a group of this size lie along the dimension, as a LongTensor ``(before, size, after)``."""
        return self.start + self.step * torch.arange(self.before * size * self.after).view(
            self.before, size, self.after
        )

    def __str__(self) -> str:
        """Return ``tensor[dim]``, the key under which `PermutationSpec.fixed` speaks of an axis."""
        return f"{self.tensor}[{self.dim}]"


@dataclass(frozen=True)
class Group:
    """Neurons, channels or heads that must move together: ``size`` of them, along every axis in ``axes``."""

    name: str
    size: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class PermutationSpec:
    """The permutation symmetries of a network.

    Attributes:
        groups: Permutation groups by name.
        fixed: Why an axis cannot move, by ``"tensor[dim]"``.
    """

    groups: dict[str, Group] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)

    def validate(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that every axis of every group is there in ``tensors`` and has the size that the spec says.

        Raises:
            ValueError: If a tensor is missing, or a dimension is not ``before * size * after`` long.
        """
        for group in self.groups.values():
            for axis in group.axes:
                if axis.tensor not in tensors:
                    raise ValueError(f"Group {group.name!r} moves {axis}, but there is no tensor {axis.tensor!r}.")
                shape = tuple(tensors[axis.tensor].shape)
                entries = axis.before * group.size * axis.after
                expected = axis.length or entries
                if axis.dim >= len(shape) or shape[axis.dim] != expected:
                    raise ValueError(
                        f"Group {group.name!r} expects dimension {axis.dim} of {axis.tensor!r} to be {expected} long "
                        f"({entries} entries: before {axis.before} * size {group.size} * after {axis.after}), but its shape is {shape}."
                    )

    def coverage(self, model: nn.Module) -> float:
        """Return the share of a module's parameter elements that lie on at least one movable axis."""
        moved: dict[str, dict[int, Tensor]] = {}
        parameters = dict(model.named_parameters())
        for group in self.groups.values():
            for axis in group.axes:
                if axis.tensor in parameters:
                    length = parameters[axis.tensor].shape[axis.dim]
                    mask = moved.setdefault(axis.tensor, {}).setdefault(axis.dim, torch.zeros(length, dtype=torch.bool))
                    mask[axis.entries(group.size).flatten()] = True
        held = {name: prod(1 - float(mask.double().mean()) for mask in dims.values()) for name, dims in moved.items()}
        total = sum(parameter.numel() for parameter in parameters.values())
        return 1 - sum(p.numel() * held.get(name, 1.0) for name, p in parameters.items()) / total if total else 0.0
