"""What may be permuted in a network, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, order=True)
class Axis:
    """One dimension of one tensor, read as a row-major product ``(before, group size, after)``.

    A permutation of the group moves the middle factor. ``before`` and ``after`` are 1 for an ordinary neuron axis; a flattened feature map
    has ``after = H * W``, a packed query-key-value projection ``before = 3``.
    """

    tensor: str
    dim: int
    before: int = 1
    after: int = 1

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
                expected = axis.before * group.size * axis.after
                if axis.dim >= len(shape) or shape[axis.dim] != expected:
                    raise ValueError(
                        f"Group {group.name!r} expects dimension {axis.dim} of {axis.tensor!r} to be {expected} long "
                        f"(before {axis.before} * size {group.size} * after {axis.after}), but its shape is {shape}."
                    )
