"""The loss barrier between two networks on data."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lit_rebasin.alignment.progress import shown
from lit_rebasin.merging.data import arguments_of, evaluating, labelled
from lit_rebasin.merging.path import LinearPath, PathLosses, grid


def loss_barrier(
    path: LinearPath,
    dataloader: Iterable[Any],
    points: int = 21,
    *,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    statistics: Callable[[nn.Module, float], object] | None = None,
) -> PathLosses:
    """Measure the loss, and the accuracy of a classifier, along the path between two modules.

    The barrier of Frankle et al. (ICML 2020) is ``.barrier`` of what is returned; Entezari et al. (ICLR 2022) take training data for it, others
    test data. Networks run in evaluation mode. A loss that is NaN or infinite is reported as it is.

    Args:
        path: The path between two modules.
        dataloader: Batches that begin with an input and a target, each one example a row; read once a point.
        points: Number of evenly spaced alphas, ends included.
        loss: ``loss(output, target)``, the mean over a batch. Batches are weighed by their examples.
        statistics: ``statistics(network, alpha)`` gives a merge statistics of its own, in place, before it is measured; see
            :func:`~lit_rebasin.repair`. Called on a copy at every point but the ends, which are measured as they are.

    Returns:
        The losses, with accuracies where the targets are class indices and dimension 1 of the output holds the classes.

    Raises:
        TypeError: If the path is one of weights alone, or a batch does not begin with an input and a target.
        ValueError: If there are fewer than 3 points, or no batches.
    """
    network, alphas = path.network, grid(points)
    means = []
    for alpha in shown(alphas.tolist(), "Loss along the path", points):
        if statistics is None or alpha in (0, 1):
            means.append(_means(network, path.at(alpha), dataloader, loss))
        else:
            merged = path.module_at(alpha)
            statistics(merged, alpha)
            means.append(_means(merged, {}, dataloader, loss))
    losses = torch.tensor([mean for mean, _ in means], dtype=torch.float64)
    shares = [share for _, share in means if share is not None]
    return PathLosses(alphas, losses, torch.tensor(shares, dtype=torch.float64) if len(shares) == points else None)


def _means(
    network: nn.Module, weights: dict[str, Tensor], dataloader: Iterable[Any], loss: Callable[[Any, Any], Tensor]
) -> tuple[float, float | None]:
    """Return the mean loss over the examples, and the share of correct classes if every batch has them."""
    examples, total = 0, 0.0
    decisions, correct, classified = 0, 0, True
    with torch.no_grad(), evaluating(network):
        for inputs, target in labelled(dataloader, network):
            output = functional_call(network, weights, arguments_of(inputs))
            total += float(loss(output, target)) * len(target)
            examples += len(target)
            classified = classified and _has_classes(output, target)
            if classified:
                correct += int((output.argmax(1) == target).sum())
                decisions += target.numel()
    return total / examples, correct / decisions if classified else None


def _has_classes(output: Any, target: Any) -> bool:
    """Return whether targets are indices into dimension 1 of the output."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or target.dtype.is_floating_point:
        return False
    return output.ndim >= 2 and output.shape[:1] + output.shape[2:] == target.shape
