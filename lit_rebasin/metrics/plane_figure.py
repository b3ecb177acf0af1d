"""The loss on the plane through three networks, as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lit_rebasin.merging import PlaneLosses


def plane_figure(plane: PlaneLosses, names: Sequence[str]) -> Figure:
    """Draw the loss as a contour, with the three networks marked.

    Args:
        plane: What :func:`~lit_rebasin.merging.loss_plane` measured.
        names: What the three networks are called.
    """
    losses = plane.losses.numpy()
    finite = losses[np.isfinite(losses)]
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.subplots()
    if len(finite) and finite.max() - finite.min() > 1e-6 * abs(finite).max():  # else there is nothing to draw
        low, high = float(finite.min()), float(finite.max())
        logarithmic = low > 0  # the corners are far higher than the valleys
        levels = np.geomspace(low, high, 16) if logarithmic else np.linspace(low, high, 16)
        norm = "log" if logarithmic else "linear"
        drawn = axes.contourf(
            plane.x, plane.y, np.ma.masked_invalid(losses), levels=levels, cmap="viridis_r", norm=norm
        )
        axes.contour(plane.x, plane.y, np.ma.masked_invalid(losses), levels=levels, colors="white", linewidths=0.4)
        bar = figure.colorbar(drawn, ax=axes, label="loss", format="%.2g")
        bar.ax.minorticks_off()
    for (x, y), name, marker in zip(plane.corners.tolist(), names, "osD", strict=True):
        axes.plot(x, y, marker=marker, markersize=7, markerfacecolor="#D55E00", markeredgecolor="white", linestyle="")
        axes.annotate(name, (x, y), (6, 6), textcoords="offset points", fontsize=9, color="black").set_bbox(
            {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        )
    axes.set(xlabel="distance of the weights along the first two", ylabel="across, towards the third")
    axes.set_aspect("equal")
    return figure
