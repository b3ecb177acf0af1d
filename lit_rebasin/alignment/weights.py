"""Weight matching: permute a model's neurons onto those of a reference by their weights alone."""

from collections.abc import Callable, Mapping
from itertools import chain
from time import perf_counter

import torch
from torch import Tensor

from lit_rebasin.alignment.agreement import (
    TOLERANCE,
    agreement,
    averaged,
    balanced,
    bound,
    cosine_cost,
    exact,
    gain,
    is_quadratic,
    moved,
    nested_groups,
    restrict,
)
from lit_rebasin.alignment.costs import check_same_architecture, l2_cost
from lit_rebasin.alignment.progress import shown
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.symmetry import Group, PermutationSpec, permute
from lit_rebasin.transport import assignment
from lit_rebasin.transport.arguments import check_count

# Bound on the steps of a Frank-Wolfe search, as in SciPy.
_MAX_STEPS = 30


def weight_matching(
    model: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    spec: PermutationSpec,
    *,
    init: Mapping[str, Tensor] | None = None,
    normalize: bool = True,
    restarts: int = 0,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Alignment:
    """Find permutations that maximise how well the weights agree, ``sum_l <W_l^ref, P_l W_l P_{l-1}^T>``, by coordinate descent.

    Each step moves one group with all others held; groups are visited in random order until a sweep improves none (Git Re-Basin, Ainsworth et
    al., ICLR 2023, algorithm 1). Where a group lies on one dimension of each tensor, its step is exact, by linear assignment. Where it lies on
    two, as in the ``P W P^T`` of a recurrent layer, the problem is a quadratic assignment and its step a Frank-Wolfe search (Vogelstein et
    al., PLoS ONE 2015), which may end in a local optimum. No step is taken that does not improve. Computed in float64 on the CPU.

    Args:
        model: Parameters by name. Statistics, such as running variances, do not belong here: their scale would drown the weights.
        reference: The parameters that stay put, of the same names and shapes.
        spec: The symmetries of the network; axes of tensors that are not in ``model`` play no part.
        init: The permutations to start from, by group name. Default: the better end of two starts, the identity, and one that prefers no
            permutation, in which every group is first matched with those that are still to come averaged out.
        normalize: Whether every layer (all tensors of one module) counts by its cosine, whatever the size of its weights. Not so in the paper.
        restarts: How often to start again from random permutations; the best of all is returned.
        seed: Seed of the order of the groups and of the restarts.
        max_sweeps: Bound on the sweeps over all groups, of each start.

    Returns:
        The alignment, never worse than ``init``, or the identity. Its cost is the mean over the layers of one less their cosine, or if
        ``normalize`` is off the mean squared difference of :func:`~lit_rebasin.alignment.costs.l2_cost`. Its history has one entry for the
        start and one a sweep; of every further start, one more with the least cost so far.

    Raises:
        ValueError: If the two models differ in names or shapes, or a number is out of range.
    """
    check_count("restarts", restarts, 0)
    check_count("max_sweeps", max_sweeps)
    started = perf_counter()
    check_same_architecture(model, reference)
    ours, theirs = exact(model), exact(reference)
    spec = restrict(spec, ours)
    weighed = balanced(ours, theirs) if normalize else theirs
    cost = cosine_cost if normalize else lambda one, other: float(l2_cost(one, other))
    generator = torch.Generator().manual_seed(seed)
    start = {**spec.identity(), **(init or {})}
    permutations, history, converged = coordinate_ascent(ours, weighed, spec, start, cost, generator, max_sweeps)
    drawn = (spec.random(generator=generator) for _ in range(restarts))
    for other in chain([] if init is not None else [_unprejudiced(ours, weighed, spec, generator)], drawn):
        found, costs, ended = coordinate_ascent(ours, weighed, spec, other, cost, generator, max_sweeps)
        if costs[-1] < history[-1]:
            permutations, converged = found, ended
        history.append(min(costs[-1], history[-1]))
    return Alignment(permutations, history[-1], history, "weights", converged, perf_counter() - started)


def _unprejudiced(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], spec: PermutationSpec, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return a start for which every group is matched once, in random order, with those that are still to come averaged out.

    Where one group touches many tensors, as a residual stream does, it would otherwise be matched to the noise of all others at the start.
    """
    permutations, waiting = spec.identity(), {name: group for name, group in spec.groups.items() if group.axes}
    names = list(waiting)
    for index in torch.randperm(len(names), generator=generator).tolist():
        group = waiting.pop(names[index])
        local = {axis.tensor: ours[axis.tensor] for axis in group.axes}
        for other in waiting.values():
            local = averaged(local, other)
        step = _best_step(local, theirs, group)
        permutations[group.name], ours = step, moved(ours, group, step)
    return permutations


def coordinate_ascent(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    spec: PermutationSpec,
    start: Mapping[str, Tensor],
    cost: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float],
    generator: torch.Generator,
    max_sweeps: int,
) -> tuple[dict[str, Tensor], list[float], bool]:
    """Return permutations that no step of one group improves, the cost at the start and after each sweep, and whether a sweep improved none."""
    permutations = dict(start)
    ours = permute(ours, spec, permutations)
    history = [cost(ours, theirs)]
    groups = [group for group in spec.groups.values() if group.axes]
    nested = nested_groups(spec)
    for _ in shown(range(max_sweeps), "Weight matching"):
        converged = True
        order = torch.randperm(len(groups), generator=generator).tolist()
        for index in shown(order, f"Weight matching, sweep {len(history)}", len(order)):
            group, inside = groups[index], nested[groups[index].name]
            for move in (_own_move, _joint_move) if inside else (_own_move,):
                steps = move(ours, theirs, group, inside)
                candidate, improvement, least = ours, 0.0, 0.0
                for some, step in steps:
                    before, candidate = candidate, moved(candidate, some, step)
                    improvement += float(agreement(candidate, theirs, some) - agreement(before, theirs, some))
                    least += TOLERANCE * bound(ours, theirs, some)
                if improvement > least:
                    for some, step in steps:
                        permutations[some.name] = permutations[some.name][step]
                    ours = candidate
                    converged = False
        history.append(cost(ours, theirs))
        if converged:
            break
    return permutations, history, converged


def _own_move(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], group: Group, nested: list[Group]
) -> list[tuple[Group, Tensor]]:
    """Return the best step of one group."""
    return [(group, _best_step(ours, theirs, group))]


def _joint_move(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], group: Group, nested: list[Group]
) -> list[tuple[Group, Tensor]]:
    """Return a step of a group with the groups that it is nested with averaged out, and then theirs.

    Heads can only be told apart once their features are in order, and the other way round.
    """
    blurred = ours
    for other in nested:
        blurred = averaged(blurred, other)
    steps = [(group, _best_step(blurred, theirs, group))]
    ours = moved(ours, *steps[0])
    for other in nested:
        steps.append((other, _best_step(ours, theirs, other)))
        ours = moved(ours, *steps[-1])
    return steps


def _best_step(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return the permutation of one group that makes the weights agree best, others held."""
    if is_quadratic(group):
        return _frank_wolfe(ours, theirs, group)
    return assignment(gain(ours, theirs, group, torch.eye(group.size, dtype=torch.float64)))


def _frank_wolfe(model: Mapping[str, Tensor], reference: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return a permutation of a group near a local maximum of the agreement over doubly stochastic plans."""
    corners = torch.eye(group.size, dtype=torch.float64)
    plan = corners
    for _ in range(_MAX_STEPS):
        gradient = gain(model, reference, group, plan)
        direction = corners[assignment(gradient)] - plan
        slope = float((gradient * direction).sum())
        if slope <= TOLERANCE * bound(model, reference, group):
            break
        # Along the direction the agreement is a + slope * t + curvature * t^2.
        start, end = (agreement(moved(model, group, p), reference, group) for p in (plan, plan + direction))
        curvature = float(end - start) - slope
        plan = plan + slope / max(-2 * curvature, slope) * direction
    return assignment(plan)
