"""The methods by name, and what they work on."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from torch import Tensor

from lit_rebasin.alignment.activations import Read, activation_matching
from lit_rebasin.alignment.costs import l2_cost
from lit_rebasin.alignment.covariance import covariance_matching
from lit_rebasin.alignment.frank_wolfe import frank_wolfe_matching
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.alignment.sinkhorn import sinkhorn_alignment
from lit_rebasin.alignment.straight_through import straight_through_alignment
from lit_rebasin.alignment.weights import weight_matching
from lit_rebasin.symmetry import PermutationSpec

Weights = Mapping[str, Tensor]
Cost = Callable[[Weights], Tensor]
# The method's function, what it takes of the data ("", "inputs" or "labels"), and the start that it has unless told.
METHODS: dict[str, tuple[Callable[..., Alignment] | None, str, str]] = {
    "identity": (None, "", "identity"),
    "weights": (weight_matching, "", "identity"),
    "covariance": (covariance_matching, "inputs", "identity"),
    "activations": (activation_matching, "inputs", "identity"),
    "frank-wolfe": (frank_wolfe_matching, "", "identity"),
    "straight-through": (straight_through_alignment, "labels", "weights"),
    "sinkhorn": (sinkhorn_alignment, "labels", "weights"),
}
# What `align` and `RebasinMerge` give the methods themselves.
_OWN = {"init", "seed", "cost", "evaluate", "residual"}


@dataclass(frozen=True)
class Problem:
    """Two networks, and how to measure them.

    Attributes:
        model: All weights of the network to permute, buffers too.
        reference: Those of the one that stays put.
        compared: The parameters by which the two are compared.
        spec: Their symmetries.
        read: Maps all weights of some networks, and the groups to average, to the features of each of them on each batch of the data.
        costs: Returns two costs of permuted weights: one of the next batch, one of always the same batches.
        residual: What the costs add to a merge, to be trained beside the permutations.
    """

    model: Weights
    reference: Weights
    compared: Collection[str]
    spec: PermutationSpec
    read: Read
    costs: Callable[[], tuple[Cost, Cost]]
    residual: dict[str, Tensor] = field(default_factory=dict)


def find(
    problem: Problem, method: str, init: str | Mapping[str, Tensor] | None, seed: int, options: Mapping[str, Any]
) -> Alignment:
    """Run one method on a problem.

    Args:
        problem: The networks.
        method: A name of `METHODS`.
        init: The start: the name of a method, permutations by group name, or None for what is usual.
        seed: Of everything drawn.
        options: Further arguments of the method's function, checked by `check_method`.
    """
    function, _, usual = METHODS[method]
    ours, theirs = ({name: side[name] for name in problem.compared} for side in (problem.model, problem.reference))
    spec = problem.spec
    if function is None:
        started = perf_counter()
        distance = float(l2_cost(ours, theirs))
        return Alignment(spec.identity(), distance, [distance], "identity", True, perf_counter() - started)
    start = _start(problem, init if init is not None else usual, seed)
    given = None if init is None else start  # these have starts of their own
    if method == "frank-wolfe":
        return frank_wolfe_matching(ours, theirs, spec, init=given, **options)
    if method == "weights":
        return weight_matching(ours, theirs, spec, init=given, seed=seed, **options)
    if method == "covariance":
        features = problem.read((problem.model, problem.reference), ())
        return covariance_matching(ours, theirs, spec, features, init=given, seed=seed, **options)
    if method == "activations":
        return activation_matching(problem.model, problem.reference, spec, problem.read, init=start, **options)
    cost, evaluate = problem.costs()
    shared = {"evaluate": evaluate, "init": start, "seed": seed, **options}
    if method == "sinkhorn":
        return sinkhorn_alignment(problem.model, spec, cost, residual=problem.residual, **shared)
    return straight_through_alignment(problem.model, theirs, spec, cost, **shared)


def check_method(method: str, options: Mapping[str, Any], *, residual: bool = False) -> None:
    """Raise a ValueError for an unknown method, or an option that it does not have; those of a residual only where there is one."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    function = METHODS[method][0]
    parameters = inspect.signature(function).parameters.values() if function else []
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _OWN}
    known = [name for name in defaults if residual or not name.startswith("residual")]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"method {method!r} has no option {name!r}; it has {', '.join(known) or 'none'}.")
        if isinstance(defaults[name], bool) != isinstance(value, bool) and name != "schedule":
            kind = "True or False" if isinstance(defaults[name], bool) else "no truth value"
            raise ValueError(f"Option {name!r} of method {method!r} must be {kind}, got {value!r}.")
        if isinstance(defaults[name], int | float) and not isinstance(value, int | float):
            raise ValueError(f"Option {name!r} of method {method!r} must be a number, got {value!r}.")


def check_start(method: str, init: str | Mapping[str, Tensor] | None) -> None:
    """Raise a ValueError for a start that is neither a method nor permutations, or that nothing would start from."""
    if init is None:
        return
    if method == "identity":
        raise ValueError("method 'identity' starts nowhere; leave init out.")
    if not (isinstance(init, Mapping) or (isinstance(init, str) and init in METHODS)):
        raise ValueError(
            f"init must be one of {', '.join(METHODS)}, or permutations by group name (`alignment.permutations`); got {init!r:.60}."
        )


def _start(problem: Problem, init: str | Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return the permutations to start from."""
    if isinstance(init, str):
        if init == "identity":
            return problem.spec.identity()
        return find(problem, init, None, seed, {}).permutations
    unknown = sorted(set(init) - set(problem.spec.groups))
    if unknown:
        raise ValueError(f"init names unknown groups {unknown}; the spec has {sorted(problem.spec.groups)}.")
    return {**problem.spec.identity(), **init}
