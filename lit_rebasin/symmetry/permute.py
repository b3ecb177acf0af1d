"""Apply permutations or soft plans to the weights of a network."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from lit_rebasin.symmetry.spec import Axis, PermutationSpec, tensors_of

Module = TypeVar("Module", bound=nn.Module)

# Entries of a wrong permutation that its error shows.
_SHOWN = 8


@overload
def permute(source: Module, spec: PermutationSpec, permutations: Mapping[str, Tensor]) -> Module: ...
@overload
def permute(
    source: Mapping[str, Tensor], spec: PermutationSpec, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]: ...
def permute(source: Any, spec: PermutationSpec, permutations: Mapping[str, Tensor]) -> Any:
    """Return the permuted network; the given one is not written to.

    ``w_new = w.index_select(dim, p)`` along every axis of a group for a permutation ``p``, or ``w_new = P @ w`` along it for a plan ``P``
    (Pena et al., CVPR 2023: ``W_l' = P_l W_l P_{l-1}^T``). Of a mapping, differentiable in the tensors and the plans.

    Args:
        source: A module, or its weights by name, such as a state dict.
        spec: The symmetries of the network.
        permutations: By group name, a LongTensor ``(size,)`` or a floating-point plan ``(size, size)``. Groups left out stay as they are.

    Returns:
        A new module, or a new dict with the names of ``source`` in which tensors that no group moves are passed on as they are.

    Raises:
        TypeError: If ``source`` is neither a module nor a mapping, or ``permutations`` is no mapping of tensors.
        ValueError: If a group is unknown, an entry is neither a permutation nor a plan of the group's size, a tensor that must move is
            missing or of another shape, or a plan meets a tensor of integers.
    """
    if not isinstance(permutations, Mapping):
        raise TypeError(f"permutations must be tensors by group name, got a {type(permutations).__name__}.")
    if not isinstance(source, nn.Module | Mapping):
        raise TypeError(f"permute needs a module or its weights by name, got a {type(source).__name__}.")
    if isinstance(source, nn.Module):
        with torch.no_grad():
            return _copy_with(source, _permuted(tensors_of(source), spec, permutations))
    return _permuted(dict(source), spec, permutations)


def _copy_with(model: Module, moved: dict[str, Tensor]) -> Module:
    """Return a copy of a module with other weights; tied ones stay tied."""
    # Pruning and the old weight_norm keep a computed weight, which torch does not copy, and compute it anew at each call.
    computed = [value for part in model.modules() for value in vars(part).values() if _is_computed(value)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    for name, tensor in tensors_of(model).items():
        value = moved[name] if moved[name] is not tensor else tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
    return copy.deepcopy(model, memo)


def _is_computed(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_leaf


def _permuted(
    tensors: dict[str, Tensor], spec: PermutationSpec, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]:
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
    chosen: Tensor = tensor.index_select(axis.dim, index).unflatten(axis.dim, (axis.before, size, axis.after))
    return chosen.movedim(axis.dim + 1, 0)


def invert(permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the permutations that undo the given ones."""
    return {name: permutation.argsort() for name, permutation in permutations.items()}


def compose(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the permutations that do what ``first`` and then ``second`` do; a group in one of them only is taken from that one.

    Raises:
        ValueError: If the two permute a group of different sizes.
    """
    for name in set(first) & set(second):
        if len(first[name]) != len(second[name]):
            raise ValueError(
                f"Group {name!r} has {len(first[name])} neurons in first, and {len(second[name])} in second."
            )
    both = {name: first[name][second[name]] for name in first if name in second}
    return {**first, **second, **both}


def _check_entry(name: str, permutation: Tensor, size: int) -> None:
    if not isinstance(permutation, Tensor):
        raise TypeError(f"permutations[{name!r}] must be a tensor, got a {type(permutation).__name__}.")
    if permutation.ndim == 1 and not permutation.is_floating_point():
        if not torch.equal(permutation.sort().values.cpu(), torch.arange(size)):
            shown = ", ".join(map(str, permutation[:_SHOWN].tolist())) + ", ..." * (len(permutation) > _SHOWN)
            raise ValueError(
                f"permutations[{name!r}] must hold each of 0 .. {size - 1} once, got {len(permutation)} entries: [{shown}]."
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
