"""What happens between two tasks: alignment, choice of alpha, and the merged weights."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lit_rebasin.alignment import (
    DISTANCES,
    Alignment,
    Problem,
    add_residual,
    find,
    incremental_cost,
    midpoint_cost,
    random_point_cost,
)
from lit_rebasin.callbacks.measured import Draw, first_batches, measure, permuted
from lit_rebasin.callbacks.settings import MergeSettings
from lit_rebasin.callbacks.step_features import StepFeatures
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.merging import LinearPath, PathLosses, fisher_alpha, layer_fisher_alphas, line_search, regmean
from lit_rebasin.symmetry import Features, PermutationSpec, permute

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class MergeOutcome:
    """The merged weights, and all that is worth knowing about how they came about.

    Attributes:
        weights: All parameters and buffers of the merge.
        alpha: Weight of the previous model, one number or one by tensor name.
        path: From the previous model to the aligned new one.
        numbers: What is logged.
        alignment: How the new model was carried towards the previous one.
        before: The losses between the two as they were.
        after: Those along ``path``.
        batches: The training batches that all this was measured on.
        measured: What the merge measured of the aligned new model besides its loss, by name; empty if nothing.
    """

    weights: dict[str, Tensor]
    alpha: float | dict[str, float]
    path: LinearPath
    numbers: dict[str, float]
    alignment: Alignment
    before: PathLosses
    after: PathLosses
    batches: list[Any]
    measured: dict[str, Tensor]


@dataclass(frozen=True)
class _Models:
    """The two models of a merge, and the data they are compared on."""

    step: StepLoss
    batches: list[Any]
    trained: Weights
    previous: Weights
    shared: set[str]
    held: Collection[str]

    def path_from(self, new: Weights) -> LinearPath:
        """Return the path from the previous model; parameters that are not shared are the new model's all along, or the previous one's."""
        new = {**new, **{name: self.previous[name] for name in self.held}}
        own = {name: new[name] for name, _ in self.step.module.named_parameters() if name not in self.shared}
        return LinearPath({**self.previous, **own}, new)

    def loss(self, weights: Weights) -> Tensor:
        return self.step.mean(weights, self.batches)[0]


def merge_task(
    step: StepLoss,
    draw: Draw,
    trained: Weights,
    previous: Weights,
    spec: PermutationSpec,
    shared: set[str],
    settings: MergeSettings,
    task: int,
    known: Weights | None = None,
    held: Collection[str] = (),
) -> MergeOutcome:
    """Align the trained weights to the previous ones and merge them; nothing is written to.

    Args:
        step: The task loss as a function of weights.
        draw: Begins a pass over training batches, such as the module's training_step takes.
        trained: Parameters and buffers of the model that has just learned ``task``.
        previous: Those of the model before.
        spec: The permutation symmetries.
        shared: Parameters that both models have trained: only these are matched and averaged, other parameters are taken from ``trained``.
        settings: Arguments of the callback.
        task: Index of the task, for the seeds.
        known: What was measured of the tasks before, where the merge needs it.
        held: Parameters that are taken from ``previous``.
    """
    started = perf_counter()
    models = _Models(step, first_batches(step, draw, settings.batches), trained, previous, shared, held)
    problem, seed = _problem(models, spec, settings, settings.seed + task), settings.seed + task
    if shared:
        alignment = find(problem, settings.method, settings.init, seed, settings.used_options)
    else:  # a task that trained nothing it began anew has nothing to match
        alignment = find(problem, "identity", None, seed, {})
    aligned = models.path_from(permute(trained, spec, alignment.permutations))
    before = models.path_from(trained).losses(models.loss)
    after = aligned.losses(models.loss) if alignment.moved else before
    own = permuted(measure(settings, step, trained, draw), trained, spec, alignment)
    alpha = _alpha(settings, aligned, after, known or {}, own, shared)
    merged = add_residual(_merged(settings, aligned, alpha, known or {}, own, shared), alignment.residual)
    loss_before, logged_before = step.mean(trained, models.batches)
    loss_after, logged_after = step.mean(merged, models.batches)
    numbers = {
        "alpha": _mean_alpha(alpha, trained, shared),
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
    return MergeOutcome(merged, alpha, aligned, numbers, alignment, before, after, models.batches, own)


def _problem(models: _Models, spec: PermutationSpec, settings: MergeSettings, seed: int) -> Problem:
    """Return what the alignment works on."""
    reader = StepFeatures(models.step, spec)

    def read(networks: Sequence[Weights], averaged: Collection[str]) -> Iterator[tuple[Features, ...]]:
        return (tuple(reader.read(one, batch, averaged) for one in networks) for batch in models.batches)

    residual: dict[str, Tensor] = {}
    rate = settings.used_options.get("residual_learning_rate", 1.0)
    if settings.method == "sinkhorn" and settings.used_cost == "incremental" and rate > 0:
        residual = {
            name: torch.zeros_like(models.trained[name], requires_grad=models.trained[name].is_floating_point())
            for name in sorted(models.shared)
        }
    reference = models.path_from(models.trained).previous
    stream = cycle(models.batches)
    cost = _cost(models, settings, residual, seed)
    return Problem(
        models.trained,
        reference,
        sorted(models.shared),
        spec,
        read,
        lambda: (
            lambda permuted: cost(permuted, lambda weights: models.step.at(weights, next(stream))),
            # A cost of its own, so that every candidate meets the same random point.
            lambda permuted: _cost(models, settings, residual, seed)(permuted, models.loss),
        ),
        residual,
    )


def _cost(
    models: _Models, settings: MergeSettings, residual: Weights, seed: int
) -> Callable[[Weights, Callable[[Weights], Tensor]], Tensor]:
    """Return the cost that the settings name, as a function of permuted weights and of the loss."""
    generator = torch.Generator().manual_seed(seed)
    name = settings.used_cost

    def cost(permuted: Weights, loss: Callable[[Weights], Tensor]) -> Tensor:
        reference = models.path_from(permuted).previous
        if name in DISTANCES:
            return DISTANCES[name]({one: permuted[one] for one in sorted(models.shared)}, reference)
        if name == "midpoint":
            return midpoint_cost(permuted, reference, loss)
        if name == "random-point":
            return random_point_cost(permuted, reference, loss, generator)
        return incremental_cost(permuted, reference, loss, settings.point, residual)

    return cost


def _alpha(
    settings: MergeSettings,
    path: LinearPath,
    losses: PathLosses,
    known: Weights,
    new: Weights,
    shared: set[str],
) -> float | dict[str, float]:
    """Return the weight of the previous model, or those of its layers."""
    if not isinstance(settings.alpha, str):
        return settings.alpha
    if settings.alpha == "line-search":
        return line_search(losses)
    both = _both(known, new, shared)
    return fisher_alpha(path, *both) if settings.alpha == "fisher" else layer_fisher_alphas(path, *both)


def _merged(
    settings: MergeSettings,
    path: LinearPath,
    alpha: float | dict[str, float],
    known: Weights,
    new: Weights,
    shared: set[str],
) -> dict[str, Tensor]:
    """Return the merged weights, before any residual."""
    if settings.combine != "regmean" or isinstance(alpha, Mapping):
        return path.at(alpha)
    # A layer of which both networks have trained but one tensor is averaged.
    whole = {name for name in shared if _layer_of(name, path.new) <= shared}
    return regmean(path, *_both(known, new, whole), alpha=alpha)


def _layer_of(name: str, weights: Weights) -> set[str]:
    layer = name.rpartition(".")[0]
    return {f"{layer}.{own}" for own in ("weight", "bias")} & weights.keys()


def _both(known: Weights, new: Weights, names: set[str]) -> tuple[Weights, Weights]:
    """Return what was measured before and now, of the tensors that were measured both times."""
    names = names & known.keys() & new.keys()
    return {name: known[name].to(new[name].device) for name in names}, {name: new[name] for name in names}


def _mean_alpha(alpha: float | Mapping[str, float], weights: Weights, shared: set[str]) -> float:
    """Return one number for all: the mean over the entries that are averaged."""
    if not isinstance(alpha, Mapping):
        return float(alpha)
    entries = {name: weights[name].numel() for name in shared if name in alpha}
    return sum(alpha[name] * count for name, count in entries.items()) / max(1, sum(entries.values()))
