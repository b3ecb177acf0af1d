"""What happens between two tasks: alignment, choice of alpha, and the merged weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_rebasin.alignment import (
    Alignment,
    add_residual,
    incremental_cost,
    l2_cost,
    midpoint_cost,
    random_point_cost,
    sinkhorn_alignment,
    weight_matching,
)
from lit_rebasin.callbacks.step_loss import StepLoss, draw_batches
from lit_rebasin.merging import LinearPath, PathLosses, line_search
from lit_rebasin.symmetry import PermutationSpec, permute

Weights = Mapping[str, Tensor]
METHODS = ("weights", "sinkhorn", "identity")
# Logit of the start of the plans: at width 256, 92 % of a row.
_SHARPNESS = 8.0
COSTS = ("incremental", "midpoint", "random-point", "l2")


@dataclass(frozen=True)
class MergeSettings:
    """The arguments of `RebasinMerge`, checked."""

    alpha: float | Literal["line-search"]
    method: str
    cost: str
    steps: int
    learning_rate: float
    residual_learning_rate: float
    batches: int
    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str):
            if self.alpha != "line-search":
                raise ValueError(f'alpha must be a number in [0, 1] or "line-search", got {self.alpha!r}.')
        elif not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is the weight of the previous model and must lie in [0, 1], got {self.alpha}.")
        for name, value, known in (("method", self.method, METHODS), ("cost", self.cost, COSTS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        for name, number, least in (("steps", self.steps, 0), ("batches", self.batches, 1)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}.")
        if not self.learning_rate > 0 or self.residual_learning_rate < 0:
            raise ValueError(
                f"learning_rate must be above 0 and residual_learning_rate at least 0, "
                f"got {self.learning_rate} and {self.residual_learning_rate}."
            )


@dataclass(frozen=True)
class MergeOutcome:
    """The merged weights, and all that is worth knowing about how they came about."""

    weights: dict[str, Tensor]
    numbers: dict[str, float]
    alignment: Alignment
    before: PathLosses
    after: PathLosses
    batches: list[Any]


@dataclass(frozen=True)
class _Models:
    """The two models of a merge, and the data they are compared on."""

    step: StepLoss
    batches: list[Any]
    trained: Weights
    previous: Weights
    shared: set[str]

    def path_from(self, new: Weights) -> LinearPath:
        """Return the path from the previous model; parameters that are not shared are the new model's all along."""
        own = {name: new[name] for name, _ in self.step.module.named_parameters() if name not in self.shared}
        return LinearPath({**self.previous, **own}, new)

    def loss(self, weights: Weights) -> Tensor:
        return self.step.mean(weights, self.batches)[0]

    def matched(self, weights: Weights) -> dict[str, Tensor]:
        """Return what an alignment compares."""
        return {name: weights[name] for name in sorted(self.shared)}


def merge_task(
    step: StepLoss,
    trainer: "pl.Trainer",
    trained: Weights,
    previous: Weights,
    spec: PermutationSpec,
    shared: set[str],
    settings: MergeSettings,
    task: int,
) -> MergeOutcome:
    """Align the trained weights to the previous ones and merge them; nothing is written to.

    Args:
        step: The task loss as a function of weights.
        trainer: Gives the training batches.
        trained: Parameters and buffers of the model that has just learned ``task``.
        previous: Those of the model before.
        spec: The permutation symmetries.
        shared: Parameters that both models have trained: only these are matched and averaged, other parameters are taken from ``trained``.
        settings: Arguments of the callback.
        task: Index of the task, for the seeds.
    """
    started = perf_counter()
    models = _Models(step, step.with_loss(draw_batches(trainer, settings.batches)), trained, previous, shared)
    alignment = _align(models, spec, settings, settings.seed + task)
    aligned = models.path_from(permute(trained, spec, alignment.permutations))
    before = models.path_from(trained).losses(models.loss)
    after = aligned.losses(models.loss) if alignment.moved else before
    alpha = line_search(after) if isinstance(settings.alpha, str) else settings.alpha
    merged = add_residual(aligned.at(alpha), alignment.residual)
    loss_before, logged_before = step.mean(trained, models.batches)
    loss_after, logged_after = step.mean(merged, models.batches)
    numbers = {
        "alpha": float(alpha),
        "moved": alignment.moved,
        "loss_previous": float(after.losses[-1]),
        "loss_before": float(loss_before),
        "loss_after": float(loss_after),
        "barrier_before": before.barrier,
        "barrier_after": after.barrier,
        **{f"{name}_before": value for name, value in logged_before.items()},
        **{f"{name}_after": value for name, value in logged_after.items()},
        "seconds": perf_counter() - started,
    }
    return MergeOutcome(merged, numbers, alignment, before, after, models.batches)


def _align(models: _Models, spec: PermutationSpec, settings: MergeSettings, seed: int) -> Alignment:
    """Find the permutations, and with the incremental cost the residual."""
    ours, theirs = models.matched(models.trained), models.matched(models.previous)
    if settings.method == "identity":
        distance = float(l2_cost(ours, theirs))
        return Alignment(spec.identity(), distance, [distance], "identity", True, 0.0)
    matched = weight_matching(ours, theirs, spec, seed=seed)
    if settings.method == "weights":
        return matched
    residual: dict[str, Tensor] = {}
    if settings.cost == "incremental" and settings.residual_learning_rate > 0:
        residual = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in ours.items()}
    cost = _cost(models, settings, residual, seed)
    stream = cycle(models.batches)
    return sinkhorn_alignment(
        models.trained,
        spec,
        lambda permuted: cost(permuted, lambda weights: models.step.at(weights, next(stream))),
        # A cost of its own, so that every candidate meets the same random point.
        evaluate=lambda permuted: _cost(models, settings, residual, seed)(permuted, models.loss),
        init=matched.permutations,
        # The residual is trained for the soft network, which must be near the hard one from the start.
        sharpness=_SHARPNESS,
        noise=0.0,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        residual=residual,
        residual_learning_rate=settings.residual_learning_rate,
    )


def _cost(
    models: _Models, settings: MergeSettings, residual: Weights, seed: int
) -> Callable[[Weights, Callable[[Weights], Tensor]], Tensor]:
    """Return the cost that the settings name, as a function of permuted weights and of the loss."""
    # A line search comes after the alignment, so the published midpoint stands in for it there.
    point = 0.5 if isinstance(settings.alpha, str) else settings.alpha
    generator = torch.Generator().manual_seed(seed)

    def cost(permuted: Weights, loss: Callable[[Weights], Tensor]) -> Tensor:
        reference = models.path_from(permuted).previous
        if settings.cost == "l2":
            return l2_cost(models.matched(permuted), models.matched(reference))
        if settings.cost == "midpoint":
            return midpoint_cost(permuted, reference, loss)
        if settings.cost == "random-point":
            return random_point_cost(permuted, reference, loss, generator)
        return incremental_cost(permuted, reference, loss, point, residual)

    return cost
