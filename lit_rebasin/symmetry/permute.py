"""Apply permutations or soft plans to the weights of a network."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_rebasin.symmetry.spec import Axis, PermutationSpec


def permute(
    tensors: Mapping[str, Tensor], spec: PermutationSpec, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of the permuted network; the given ones are not written to.

    ``w_new = w.index_select(dim, p)`` along every axis of a group for a permutation ``p``, or ``w_new = P @ w`` along it for a plan ``P``
    (Pena et al., CVPR 2023: ``W_l' = P_l W_l P_{l-1}^T``). Differentiable in the tensors and the plans.

    Args:
        tensors: Weights by name, such as a state dict.
        spec: The symmetries of the network.
        permutations: By group name, a LongTensor ``(size,)`` or a floating-point plan ``(size, size)``. Groups left out stay as they are.

    Returns:
        A new dict with the names of ``tensors``; tensors that no group moves are passed on as they are.

    Raises:
        ValueError: If a group is unknown, an entry is neither a permutation nor a plan of the group's size, a tensor that must move is
            missing or of another shape, or a plan meets a tensor of integers.
    """
    spec.validate(tensors)
    unknown = sorted(set(permutations) - set(spec.groups))
    if unknown:
        raise ValueError(f"permutations names unknown groups {unknown}; the spec has {sorted(spec.groups)}.")
    indices: dict[tuple[str, int], Tensor] = {}
    plans: list[tuple[Axis, Tensor]] = []
    for name, permutation in permutations.items():
        group = spec.groups[name]
        _check_entry(name, permutation, group.size)
        for axis in group.axes:
            if permutation.ndim == 2:
                plans.append((axis, permutation))
            else:
                key = axis.tensor, axis.dim
                index = indices.setdefault(key, torch.arange(tensors[axis.tensor].shape[axis.dim]))
                indices[key] = index[_index(axis, permutation.cpu(), len(index))]
    moved = dict(tensors)
    for (tensor, dim), index in indices.items():
        moved[tensor] = moved[tensor].index_select(dim, index.to(moved[tensor].device))
    for axis, plan in plans:
        moved[axis.tensor] = _mix(moved[axis.tensor], axis, plan)
    return moved


def _index(axis: Axis, permutation: Tensor, length: int) -> Tensor:
    """Return the permutation of the whole dimension that a permutation of the group is."""
    entries = axis.entries(len(permutation))
    index = torch.arange(length)
    index[entries.flatten()] = entries[:, permutation].flatten()
    return index


def neurons(tensor: Tensor, axis: Axis, size: int) -> Tensor:
    """Return what each neuron of a group has along an axis, ``(size, ...)``."""
    index = axis.entries(size).flatten().to(tensor.device)
    return (
        tensor.index_select(axis.dim, index)
        .unflatten(axis.dim, (axis.before, size, axis.after))
        .movedim(axis.dim + 1, 0)
    )


def invert(permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the permutations that undo the given ones."""
    return {name: permutation.argsort() for name, permutation in permutations.items()}


def identity(spec: PermutationSpec) -> dict[str, Tensor]:
    """Return the permutation of every group that leaves the network as it is."""
    return {name: torch.arange(group.size) for name, group in spec.groups.items()}


def _check_entry(name: str, permutation: Tensor, size: int) -> None:
    if permutation.ndim == 1 and not permutation.is_floating_point():
        if not torch.equal(permutation.sort().values.cpu(), torch.arange(size)):
            raise ValueError(
                f"permutations[{name!r}] must hold each of 0 .. {size - 1} once, got {permutation.tolist()}."
            )
    elif not (permutation.is_floating_point() and tuple(permutation.shape) == (size, size)):
        raise ValueError(
            f"permutations[{name!r}] must be a LongTensor of shape ({size},) or a floating-point plan of shape ({size}, {size}), "
            f"got {permutation.dtype} of shape {tuple(permutation.shape)}."
        )


def _mix(tensor: Tensor, axis: Axis, plan: Tensor) -> Tensor:
    """Apply a plan along one axis of one tensor."""
    if not tensor.is_floating_point():
        raise ValueError(f"A plan cannot mix {axis.tensor!r}, a tensor of {tensor.dtype}; give a permutation instead.")
    plan = plan.to(tensor.device, tensor.dtype)
    ours = neurons(tensor, axis, len(plan))
    mixed = (plan @ ours.reshape(len(plan), -1)).view_as(ours).movedim(0, axis.dim + 1).flatten(axis.dim, axis.dim + 2)
    return tensor.index_copy(axis.dim, axis.entries(len(plan)).flatten().to(tensor.device), mixed)
