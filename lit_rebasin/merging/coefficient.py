"""Choose alpha, the weight of the previous model in a merge."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lit_rebasin.merging.path import LinearPath, PathLosses


class NoFiniteLossError(ValueError):
    """Every loss along a path is NaN or infinite."""


def line_search(losses: PathLosses) -> float:
    """Return the alpha with the lowest loss along a path; the largest of equals, which keeps most of the previous model.

    Points whose loss is NaN or infinite are never chosen.

    Raises:
        NoFiniteLossError: If no loss is finite; a ValueError.
    """
    finite = losses.losses.isfinite()
    if not finite.any():
        raise NoFiniteLossError(
            "Every loss along the path is NaN or infinite, so no alpha can be chosen by line search."
        )
    lowest = (losses.losses == losses.losses[finite].min()).nonzero()[-1]
    return float(losses.alphas[lowest])


def fisher_alpha(path: LinearPath, previous_fisher: Mapping[str, Tensor], new_fisher: Mapping[str, Tensor]) -> float:
    """Return the alpha of the lowest joint loss along a path, by the curvatures at its ends.

    ``alpha* = D'F_prev D / D'(F_prev + F_new) D`` with ``D = new - previous`` minimises the sum of the two Laplace approximations
    ``1/2 (w - w_i)' F_i (w - w_i)`` on the line, and the sum of the losses where both are quadratic. The Fisher information is one of a mean
    over examples, so both tasks count the same; scale it to have one count more.

    Args:
        path: The path.
        previous_fisher: Diagonal of the Fisher information at the previous model, by name; see
            :func:`~lit_rebasin.diagonal_fisher`. Of a permuted model, it is the permuted one: it moves as the weights do.
        new_fisher: The same at the new model, for the same tensors.

    Returns:
        A number in [0, 1]; 1, the previous model, where neither Fisher information knows the direction, for then the loss does not tell and
        nothing speaks for a change, as in :func:`line_search`.

    Raises:
        ValueError: If the two name different tensors, or a tensor that the path lacks, of another shape, negative or not finite.
    """
    previous, new = _curvatures(path, previous_fisher, new_fisher)
    return _share(previous.values(), new.values(), otherwise=1.0)


def layer_fisher_alphas(
    path: LinearPath, previous_fisher: Mapping[str, Tensor], new_fisher: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return :func:`fisher_alpha` for every layer by itself, as a number for every tensor that :meth:`LinearPath.at` takes.

    With diagonals, the joint loss is a sum over layers, so this is its lowest point over all per-layer alphas. The tensors of one module
    (weight, bias, BatchNorm's statistics) share an alpha: they are of use only together. A layer that neither Fisher information knows takes
    the alpha of the whole path, so that it is merged like what surrounds it.

    Raises:
        ValueError: As :func:`fisher_alpha` does.
    """
    previous, new = _curvatures(path, previous_fisher, new_fisher)
    whole = _share(previous.values(), new.values(), otherwise=1.0)
    layers: dict[str, list[str]] = {}
    for name in previous:
        layers.setdefault(_layer(name), []).append(name)
    alphas = {
        layer: _share([previous[name] for name in names], [new[name] for name in names], otherwise=whole)
        for layer, names in layers.items()
    }
    return {name: alphas.get(_layer(name), whole) for name, tensor in path.new.items() if tensor.is_floating_point()}


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _share(previous: Iterable[float], new: Iterable[float], otherwise: float) -> float:
    of_previous, of_new = sum(previous), sum(new)
    return of_previous / (of_previous + of_new) if of_previous + of_new > 0 else otherwise


def _curvatures(
    path: LinearPath, previous_fisher: Mapping[str, Tensor], new_fisher: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return ``D'FD`` of every tensor for both Fisher informations."""
    for name in sorted(previous_fisher.keys() ^ new_fisher.keys()):
        lacking = "new_fisher" if name in previous_fisher else "previous_fisher"
        raise ValueError(
            f"{lacking} lacks the tensor {name!r}, which the other has: measure both for the same tensors."
        )
    curvatures: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for argument, fisher, found in zip(
        ("previous_fisher", "new_fisher"), (previous_fisher, new_fisher), curvatures, strict=True
    ):
        for name, diagonal in fisher.items():
            _check(path, name, diagonal, argument)
            step = path.new[name].detach().double() - path.previous[name].detach().to(path.new[name].device).double()
            found[name] = float((step.square() * diagonal.to(step.device, step.dtype)).sum())
    return curvatures


def _check(path: LinearPath, name: str, diagonal: Tensor, argument: str) -> None:
    if name not in path.new:
        raise ValueError(f"{argument} has the tensor {name!r}, which the path lacks.")
    if diagonal.shape != path.new[name].shape:
        raise ValueError(
            f"{argument}[{name!r}] has shape {tuple(diagonal.shape)}, but the weights have {tuple(path.new[name].shape)}."
        )
    if not torch.isfinite(diagonal).all() or (diagonal < 0).any():
        raise ValueError(f"{argument}[{name!r}] must be finite and not negative: it is a mean of squares.")
