"""Activation matching: permute a model's neurons onto those of a reference that respond to the same inputs."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from lit_rebasin.alignment.agreement import nested_groups
from lit_rebasin.alignment.costs import check_same_architecture
from lit_rebasin.alignment.progress import shown
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.symmetry import Features, PermutationSpec, compose, permute
from lit_rebasin.transport import assignment

Read = Callable[[Sequence[Mapping[str, Tensor]], Collection[str]], Iterable[tuple[Features, ...]]]
# Passes over the data, where one group lies inside another and so depends on how that one was matched.
_PASSES = 5
# Gain in the sum of similarities that is put down to rounding.
_LEAST = 1e-9


def activation_matching(
    model: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    spec: PermutationSpec,
    read: Read,
    *,
    similarity: Literal["correlation", "cosine"] = "correlation",
    init: Mapping[str, Tensor] | None = None,
) -> Alignment:
    """Match neurons by the similarity of their activations on the same inputs, by linear assignment (Li et al., 2015; Ainsworth et al., 2023).

    A neuron's activations are those that layers take in, at every position and example; where several values of the network stand for one
    group, as along a residual stream, the mean of their similarities counts. Groups inside others, such as the features of attention heads,
    are matched again until nothing moves.

    Args:
        model: Weights of the model to permute.
        reference: Those of the one that stays put.
        spec: The symmetries of the two.
        read: Maps the weights of some networks, and the groups to average, to the features of each of them on each batch of some data
            (:class:`FeatureReader`); the same data at every call, in any order.
        similarity: Correlation, or cosine, which keeps the means.
        init: The permutations to start from, by group name. Default: the identity.

    Returns:
        The alignment, never worse than its start. Its cost is one less the mean similarity of matched neurons, over all groups.

    Raises:
        ValueError: If ``similarity`` is unknown, there are no batches, or the architectures differ.
    """
    if similarity not in ("correlation", "cosine"):
        raise ValueError(f"similarity must be correlation or cosine, got {similarity!r}.")
    started = perf_counter()
    check_same_architecture(model, reference)
    centred = similarity == "correlation"
    nested = [name for name, others in nested_groups(spec).items() if others]

    def compare(permutations: Mapping[str, Tensor], averaged: Collection[str] = ()) -> dict[str, Tensor]:
        return _similarities(read((reference, permute(model, spec, permutations)), averaged), centred=centred)

    permutations = {**spec.identity(), **(init or {})}
    best, similarities = permutations, compare(permutations)
    history = [_cost(similarities)]
    for number in range(_PASSES):
        # Heads can only be told apart once their features are in order, and the other way round: at first each with the others averaged out.
        blurred = compare(permutations, nested) if nested and number == 0 else similarities
        moves = _moves(blurred)
        if not moves:
            break
        permutations = compose(permutations, moves)
        if nested:
            similarities = compare(permutations)
        else:
            similarities = {name: one[:, moves[name]] if name in moves else one for name, one in similarities.items()}
        history.append(_cost(similarities))
        if history[-1] <= min(history):
            best = permutations
    converged = not _moves(similarities)
    return Alignment(best, min(history), history, "activations", converged, perf_counter() - started)


def _moves(similarities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the permutations that raise the similarity of their group."""
    steps = {name: assignment(one) for name, one in similarities.items()}
    return {
        name: step
        for name, step in steps.items()
        if float(similarities[name][torch.arange(len(step)), step].sum()) > float(similarities[name].trace()) + _LEAST
    }


def _similarities(features: Iterable[tuple[Features, ...]], *, centred: bool) -> dict[str, Tensor]:
    """Return, for each group, the mean over its values of the similarities of reference and model neurons, ``(size, size)``."""
    moments: dict[str, list[_Moments]] = {}
    batches = 0
    for one, other in shown(features, "Reading activations"):
        batches += 1
        for name, values in one.groups.items():
            kept = moments.setdefault(name, [_Moments(len(value)) for value in values])
            for moment, *pair in zip(kept, values, other.groups[name], strict=True):
                moment.add(*pair)
    if not batches:
        raise ValueError("data holds no batch, but activation matching needs some, at every reading.")
    return {
        name: torch.stack([one.similarity(centred=centred) for one in kept]).mean(0)
        for name, kept in moments.items()
        if kept
    }


class _Moments:
    """Sums over samples, from which the similarities of two sets of neurons follow; about the means of the first batch, lest they cancel."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.origin: Tensor | None = None
        self.sums = torch.zeros(2, size, dtype=torch.float64)
        self.squares = torch.zeros(2, size, dtype=torch.float64)
        self.products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, theirs: Tensor, ours: Tensor) -> None:
        """Take in activations ``(size, samples)``."""
        both = torch.stack([theirs, ours])
        if self.origin is None:
            self.origin = both.double().mean(-1)
        both = (both.double() - self.origin[:, :, None]).float()
        self.count += theirs.shape[1]
        self.sums += both.sum(-1, dtype=torch.float64).cpu()
        self.squares += both.double().square().sum(-1).cpu()
        self.products += (both[0] @ both[1].T).double().cpu()

    def similarity(self, *, centred: bool) -> Tensor:
        """Return the similarities; 0 with a neuron that never responds, or if centred never changes."""
        assert self.origin is not None
        means = self.sums / self.count
        products = self.products / self.count - means[0, :, None] * means[1]
        variances = self.squares / self.count - means.square()
        full = means + self.origin.cpu()
        # What is left of a constant is rounding.
        variances = torch.where(variances > 1e-9 * (variances + full.square()), variances, 0.0)
        if not centred:
            products, variances = products + full[0, :, None] * full[1], variances + full.square()
        scales = torch.where(variances > 0, variances, torch.inf).rsqrt()
        return scales[0, :, None] * products * scales[1]


def _cost(similarities: Mapping[str, Tensor]) -> float:
    """Return one less the mean similarity of neurons in their places."""
    total = sum(float(one.trace()) for one in similarities.values())
    return 1 - total / max(1, sum(map(len, similarities.values())))
