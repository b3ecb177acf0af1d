"""Weight matching: permute a model's neurons onto those of a reference by their weights alone."""

from collections.abc import Mapping
from time import perf_counter

import torch
from torch import Tensor

from lit_rebasin.alignment.costs import check_same_architecture, l2_cost
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.symmetry import Group, PermutationSpec, neurons, permute
from lit_rebasin.transport import assignment


def weight_matching(
    model: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    spec: PermutationSpec,
    *,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Alignment:
    """Find permutations that maximise ``sum_l <W_l^ref, P_l W_l P_{l-1}^T>`` by coordinate descent.

    Each step solves one group exactly, by linear assignment with all others held; groups are visited in random order until a sweep improves
    none (Git Re-Basin, Ainsworth et al., ICLR 2023, algorithm 1). Starts at the identity and never gets worse than it.

    Args:
        model: Parameters by name. Statistics, such as running variances, do not belong here: their scale would drown the weights.
        reference: The parameters that stay put, of the same names and shapes.
        spec: The symmetries of the network; axes of tensors that are not in ``model`` play no part.
        seed: Seed of the order of the groups.
        max_sweeps: Bound on the sweeps over all groups.

    Returns:
        The alignment; its cost is the mean squared difference of :func:`~lit_rebasin.alignment.costs.l2_cost`.

    Raises:
        ValueError: If the two models differ in names or shapes.
    """
    started = perf_counter()
    check_same_architecture(model, reference)
    spec = restrict(spec, model)
    generator = torch.Generator().manual_seed(seed)
    permutations = spec.identity()
    history = [float(l2_cost(model, reference))]
    names = list(spec.groups)
    converged = False
    for _ in range(max_sweeps):
        converged = True
        for index in torch.randperm(len(names), generator=generator).tolist():
            name = names[index]
            others = {other: p for other, p in permutations.items() if other != name}
            gain = similarity(permute(model, spec, others), reference, spec.groups[name])
            best = assignment(gain)
            rows = torch.arange(len(best))
            improvement = float((gain[rows, best] - gain[rows, permutations[name]]).sum())
            if improvement > 1e-6 * max(1.0, float(gain.abs().max())):
                permutations[name] = best
                converged = False
        history.append(float(l2_cost(permute(model, spec, permutations), reference)))
        if converged:
            break
    return Alignment(permutations, history[-1], history, "weights", converged, perf_counter() - started)


def restrict(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> PermutationSpec:
    """Return the spec without the axes of tensors that are not there; groups keep their names."""
    groups = {
        name: Group(name, group.size, tuple(axis for axis in group.axes if axis.tensor in tensors))
        for name, group in spec.groups.items()
    }
    return PermutationSpec(groups, spec.fixed)


def similarity(model: Mapping[str, Tensor], reference: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return ``(size, size)`` on the CPU in float64: inner products of each reference neuron with each model neuron, over all its axes."""
    gain = torch.zeros(group.size, group.size, dtype=torch.float64)
    for axis in group.axes:
        ours, theirs = (
            neurons(weights[axis.tensor].detach(), axis, group.size).reshape(group.size, -1).to("cpu", torch.float64)
            for weights in (model, reference)
        )
        gain += theirs @ ours.T
    return gain
