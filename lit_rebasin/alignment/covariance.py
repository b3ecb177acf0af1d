"""Covariance-weighted weight matching: weights are compared where the inputs of their layer vary."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lit_rebasin.alignment.costs import check_same_architecture
from lit_rebasin.alignment.progress import shown
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.alignment.weights import weight_matching
from lit_rebasin.symmetry import Features, PermutationSpec


def covariance_matching(
    model: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    spec: PermutationSpec,
    features: Iterable[tuple[Features, ...]],
    *,
    power: float = 0.125,
    normalize: bool = True,
    init: Mapping[str, Tensor] | None = None,
    restarts: int = 0,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Alignment:
    """Match the weights in the metric of their inputs: weight matching of ``W_l C_l ** (power / 2)``, ``C_l`` the covariance of the inputs.

    Ferbach et al. (AISTATS 2024, section 6) compare neurons by ``(w_i - w_j)^T Sigma (w_i - w_j)`` with the second moment of the inputs in
    one network. Here each network has its own ``C_l``, whose axes move as those of ``W_l`` do: so the aim is the same for both sides of a
    layer, and a permuted copy of a network is a perfect match. It is the covariance, since a mean is a matter of the bias; and a power below
    1 keeps the few directions that almost all of the variance lies in from deciding alone. Of a convolution it is the covariance of the
    channels at one position. Tensors of layers that are neither linear nor a convolution are compared as they are; biases of those that are
    play no part.

    Args:
        model: Parameters of the model to permute.
        reference: Those of the one that stays put.
        spec: The symmetries of the two.
        features: What the model and the reference compute on each batch of some data (:class:`FeatureReader`).
        power: Of the covariance in the products of two rows, from 0 (plain weight matching) to 1.
        normalize: Whether every layer counts by its cosine, as in :func:`~lit_rebasin.weight_matching`.
        init: The permutations to start from, by group name. Default: as of :func:`~lit_rebasin.weight_matching`.
        restarts: How often to start again from random permutations; the best of all is returned.
        seed: Seed of the order of the groups and of the restarts.
        max_sweeps: Bound on the sweeps over all groups, of each start.

    Returns:
        The alignment, never worse than ``init``; its cost is the mean over the layers of one less their cosine, or if ``normalize`` is off the
        mean squared difference.

    Raises:
        ValueError: If ``power`` lies outside [0, 1], there are no batches, the architectures differ, or a count is out of range.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power must lie between 0 and 1, got {power}.")
    started = perf_counter()
    check_same_architecture(model, reference)
    covariances = _covariances((model, reference), features)
    ours, theirs = (_weighed(one, own, power) for one, own in zip((model, reference), covariances, strict=True))
    found = weight_matching(
        ours, theirs, spec, init=init, normalize=normalize, restarts=restarts, seed=seed, max_sweeps=max_sweeps
    )
    return replace(found, method="covariance", seconds=perf_counter() - started)


def _weighed(tensors: Mapping[str, Tensor], covariances: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """Return the parameters to compare, those of layers whose inputs are known times the root of the metric along the channels that come in."""
    roots = {name: _power(one, power / 2) for name, one in covariances.items()}
    measured = {name.rpartition(".")[0] for name in roots}
    return {
        name: (tensor.detach().double().cpu().movedim(1, -1) @ roots[name]).movedim(-1, 1) if name in roots else tensor
        for name, tensor in tensors.items()
        if name in roots or name.rpartition(".")[0] not in measured
    }


def _covariances(
    networks: Sequence[Mapping[str, Tensor]], features: Iterable[tuple[Features, ...]]
) -> list[dict[str, Tensor]]:
    """Return for each network the covariance of the inputs of each layer by the name of its weight, float64."""
    columns = {name: tensor.shape[1] for name, tensor in networks[0].items() if tensor.ndim > 1}
    found: list[dict[str, _Covariance]] = [{} for _ in networks]
    batch = None
    for batch in shown(features, "Reading the inputs of layers"):
        for own, one in zip(found, batch, strict=True):
            for name, values in one.layers.items():
                # Those of a grouped convolution, or of a weight that is used twice, count as one.
                for x in values if name in columns else []:
                    own.setdefault(name, _Covariance()).add(x.reshape(-1, columns[name]))
    if batch is None:
        raise ValueError("data holds no batch, but covariance-weighted matching needs some, at every reading.")
    return [{name: one.value() for name, one in own.items()} for own in found]


class _Covariance:
    """The covariance of rows, summed about the mean of the first ones, lest large means cancel."""

    def __init__(self) -> None:
        self.count = 0
        self.origin: Tensor | None = None
        self.first: Any = 0.0
        self.second: Any = 0.0

    def add(self, rows: Tensor) -> None:
        """Take in rows ``(n, channels)``."""
        if self.origin is None:
            self.origin = rows.double().mean(0)
        rows = (rows.double() - self.origin).float()
        self.count += len(rows)
        self.first = self.first + rows.sum(0, dtype=torch.float64).cpu()
        self.second = self.second + (rows.T @ rows).double().cpu()

    def value(self) -> Tensor:
        """Return the covariance ``(channels, channels)``, float64 on the CPU."""
        found: Tensor = self.second / self.count - torch.outer(self.first / self.count, self.first / self.count)
        return found


def _power(covariance: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding leaves directions without variance a little of either sign, which a small power would blow up.
    values = torch.where(values > 1e-6 * values.max(), values, 0.0)
    found: Tensor = (vectors * values**power) @ vectors.T
    return found
