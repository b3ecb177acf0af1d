"""The ways of samples through the layers, as a picture."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lit_rebasin.metrics.figures import check_drawn
from lit_rebasin.transport.arguments import check_points

# More lines than these hide each other.
_SAMPLES = 60
# Letters that a title has room for.
_LONG = 36


def tracks_figure(tracks: Mapping[str, Sequence[Tensor]], ends: Mapping[str, str] | None = None) -> Figure:
    """Draw tracks in the plane that holds most of each: a line a sample, from where it begins (dark) to where it ends (bright).

    Args:
        tracks: By the name of the first layer, points ``(B, width)`` of one width.
        ends: By the same name, that of the last layer, where it is to be said.

    Raises:
        TypeError: If these are no lists of tensors of real numbers by name.
        ValueError: If there are none, or the points of a track are not all ``(B, width)``, or one is NaN or infinite.
    """
    check_drawn("tracks", tracks)
    for name, track in tracks.items():
        _check_track(f"tracks[{name!r}]", track)
    columns = 2 if len(tracks) == 4 else min(3, len(tracks))
    rows = -(-len(tracks) // columns)
    figure = Figure(figsize=(3.9 * columns + 0.6, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(tracks) :]:
        axes.set_visible(False)
    last = None
    for axes, (name, track) in zip(panels, tracks.items(), strict=False):
        points = _plane(torch.stack(list(track))[:, :_SAMPLES].double().cpu())  # (layers, samples, 2)
        for sample in points.transpose(0, 1).numpy():
            segments = [sample[layer : layer + 2] for layer in range(len(sample) - 1)]
            lines = LineCollection(segments, cmap="viridis", linewidths=1, alpha=0.8)
            lines.set_array(range(1, len(sample)))
            last = axes.add_collection(lines)
        axes.scatter(*points[-1].T.numpy(), s=8, color="#FDE725", edgecolors="0.3", linewidths=0.3, zorder=3)
        axes.scatter(*points[0].T.numpy(), s=8, color="#440154", zorder=3)
        axes.set(xlabel="first principal axis", ylabel="second")
        axes.set_title(_title(name, (ends or {}).get(name), len(points) - 1), fontsize=10, parse_math=False)
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[["top", "right"]].set_visible(False)
    if last is not None:
        figure.colorbar(last, ax=list(panels), label="step", shrink=0.85, ticks=MaxNLocator(integer=True))
    return figure


def _check_track(name: str, track: Sequence[Tensor]) -> None:
    if not isinstance(track, Sequence):
        raise TypeError(f"{name} must be a list of tensors (B, width), one a layer, got a {type(track).__name__}.")
    for layer, points in enumerate(track):
        check_points(f"{name}[{layer}]", points)
    shapes = list(dict.fromkeys(tuple(points.shape) for points in track))
    if len(shapes) != 1:
        raise ValueError(
            f"{name} must have points of one shape in all layers, got {shapes}: same_space brings them to one width."
        )


def _title(first: str, last: str | None, steps: int) -> str:
    way = f"from {first}" + (f" to {last}" if last is not None else "")
    if len(way) > _LONG:
        way = way.replace(" to ", "\nto ")
    return f"{way}, {steps} step{'s' * (steps != 1)}"


def _plane(points: Tensor) -> Tensor:
    """Return the points in the two principal axes of all of them."""
    flat = points.flatten(0, 1)
    flat = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    chosen = axes[:2]
    found: Tensor = (flat @ chosen.T).unflatten(0, points.shape[:2])
    return found
