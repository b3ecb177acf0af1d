"""The arguments of the callback, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rebasin.alignment import (
    DISTANCES,
    LOSS_COSTS,
    METHODS,
    Problem,
    add_residual,
    check_method,
    check_start,
    find,
    l2_cost,
)
from lit_rebasin.callbacks.start import STARTS, Start
from lit_rebasin.symmetry import Features, PermutationSpec
from lit_rebasin.transport import Schedule
from lit_rebasin.transport.arguments import check_count, plain

Method = Literal["identity", "weights", "covariance", "activations", "frank-wolfe", "straight-through", "sinkhorn"]
Measured = Literal["Fisher information", "input moments"]
COSTS = (*LOSS_COSTS, *DISTANCES)
ALPHAS = ("line-search", "fisher", "layer-fisher")
COMBINATIONS = ("average", "regmean")
STATISTICS = ("reestimate", "repair", "rescale", "data-free", "none")
# The residual is trained for the soft network, which must be near the hard one from the start: with this logit a neuron holds 92 % of its row
# at width 256.
_SINKHORN = {"sharpness": 8.0, "noise": 0.0, "learning_rate": 0.1}


@dataclass(frozen=True)
class MergeSettings:
    """The arguments of `RebasinMerge`."""

    alpha: float | str
    method: str
    cost: str | None
    init: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    statistics: str = "reestimate"
    batches: int = 10
    seed: int = 0
    start: Start = "previous"
    combine: str = "average"
    margin: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "batches", "seed", "margin"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not isinstance(self.alpha, int | float):
            _check("alpha", self.alpha, ALPHAS, "a number in [0, 1], or ")
        elif isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is the weight of the previous model and must lie in [0, 1], got {self.alpha}.")
        _check("method", self.method, METHODS)
        if self.cost is not None:
            _check("cost", self.cost, COSTS)
            if not self.takes_cost:
                raise ValueError(f"method {self.method!r} takes no cost; leave it out.")
        if self.init is not None:
            _check("init", self.init, METHODS)
            check_start(self.method, self.init)
        _check("statistics", self.statistics, STATISTICS)
        _check("start", self.start, STARTS)
        _check("combine", self.combine, COMBINATIONS)
        if self.combine == "regmean" and isinstance(self.alpha, str):
            raise ValueError(
                f"combine='regmean' leaves the linear path, on which alpha={self.alpha!r} is chosen: give alpha a number."
            )
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a mapping of what the method takes, got {self.options!r}.")
        object.__setattr__(self, "options", {name: plain(value) for name, value in self.options.items()})
        check_method(self.method, self.options, residual=self.method == "sinkhorn" and self.used_cost == "incremental")
        try:
            _try(self.method, self.used_options)
        except TypeError as error:
            raise ValueError(
                f"An option of method {self.method!r} has a value that it cannot take: {error}."
            ) from error
        check_count("batches", self.batches)
        if isinstance(self.margin, bool) or not isinstance(self.margin, int | float) or not self.margin >= 0:
            raise ValueError(f"margin must be a number of at least 0, got {self.margin!r}.")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be a whole number, got {self.seed!r}.")

    @property
    def takes_cost(self) -> bool:
        """Whether the method trains permutations on a cost."""
        return METHODS[self.method][1] == "labels"

    @property
    def used_cost(self) -> str:
        """The cost that the method minimises, where it takes one."""
        return self.cost or "incremental"

    @property
    def used_options(self) -> dict[str, Any]:
        """The options of the method, with what differs from `align` in a stream of tasks."""
        schedule = self.options.get("schedule")
        named = {"schedule": Schedule(**schedule)} if isinstance(schedule, Mapping) else {}
        return {**(_SINKHORN if self.method == "sinkhorn" else {}), **self.options, **named}

    @property
    def reads_features(self) -> bool:
        """Whether the method, or its start, needs what the network computes."""
        start = self.init or METHODS[self.method][2]
        return "inputs" in (METHODS[self.method][1], METHODS[start][1])

    @property
    def measured(self) -> Measured | None:
        """What is kept of every task besides weights, where the merge needs it."""
        if self.combine == "regmean":
            return "input moments"
        return "Fisher information" if self.alpha in ("fisher", "layer-fisher") else None

    @property
    def point(self) -> float:
        """The alpha of the incremental cost: where it is chosen after the alignment, the published midpoint."""
        return 0.5 if isinstance(self.alpha, str) else self.alpha


def _try(method: str, options: Mapping[str, Any]) -> None:
    """Let a method refuse its options now, on two networks of two neurons, rather than after a task."""
    weights = {"weight": torch.eye(2)}
    spec = PermutationSpec.from_axes({"weight": ("neurons", None)}, weights)
    shortened = {
        name: min(value, 1) if name == "steps" and isinstance(value, int) else value for name, value in options.items()
    }

    residual = {"weight": torch.zeros(2, 2, requires_grad=True)}

    def distance(permuted: Mapping[str, Tensor]) -> Tensor:
        return l2_cost(add_residual(permuted, residual), weights)

    features = Features({"neurons": [torch.eye(2)]}, {})
    problem = Problem(
        weights, weights, list(weights), spec, lambda *_: [(features, features)], lambda: (distance, distance), residual
    )
    find(problem, method, None, 0, shortened)


def _check(argument: str, value: str, known: Any, also: str = "") -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{argument} must be {also}one of {', '.join(known)}, got {value!r}.")
