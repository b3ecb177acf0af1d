"""Covariance-weighted weight matching: rows of weights are compared where the inputs of their layer vary."""

from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lit_rebasin.alignment.agreement import balanced, cosine_cost, exact, restrict
from lit_rebasin.alignment.costs import check_counts, check_same_architecture
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.alignment.weights import coordinate_ascent
from lit_rebasin.symmetry import FeatureReader, PermutationSpec


def covariance_matching(
    model: nn.Module,
    reference: nn.Module,
    spec: PermutationSpec,
    batches: Iterable[tuple[Any, ...]],
    *,
    power: float = 0.25,
    init: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Alignment:
    """Match the weights in the metric of their inputs: ``sum_l <W_l^ref S_l, P_l W_l P_{l-1}^T>`` with ``S_l = C_l ** power``.

    ``C_l`` is the covariance of the inputs of layer ``l`` of the reference. Ferbach et al. (AISTATS 2024, section 6) compare neurons by
    ``(w_i - w_j)^T Sigma (w_i - w_j)`` with the second moment of the inputs, layer by layer from the input on. Here both sides of a layer
    count, as in weight matching; the covariance takes the place of the second moment, since a mean is a matter of the bias; and a power below
    1 keeps the few directions that almost all of the variance lies in from deciding alone. Layers count by their cosines (of ``W_l^ref S_l``
    and the permuted ``W_l``). Of a convolution it is the covariance of the channels at one position. Tensors of layers that are neither
    linear nor a convolution are compared as they are; biases of those that are play no part.

    Args:
        model: The network to permute; not written to.
        reference: The one that stays put.
        spec: The symmetries of the two.
        batches: Inputs, each a tuple of the arguments of one forward pass; no labels.
        power: Of the covariance, from 0 (plain weight matching) to 1.
        init: The permutations to start from, by group name. Default: the identity.
        seed: Seed of the order of the groups.
        max_sweeps: Bound on the sweeps over all groups.

    Returns:
        The alignment, never worse than ``init``; its cost is the mean over the layers of one less their cosine.

    Raises:
        ValueError: If ``power`` lies outside [0, 1], there are no batches, or the architectures differ.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power must lie between 0 and 1, got {power}.")
    check_counts(max_sweeps=(max_sweeps, 1))
    started = perf_counter()
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    check_same_architecture(ours, theirs)
    metrics = {name: _power(one, power) for name, one in _covariances(reference, spec, batches).items() if name in ours}
    measured = {name.rpartition(".")[0] for name in metrics}
    compared = [name for name in ours if name in metrics or name.rpartition(".")[0] not in measured]
    weights, targets = (exact({name: some[name] for name in compared}) for some in (ours, theirs))
    # A metric acts along the channels that come in.
    targets |= {name: (targets[name].movedim(1, -1) @ one).movedim(-1, 1) for name, one in metrics.items()}
    permutations, history, converged = coordinate_ascent(
        weights,
        balanced(weights, targets),
        restrict(spec, weights),
        {**spec.identity(), **(init or {})},
        cosine_cost,
        torch.Generator().manual_seed(seed),
        max_sweeps,
    )
    return Alignment(permutations, history[-1], history, "covariance", converged, perf_counter() - started)


def _covariances(reference: nn.Module, spec: PermutationSpec, batches: Iterable[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Return the covariance of the inputs of each layer by the name of its weight, float64."""
    reader = FeatureReader(reference, spec)
    columns = {name: tensor.shape[1] for name, tensor in reference.named_parameters() if tensor.ndim > 1}
    sums: dict[str, list[Any]] = {}
    for inputs in batches:
        for name, values in reader.read(reference, inputs).layers.items():
            # Those of a grouped convolution, or of a weight that is used twice, count as one.
            for x in values:
                rows = x.reshape(-1, columns[name]).float()
                total = sums.setdefault(name, [0, 0.0, 0.0])
                total[0] += len(rows)
                total[1] = total[1] + rows.sum(0, dtype=torch.float64).cpu()
                total[2] = total[2] + (rows.T @ rows).double().cpu()
    if not reader.has_run:
        raise ValueError("data holds no batch, but covariance-weighted matching needs some.")
    return {name: second / n - torch.outer(first / n, first / n) for name, (n, first, second) in sums.items()}


def _power(covariance: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding leaves directions without variance a little of either sign, which a small power would blow up.
    values = torch.where(values > 1e-6 * values.max(), values, 0.0)
    return (vectors * values**power) @ vectors.T
