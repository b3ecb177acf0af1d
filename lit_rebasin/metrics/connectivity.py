"""The loss barrier between two networks, from losses along the path that come batch by batch."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lit_rebasin.merging import PathLosses
from lit_rebasin.merging.path import grid
from lit_rebasin.transport.arguments import check_count, check_tensor


class Barrier(Metric):
    """The loss barrier on a linear path (Frankle et al., ICML 2020), signed: :attr:`PathLosses.barrier` of the mean losses.

    ``update`` takes the mean losses of a batch at evenly spaced points of the path, ``(points,)`` from alpha 0, the new network, to alpha 1,
    the previous one, and how many examples the batch has. The barrier is that of the mean over all examples, and not the mean of barriers.

    Args:
        points: How many points, ends included.
        **kwargs: Of :class:`~torchmetrics.Metric`.

    Raises:
        TypeError: If the losses of an update are no tensor of real numbers.
        ValueError: If there are fewer than 3 points, or an update does not fit.

    Example::

        metric = Barrier(points=5)
        for x, y in batches:
            metric.update(torch.stack([loss(path.at(alpha), x, y) for alpha in (0, 0.25, 0.5, 0.75, 1)]), len(x))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    examples: Tensor

    def __init__(self, points: int = 21, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alphas = grid(points)
        self.add_state("total", torch.zeros(points, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("examples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, losses: Tensor, examples: int = 1) -> None:
        """Take in the losses of a batch."""
        check_tensor("losses", losses)
        if losses.shape != self.total.shape:
            raise ValueError(f"losses must be one a point, ({len(self.total)},), got shape {tuple(losses.shape)}.")
        check_count("examples", examples)
        self.total += examples * losses.detach().to(self.total)
        self.examples += examples

    @override
    def compute(self) -> Tensor:
        """Return the barrier, in float64."""
        return torch.tensor(self.path.barrier, dtype=torch.float64, device=self.total.device)

    @property
    def path(self) -> PathLosses:
        """The mean losses along the path, with their area."""
        return PathLosses(self.alphas, (self.total / self.examples).cpu())

    @override
    def plot(self, val: Any = None, ax: Axes | None = None) -> tuple[Figure | None, Axes]:
        """Draw the mean loss along the path, and the straight line between its ends.

        Args:
            val: Losses ``(points,)`` that were computed before. Default: those of now.
            ax: Where to draw. Default: a figure of its own.

        Returns:
            The figure, ``None`` where ``ax`` is given, and the axes.
        """
        figure = None
        if ax is None:
            figure = Figure(layout="constrained")
            ax = figure.subplots()
        losses = self.path.losses if val is None else val
        ax.plot(self.alphas.numpy(), losses.numpy(), marker="o", markersize=3)
        ax.plot([0, 1], [float(losses[0]), float(losses[-1])], color="0.6", linestyle="--", linewidth=1)
        ax.set(xlabel="alpha, weight of the previous model", ylabel="loss")
        return figure, ax
