"""How fast the features of every layer are learned, as a picture."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_rebasin.metrics.curve_figure import legend_names


def feature_speed_figure(curves: Mapping[str, Sequence[tuple[float, float]]], tasks: Iterable[float] = ()) -> Figure:
    """Draw the relative change of the features a step: a line a layer, from the first (dark) to the last (bright); twelve are named at most.

    Args:
        curves: By layer, in order, the measurements: how many epochs had been trained, and the change.
        tasks: After how many epochs a new task began; a thin line each.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for begun in tasks:
        axes.axvline(begun, color="0.8", linewidth=1, zorder=0)
    for index, (name, points) in enumerate(curves.items()):
        color = colormaps["viridis"](0.9 * index / max(1, len(curves) - 1))
        shown = [speed if speed > 0 else float("nan") for _, speed in points]
        epochs = [epoch for epoch, _ in points]
        axes.plot(epochs, shown, color=color, marker="o", markersize=2.5, linewidth=1.2, label=name)
    axes.set(xlabel="epochs trained", ylabel="relative change of the features a step", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    lines = dict(zip(curves, axes.get_lines()[-len(curves) :], strict=True)) if curves else {}
    named = legend_names(list(curves))
    legend = figure.legend([lines[name] for name in named], named, loc="outside right upper", frameon=False, fontsize=8)
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    return figure
