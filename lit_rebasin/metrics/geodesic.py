"""Whether a network moves its data along straight lines, and to where optimal transport would move them."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from typing_extensions import override

from lit_rebasin.metrics.tracks import same_space
from lit_rebasin.transport.arguments import check_points, check_tensor

# Steps shorter than this share of the longest one of the way have no direction.
_SHORTEST = 1e-8

_PREFERENCE = 1e-9  # for a point's own image among equally good ones, as a share of the mean squared step


def line_shape_scores(track: Sequence[Tensor]) -> Tensor:
    """Return how straight the way of each sample through the layers is: 1 for a straight line, above 1 for a bent one.

    With steps of unit length, ``z_0 = x_0`` and ``z_l = z_{l-1} + (x_l - x_{l-1}) / |x_l - x_{l-1}|``, the score is ``L / |z_L - z_0|`` (Gai
    and Zhang, arXiv 2102.09235). It does not say whether the steps are of one length. A step that is zero, or next to it beside the others,
    is one of no direction, and makes the score larger.

    Args:
        track: ``(B, width)`` for each of the L + 1 layers, at least three; of several widths they are brought to one by
            :func:`~lit_rebasin.metrics.same_space`.

    Returns:
        ``(B,)``; infinity for a sample that comes back to where it was.

    Raises:
        TypeError: If the track is no list of tensors of real numbers.
        ValueError: If there are fewer than three layers, or they are not ``(B, width)``.
    """
    layers = _checked(track)
    if len(layers) < 3:
        raise ValueError(f"A track needs at least three layers, for two points are on a line; got {len(layers)}.")
    points = torch.stack(same_space([layer.double() for layer in layers]))
    steps = points.diff(dim=0)
    lengths = steps.norm(dim=2, keepdim=True)
    shortest = (_SHORTEST * lengths.amax(0)).clamp(min=torch.finfo(lengths.dtype).tiny)
    unit = steps / torch.maximum(lengths, shortest)
    found: Tensor = len(steps) / unit.sum(0).norm(dim=1)
    return found


def optimal_transport_score(start: Tensor, end: Tensor) -> tuple[float, float]:
    """Return how near the pairing of samples before and after some layers is to the optimal one between the two clouds.

    The score is ``W_2^2 / mean_i |x_i - T(x_i)|^2``, in [0, 1], and 1 if no other pairing is shorter. This is a definition of our own, for that
    of Gai and Zhang (arXiv 2102.09235) was not at hand.

    Args:
        start: ``(B, width)``, the points ``x_i``.
        end: ``(B, width)``, their images ``T(x_i)``.

    Returns:
        The score, and the share of the samples that the optimal plan sends to their own image; of several optimal plans that with the
        largest share counts.

    Raises:
        TypeError: If the points are no tensors of real numbers.
        ValueError: If the shapes differ, or a point is NaN or infinite.
    """
    for name, points in (("start", start), ("end", end)):
        check_points(name, points)
    if start.shape != end.shape:
        raise ValueError(
            f"start and end must be (B, width) of one shape, got {tuple(start.shape)} and {tuple(end.shape)}."
        )
    before, after = start.detach().double().cpu(), end.detach().double().cpu()
    costs = torch.cdist(before, after, compute_mode="donot_use_mm_for_euclid_dist").square()
    learned = float(costs.diagonal().mean())
    if learned == 0:
        return 1.0, 1.0
    preferring = costs - _PREFERENCE * learned * torch.eye(len(costs), dtype=costs.dtype)
    rows, images = (torch.from_numpy(indices) for indices in linear_sum_assignment(preferring.numpy()))
    optimal = float(costs[rows, images].mean())
    return min(1.0, optimal / learned), float((rows == images).double().mean())


class LineShapeScore(Metric):
    """The mean over samples of :func:`~lit_rebasin.line_shape_scores`, from tracks.

    ``update`` takes a track, ``(B, width)`` for each of at least three layers. At least 1, and 1 for straight lines (Gai and Zhang, arXiv
    2102.09235).

    Raises:
        TypeError: If a track is no list of tensors of real numbers.
        ValueError: If there are fewer than three layers, or they are not ``(B, width)``.

    Example::

        metric = LineShapeScore()
        metric.update([x_0, x_1, x_2])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 1.0

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, track: Sequence[Tensor]) -> None:
        """Take in the ways of some samples."""
        scores = line_shape_scores(track)
        self.total += scores.sum().to(self.total.device)
        self.count += len(scores)

    @override
    def compute(self) -> Tensor:
        """Return the mean score, in float64."""
        return self.total / self.count

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value, or several after each other."""
        return self._plot(val, ax)


class OptimalTransportScore(Metric):
    """:func:`~lit_rebasin.optimal_transport_score` of all samples that it was given.

    ``update`` takes a track of at least two layers, ``(B, width)`` each, of which the first and the last count; where they have two widths,
    the last is turned onto the first as :func:`~lit_rebasin.metrics.same_space` does. The clouds are kept as a whole, for the optimal plan is
    one of all of them: a thousand samples take a second.

    Raises:
        TypeError: If a track is no list of tensors of real numbers.
        ValueError: If there are fewer than two layers, they are not ``(B, width)``, the first or the last holds NaN or infinity, or has another
            width than in an earlier update.

    Example::

        metric = OptimalTransportScore()
        metric.update([x_0, x_1, x_2])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    start: list[Tensor]
    end: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("start", "end"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @override
    def update(self, track: Sequence[Tensor]) -> None:
        """Take in where some samples begin and end."""
        layers = _checked(track)
        if len(layers) < 2:
            raise ValueError(f"A track needs at least two layers, a first and a last, got {len(layers)}.")
        for place, points, kept in ((0, layers[0], self.start), (len(layers) - 1, layers[-1], self.end)):
            check_points(f"track[{place}]", points)
            _check_widths(f"track[{place}]", [*kept, points])
        self.start.append(layers[0].detach())
        self.end.append(layers[-1].detach())

    @override
    def compute(self) -> Tensor:
        """Return the score, in float64; NaN before any update."""
        return self._both()[0]

    @property
    def matched(self) -> Tensor:
        """The share of the samples that the optimal plan sends to their own image."""
        return self._both()[1]

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value, or several after each other."""
        return self._plot(val, ax)

    def _both(self) -> tuple[Tensor, Tensor]:
        if not len(self.start):
            return torch.tensor(nan, dtype=torch.float64), torch.tensor(nan, dtype=torch.float64)
        for name, kept in (("The first layer", self.start), ("The last layer", self.end)):
            _check_widths(name, kept)  # of updates by forward, which do not see each other
        start, end = same_space([dim_zero_cat(points).double() for points in (self.start, self.end)])
        score, matched = optimal_transport_score(start, end)
        return torch.tensor(score, dtype=torch.float64), torch.tensor(matched, dtype=torch.float64)


def _checked(track: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(track, Tensor | Mapping | str) or not isinstance(track, Iterable):
        raise TypeError(f"track must be a list of tensors (B, width), one a layer, got a {type(track).__name__}.")
    points = list(track)
    for index, layer in enumerate(points):
        check_tensor(f"track[{index}]", layer)
        if layer.ndim != 2 or len(layer) != len(points[0]) or not len(layer):
            raise ValueError(
                f"Every layer of a track must be (B, width) with one B of at least 1, got {tuple(layer.shape)} in place {index} beside "
                f"{tuple(points[0].shape)} in place 0."
            )
    return points


def _check_widths(name: str, parts: Iterable[Tensor]) -> None:
    widths = list(dict.fromkeys(points.shape[-1] for points in parts))
    if len(widths) > 1:
        raise ValueError(f"{name} must have one width in all updates, got {widths[1]} after {widths[0]}.")
