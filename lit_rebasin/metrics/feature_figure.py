"""How fast the features of every layer are learned, as a picture."""

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# A legend of more layers is not read.
_NAMED = 12


def feature_speed_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the relative change of the features a step: a line a layer, from the first (dark) to the last (bright).

    Args:
        curves: By layer, in order, one value a measurement.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(curves.items()):
        color = colormaps["viridis"](0.9 * index / max(1, len(curves) - 1))
        shown = [value if value > 0 else float("nan") for value in values]
        axes.plot(range(1, len(values) + 1), shown, color=color, marker="o", markersize=2.5, linewidth=1.2, label=name)
    axes.set(xlabel="measurement", ylabel="relative change of the features a step", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if len(curves) <= _NAMED:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure
