"""How well permuted weights agree with a reference, ``sum_l <W_l^ref, P_l W_l P_{l-1}^T>``, and how that changes with a permutation."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lit_rebasin.symmetry import Axis, Group, PermutationSpec, neurons, permute

# The least gain that counts, as a share of the largest that norms of this size allow: well above the rounding of float64.
TOLERANCE = 1e-9


def restrict(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> PermutationSpec:
    """Return the spec without the axes of tensors that are not there; groups keep their names."""
    groups = {
        name: Group(name, group.size, tuple(axis for axis in group.axes if axis.tensor in tensors))
        for name, group in spec.groups.items()
    }
    return PermutationSpec(groups, spec.fixed)


def exact(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is of floating point in float64 on the CPU."""
    return {name: t.detach().to("cpu", torch.float64) for name, t in weights.items() if t.is_floating_point()}


def is_quadratic(group: Group) -> bool:
    """Return whether a group moves two dimensions of one tensor."""
    return len({(axis.tensor, axis.dim) for axis in group.axes}) > len({axis.tensor for axis in group.axes})


def nested_groups(spec: PermutationSpec) -> dict[str, list[Group]]:
    """Return, by the name of each group, the others that move a dimension of a tensor that it moves, as heads and their features do."""
    places = {name: {(axis.tensor, axis.dim) for axis in group.axes} for name, group in spec.groups.items()}
    return {
        name: [group for other, group in spec.groups.items() if other != name and places[other] & places[name]]
        for name in spec.groups
    }


def gain(model: Mapping[str, Tensor], reference: Mapping[str, Tensor], group: Group, plan: Tensor) -> Tensor:
    """Return ``(size, size)``, the gradient of the agreement at a plan.

    By the product rule: the inner products of each reference neuron with each model neuron along every axis, where the plan has moved the
    other axes of the same tensor.
    """
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for axis in group.axes:
        others = tuple(other for other in group.axes if other.tensor == axis.tensor and other != axis)
        weights = moved({axis.tensor: model[axis.tensor]}, Group(group.name, group.size, others), plan)
        ours, theirs = (neurons(some[axis.tensor], axis, group.size).flatten(1) for some in (weights, reference))
        total += theirs @ ours.T
    return total


def moved(weights: Mapping[str, Tensor], group: Group, permutation: Tensor) -> dict[str, Tensor]:
    """Return the weights with one group permuted, or mixed by a plan."""
    return permute(weights, PermutationSpec({group.name: group}), {group.name: permutation})


def averaged(weights: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Return the weights with every neuron of a group replaced by the mean of all; tensors that are not there play no part."""
    found = dict(weights)
    for axis in group.axes:
        if axis.tensor in found:
            tensor = found[axis.tensor]
            values = neurons(tensor, axis, group.size)
            mean = values.mean(0, keepdim=True).expand_as(values).movedim(0, axis.dim + 1)
            entries = axis.entries(group.size).flatten()
            found[axis.tensor] = tensor.index_copy(axis.dim, entries, mean.flatten(axis.dim, axis.dim + 2))
    return found


def agreement(model: Mapping[str, Tensor], reference: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return the inner product of two models over the tensors of a group, which the matching maximises."""
    names = {axis.tensor for axis in group.axes}
    return torch.stack([(model[name] * reference[name]).sum() for name in sorted(names)]).sum()


def bound(model: Mapping[str, Tensor], reference: Mapping[str, Tensor], group: Group) -> float:
    """Return the largest agreement that weights of these norms could have."""
    names = {axis.tensor for axis in group.axes}
    return sum(float(model[name].norm() * reference[name].norm()) for name in names)


def balanced(model: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the reference such that its agreement with the model is the sum of the cosines of the layers.

    Else the layers with the largest weights decide, although a ReLU network can move scale from one layer to another. A layer is all tensors of
    one module. One that is zero in either network has no cosine, and is left out.

    Args:
        model: Weights, float64.
        reference: Weights of the same names and shapes.
    """
    scales: dict[str, float] = {}
    for names in _layers(reference):
        ours, theirs = (sum(float(some[name].square().sum()) for name in names) for some in (model, reference))
        scales |= dict.fromkeys(names, 1 / (ours * theirs) ** 0.5 if ours > 0 and theirs > 0 else 0.0)
    return {name: scales[name] * tensor for name, tensor in reference.items()}


def in_units(models: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return several models with every layer divided by the root mean square of its norms; one that is zero stays."""
    scales: dict[str, float] = {}
    for names in _layers(models[0]):
        squares = sum(float(model[name].square().sum()) for model in models for name in names) / len(models)
        scales |= dict.fromkeys(names, squares**-0.5 if squares > 0 else 1.0)
    return [{name: scales[name] * tensor for name, tensor in model.items()} for model in models]


def _layers(names: Iterable[str]) -> list[list[str]]:
    """Return the names of tensors by the module that they belong to."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return list(layers.values())


def cosine_cost(model: Mapping[str, Tensor], weighed: Mapping[str, Tensor]) -> float:
    """Return the mean over the layers of one less their cosine; 0 if no layer has one.

    Args:
        model: Weights.
        weighed: The reference as `balanced` returns it.
    """
    layers = {name.rpartition(".")[0] for name, tensor in weighed.items() if tensor.any()}
    total = sum(float((model[name] * tensor).sum()) for name, tensor in weighed.items())
    return 1 - total / len(layers) if layers else 0.0


def joint_gain(
    model: Mapping[str, Tensor], reference: Mapping[str, Tensor], spec: PermutationSpec, plans: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return by group the gradient ``(size, size)`` of the agreement at plans, or permutations, of all groups together.

    As :func:`gain`, but each other axis of a tensor is moved by the plan of its own group.
    """
    total = {name: torch.zeros(group.size, group.size, dtype=torch.float64) for name, group in spec.groups.items()}
    for tensor, located in _axes_by_tensor(spec).items():
        for place, (name, axis) in enumerate(located):
            others = located[:place] + located[place + 1 :]
            weights = {tensor: model[tensor]}
            for other, along in others:
                weights = moved(weights, Group(other, spec.groups[other].size, (along,)), plans[other])
            size = spec.groups[name].size
            ours, theirs = (neurons(some[tensor], axis, size).flatten(1) for some in (weights, reference))
            total[name] += theirs @ ours.T
    return total


def joint_degree(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> int:
    """Return the degree of the agreement along a line of plans of all groups: how many axes meet in one entry of a tensor, at most."""
    largest = 0
    for tensor, located in _axes_by_tensor(spec).items():
        meeting = [torch.zeros(length, dtype=torch.long) for length in tensors[tensor].shape]
        for name, axis in located:
            meeting[axis.dim][axis.entries(spec.groups[name].size).flatten()] += 1
        largest = max(largest, sum(int(count.max()) for count in meeting if len(count)))
    return largest


def _axes_by_tensor(spec: PermutationSpec) -> dict[str, list[tuple[str, Axis]]]:
    """Return, for each tensor, its axes that move, with the names of their groups."""
    found: dict[str, list[tuple[str, Axis]]] = {}
    for name, group in spec.groups.items():
        for axis in group.axes:
            found.setdefault(axis.tensor, []).append((name, axis))
    return found
