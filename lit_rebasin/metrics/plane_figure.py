"""The loss on the plane through three networks, as a picture."""

from collections.abc import Sequence
from math import ceil, floor, inf, log10

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_rebasin.merging import PlaneLosses

# Losses that lie this many times apart are marked at powers of ten, and parts of them.
_WIDE = 10
_TICKS = 7


def plane_figure(plane: PlaneLosses, names: Sequence[str]) -> Figure:
    """Draw the loss as a contour, with the three networks marked.

    Args:
        plane: What :func:`~lit_rebasin.loss_plane` measured.
        names: What the three networks are called.

    Raises:
        TypeError: If the plane is none, or the names are no list.
        ValueError: If there are not three names.
    """
    if not isinstance(plane, PlaneLosses):
        raise TypeError(f"plane must be what loss_plane gives, PlaneLosses, got a {type(plane).__name__}.")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list of three, one a network, got a {type(names).__name__}.")
    if len(names) != 3:
        raise ValueError(f"names must be three, one for each network, got {len(names)}.")
    losses = plane.losses.double().numpy()
    finite = losses[np.isfinite(losses)]
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.subplots()
    if not len(finite):
        axes.set_title("no loss of this plane is finite", fontsize=9)
    elif finite.max() - finite.min() > 1e-6 * abs(finite).max():  # else there is nothing to draw
        low, high = float(finite.min()), float(finite.max())
        logarithmic = low > 0  # the corners are far higher than the valleys
        levels = np.geomspace(low, high, 16) if logarithmic else np.linspace(low, high, 16)
        norm = "log" if logarithmic else "linear"
        drawn = axes.contourf(
            plane.x, plane.y, np.ma.masked_invalid(losses), levels=levels, cmap="viridis_r", norm=norm
        )
        axes.contour(plane.x, plane.y, np.ma.masked_invalid(losses), levels=levels, colors="white", linewidths=0.4)
        bar = figure.colorbar(drawn, ax=axes, label="loss", spacing="proportional")
        ticks = _ticks(low, high)
        bar.set_ticks(ticks, labels=_labels(ticks))
        bar.ax.minorticks_off()
    for (x, y), name, marker in zip(plane.corners.tolist(), names, "osD", strict=True):
        axes.plot(x, y, marker=marker, markersize=7, markerfacecolor="#D55E00", markeredgecolor="white", linestyle="")
        axes.annotate(name, (x, y), (6, 6), textcoords="offset points", fontsize=9, color="black").set_bbox(
            {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        )
    axes.set(xlabel="distance of the weights along the first two", ylabel="across, towards the third")
    axes.set(xlim=(float(plane.x[0]), float(plane.x[-1])), ylim=(float(plane.y[0]), float(plane.y[-1])))
    axes.set_aspect("equal")
    return figure


def _ticks(low: float, high: float) -> list[float]:
    """Return a few round losses between two."""
    if low > 0 and high > _WIDE * low:
        first, last = floor(log10(low)), ceil(log10(high))
        parts = (1, 2, 5) if last - first <= 3 else (1,)
        powers = range(first, last + 1, ceil((last - first) / _TICKS))
        ticks = [float(f"{part}e{power}") for power in powers for part in parts]
    else:
        ticks = list(map(float, MaxNLocator(_TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
    return [tick for tick in ticks if low <= tick <= high]


def _labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks in as many digits as show each within a hundredth of the gap to the next."""
    gap = min(np.diff(ticks), default=inf)
    for digits in range(6, 17):
        labels = [f"{tick:.{digits}g}" for tick in ticks]
        if all(abs(float(label) - tick) < 0.01 * gap for label, tick in zip(labels, ticks, strict=True)):
            break
    return labels
