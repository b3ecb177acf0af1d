"""Frank-Wolfe matching: the plans of all permutation groups climb the agreement of the weights together."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Generic, TypeVar

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from lit_rebasin.alignment.agreement import balanced, bound, cosine_cost, exact, joint_degree, joint_gain, restrict
from lit_rebasin.alignment.costs import check_same_architecture, l2_cost
from lit_rebasin.alignment.progress import shown
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.symmetry import PermutationSpec, permute
from lit_rebasin.transport import assignment
from lit_rebasin.transport.arguments import check_count

Key = TypeVar("Key", bound=Hashable)

# A climb has come to its end where no group could gain more than this share of what norms of its size allow.
_GAP = 1e-7


def frank_wolfe_matching(
    model: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    spec: PermutationSpec,
    *,
    init: Mapping[str, Tensor] | None = None,
    normalize: bool = True,
    max_steps: int = 200,
) -> Alignment:
    """Find permutations that maximise ``sum_l <W_l^ref, P_l W_l P_{l-1}^T>``, all groups at once.

    Frank-Wolfe over doubly stochastic plans (Crisostomi et al., NeurIPS 2024, here for two models): every step moves all plans towards the
    permutations that fit the gradient best, to the exact optimum along that line, where the agreement is a polynomial. It ends where no group
    alone could gain. Where plans come to rest between permutations, as they may for the ``P W P^T`` of a recurrent layer, another climb starts
    from the nearest ones. Computed in float64 on the CPU.

    Args:
        model: Parameters by name. Statistics, such as running variances, do not belong here: their scale would drown the weights.
        reference: The parameters that stay put, of the same names and shapes.
        spec: The symmetries of the network; axes of tensors that are not in ``model`` play no part.
        init: Permutations to start from, by group name; groups left out start at the identity. Default: even plans, ``1 / size`` everywhere,
            which prefer no permutation: they end no lower than the identity on average, and find a planted permutation in two steps.
        normalize: Whether every layer counts by its cosine, as in :func:`~lit_rebasin.weight_matching`.
        max_steps: Bound on the steps of one climb.

    Returns:
        The best permutations met, never worse than ``init``, or the identity. Their cost is the mean over the layers of one less their cosine,
        or if ``normalize`` is off the mean squared difference of :func:`~lit_rebasin.alignment.costs.l2_cost`; the history holds that of the
        start, and of the permutations at which each step aims.

    Raises:
        ValueError: If the two models differ in names or shapes, or ``init`` does not fit the spec.
    """
    started = perf_counter()
    check_count("max_steps", max_steps, 0)
    check_same_architecture(model, reference)
    ours, theirs = exact(model), exact(reference)
    theirs = balanced(ours, theirs) if normalize else theirs
    cost = cosine_cost if normalize else lambda one, other: float(l2_cost(one, other))
    start = {**spec.identity(), **(init or {})}
    moving = restrict(spec, ours)
    permute(ours, moving, start)  # raises for what does not fit, in groups that nothing here moves too
    moving = PermutationSpec({name: group for name, group in moving.groups.items() if group.axes})
    several, constant = _by_degree(ours, theirs, moving)
    objective = Objective(
        gradient=lambda plans: {
            name: constant[name] + varying for name, varying in joint_gain(ours, theirs, several, plans).items()
        },
        cost=lambda permutations: cost(permute(ours, moving, permutations), theirs),
        degree=joint_degree(moving, ours),
        bounds={name: bound(ours, theirs, group) for name, group in moving.groups.items()},
    )
    first = {name: start[name] for name in moving.groups}
    found = search(objective, first, even_plans(moving) if init is None else first, max_steps)
    return Alignment(
        {**start, **found.permutations},
        found.cost,
        found.history,
        "frank-wolfe",
        found.converged,
        perf_counter() - started,
    )


def _by_degree(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], spec: PermutationSpec
) -> tuple[PermutationSpec, dict[str, Tensor]]:
    """Return the spec of the tensors with several axes that move, and the gradient of all others, which is the same at all plans."""
    located = [axis.tensor for group in spec.groups.values() for axis in group.axes]
    several, one = (
        restrict(spec, {name: tensor for name, tensor in ours.items() if (located.count(name) > 1) == wanted})
        for wanted in (True, False)
    )
    return several, joint_gain(ours, theirs, one, {})


def even_plans(spec: PermutationSpec) -> dict[str, Tensor]:
    """Return for every group the plan ``(size, size)`` that is ``1 / size`` everywhere."""
    return {
        name: torch.full((group.size, group.size), 1 / group.size, dtype=torch.float64)
        for name, group in spec.groups.items()
    }


@dataclass(frozen=True)
class Objective(Generic[Key]):
    """What a climb maximises: a polynomial in plans by key, affine in each factor of each term.

    Attributes:
        gradient: Maps plans, or permutations, to the gradient ``(size, size)`` of each.
        cost: Maps permutations to a number that falls as the objective rises.
        degree: The degree of the objective along a line of plans.
        bounds: How large the share of each key in the objective could be, which sets the scale of its tolerance.
    """

    gradient: Callable[[Mapping[Key, Tensor]], dict[Key, Tensor]]
    cost: Callable[[Mapping[Key, Tensor]], float]
    degree: int
    bounds: Mapping[Key, float]


@dataclass(frozen=True)
class Found(Generic[Key]):
    """The best permutations of a search, their cost, the costs of all that were met, and whether the last climb came to its end."""

    permutations: dict[Key, Tensor]
    cost: float
    history: list[float]
    converged: bool


def search(
    objective: Objective[Key], first: Mapping[Key, Tensor], start: Mapping[Key, Tensor], max_steps: int
) -> Found[Key]:
    """Climb from a start, and then from the best permutations met until that brings nothing.

    Args:
        objective: What to maximise.
        first: Permutations by key, than which the result is never worse.
        start: Plans or permutations by key.
        max_steps: Bound on the steps of one climb.
    """
    cost = objective.cost(first)
    best = _better(Found(dict(first), cost, [cost], False), _climb(objective, start, max_steps))
    while True:
        before = best.cost
        best = _better(best, _climb(objective, best.permutations, max_steps))
        if not best.cost < before:
            return best


def _better(best: Found[Key], new: Found[Key]) -> Found[Key]:
    """Return the better of two, with the history of both and how the newer one ended."""
    chosen = new if new.cost < best.cost else best
    return Found(chosen.permutations, chosen.cost, best.history + new.history, new.converged)


def _climb(objective: Objective[Key], start: Mapping[Key, Tensor], max_steps: int) -> Found[Key]:
    """Climb from plans or permutations; return the best of the permutations that the steps aim at and of the nearest ones to the end.

    The gradient is a polynomial along each line too, of one degree less. So its values at as many points as the objective has degrees give
    the best point and the gradient there; one point is the permutations at the end of the line, whose gradient is cheap.
    """
    plans = {key: _as_plan(plan) for key, plan in start.items()}
    nodes = (1 - np.cos(np.linspace(0, np.pi, objective.degree))) / 2
    gradient = objective.gradient(start)
    seen: list[tuple[float, dict[Key, Tensor]]] = []
    converged = False
    for _ in shown(range(max_steps), "Frank-Wolfe matching"):
        aim = {key: assignment(slope) for key, slope in gradient.items()}
        gaps = _slopes(gradient, plans, aim)
        converged = all(gap <= _GAP * objective.bounds[key] for key, gap in gaps.items())
        if converged:
            break
        seen.append((objective.cost(aim), aim))
        gradients = [gradient]
        gradients += [objective.gradient(aim if node == 1 else _towards(plans, aim, node)) for node in nodes[1:]]
        step = best_step(nodes, [sum(_slopes(one, plans, aim).values()) for one in gradients])
        plans = _towards(plans, aim, step)
        shares = interpolation(nodes, step)
        gradient = {
            key: torch.stack([s * one[key] for s, one in zip(shares, gradients, strict=True)]).sum(0)
            for key in gradient
        }
    nearest = {key: assignment(plan) for key, plan in plans.items()}
    seen.append((objective.cost(nearest), nearest))
    cost, permutations = min(seen, key=lambda pair: pair[0])
    return Found(permutations, cost, [cost for cost, _ in seen], converged)


def _as_plan(plan: Tensor) -> Tensor:
    return plan if plan.ndim == 2 else torch.eye(len(plan), dtype=torch.float64)[plan.cpu()]


def _slopes(gradient: Mapping[Key, Tensor], plans: Mapping[Key, Tensor], aim: Mapping[Key, Tensor]) -> dict[Key, float]:
    """Return ``<gradient, aim - plan>`` by key."""
    return {
        key: float(slope.gather(1, aim[key][:, None]).sum() - (slope * plans[key]).sum())
        for key, slope in gradient.items()
    }


def _towards(plans: Mapping[Key, Tensor], aim: Mapping[Key, Tensor], step: float) -> dict[Key, Tensor]:
    """Return ``(1 - step) * plan + step * aim`` by key."""
    mixed = {}
    for key, plan in plans.items():
        mixed[key] = (1 - step) * plan
        mixed[key][torch.arange(len(plan)), aim[key]] += step
    return mixed


def best_step(nodes: np.ndarray, slopes: Sequence[float]) -> float:
    """Return the t in (0, 1] with the highest value of a polynomial, given its slopes at as many nodes as it has degrees."""
    slope = np.polynomial.Polynomial(np.linalg.solve(np.vander(nodes, increasing=True), slopes))
    candidates = [*_sign_changes(slope), 1.0]
    return float(candidates[np.argmax(slope.integ()(np.array(candidates)))])


def _sign_changes(polynomial: np.polynomial.Polynomial) -> list[float]:
    """Return where a polynomial changes its sign in (0, 1); between extrema it does so once at most.

    Not by eigenvalues: those are far off where a leading coefficient is zero but for rounding, as that of a line search often is.
    """
    if polynomial.degree() == 0:
        return []
    edges = [0.0, *_sign_changes(polynomial.deriv()), 1.0]
    return [brentq(polynomial, a, b) for a, b in pairwise(edges) if polynomial(a) * polynomial(b) < 0]


def interpolation(nodes: np.ndarray, t: float) -> list[float]:
    """Return the shares of the values at the nodes in the value at t, exact for polynomials of a degree below the number of nodes."""
    shares = np.linalg.solve(np.vander(nodes, increasing=True).T, t ** np.arange(len(nodes)))
    return [float(share) for share in shares]
