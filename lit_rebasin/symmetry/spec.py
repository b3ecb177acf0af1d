"""What may be permuted in a network, as plain data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

# Why the axes of a tensor that a trace does not meet are fixed.
UNREAD = "not used in the forward pass"


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

    def identity(self) -> dict[str, Tensor]:
        """Return the permutation of every group that leaves the network as it is."""
        return {name: torch.arange(group.size) for name, group in self.groups.items()}

    def random(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return a random permutation of every group, drawn from ``generator`` (torch's own by default)."""
        return {name: torch.randperm(group.size, generator=generator) for name, group in self.groups.items()}

    def to_json(self) -> str:
        """Return the spec as text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the spec that `to_json` wrote.

        Raises:
            ValueError: If the text is not such a spec.
        """
        try:
            data = json.loads(text)
            groups = [
                Group(g["name"], _whole("size", g["size"], 1), tuple(_axis(axis) for axis in g["axes"]))
                for g in data["groups"].values()
            ]
            return cls(
                {group.name: group for group in groups}, {str(axis): str(why) for axis, why in data["fixed"].items()}
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"text is not a PermutationSpec as to_json writes it: {error!r}") from error

    @classmethod
    def from_axes(cls, axes: Mapping[str, Sequence[str | None]], tensors: nn.Module | Mapping[str, Tensor]) -> Self:
        """Write a spec by hand, in the form of git-re-basin: for each tensor, the group along each of its dimensions.

        Such as ``PermutationSpec.from_axes({"0.weight": ("hidden", None), "0.bias": ("hidden",), "2.weight": (None, "hidden")}, model)``.

        Args:
            axes: By tensor name, a group name for each dimension, or None where nothing moves. Tensors left out do not move.
            tensors: The module, or its state dict, which gives the sizes.

        Returns:
            The spec; check it with `check_invariance`.

        Raises:
            ValueError: If a tensor is missing, has another number of dimensions, or a group would have two sizes.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(tensors).items()}
        found: dict[str, list[Axis]] = {}
        sizes: dict[str, int] = {}
        for tensor, groups in axes.items():
            shape = shapes.get(tensor)
            if shape is None or isinstance(groups, str) or len(groups) != len(shape):
                there = f"has shape {shape}" if shape is not None else f"is not among {sorted(shapes)}"
                raise ValueError(
                    f"axes[{tensor!r}] is {groups!r}, one group or None a dimension, but the tensor {there}."
                )
            for dim, group in enumerate(groups):
                if group is not None and sizes.setdefault(group, shape[dim]) != shape[dim]:
                    raise ValueError(
                        f"Group {group!r} has size {sizes[group]}, but {tensor}[{dim}] is {shape[dim]} long."
                    )
                if group is not None:
                    found.setdefault(group, []).append(Axis(tensor, dim))
        every = {f"{tensor}[{dim}]" for tensor, shape in shapes.items() for dim in range(len(shape))}
        held = every - {str(axis) for group in found.values() for axis in group}
        named = {name: Group(name, sizes[name], tuple(moved)) for name, moved in found.items()}
        return cls(named, dict.fromkeys(sorted(held), "held by hand"))

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


def tensors_of(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights and buffers by every name that they go by, or a mapping of them as a dict."""
    if isinstance(source, nn.Module):
        parameters, buffers = (
            source.named_parameters(remove_duplicate=False),
            source.named_buffers(remove_duplicate=False),
        )
        return {**dict(parameters), **dict(buffers)}
    return dict(source)


def _axis(fields: Mapping[str, Any]) -> Axis:
    """Return an axis read from JSON, which may hold anything."""
    axis = Axis(**fields)
    if not isinstance(axis.tensor, str):
        raise TypeError(f"tensor must be a name, got {axis.tensor!r}")
    for key, least in {"dim": 0, "before": 1, "after": 1, "start": 0, "step": 1}.items():
        _whole(key, getattr(axis, key), least)
    if axis.length is not None:
        _whole("length", axis.length, 1)
    return axis


def _whole(key: str, value: object, least: int) -> int:
    if type(value) is not int or value < least:  # true is an int too
        raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}")
    return value
