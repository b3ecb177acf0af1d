"""What was measured in the course of a training, as curves over its steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lit_rebasin.metrics.path_figure import STYLES

_COLUMNS = 3  # panels in a row
_NAMED = 12  # a longer legend is not read
_DECADES = 100.0  # from this ratio of the largest to the smallest value on, an axis is logarithmic
_DOTTED = 60  # measurements that are marked one by one
# How the two curves of a number with and without alignment are drawn.
_PAIR = {style["label"]: {key: value for key, value in style.items() if key != "label"} for style in STYLES.values()}


@dataclass(frozen=True)
class Curve:
    """A number over the steps of a training, in several seeds; NaN where it was not measured.

    Attributes:
        steps: ``(points,)``, ascending.
        values: ``(seeds, points)``.
    """

    steps: Tensor
    values: Tensor


def curves_figure(panels: Mapping[str, Mapping[str, Curve]], marks: Sequence[int] = ()) -> Figure:
    """Draw a panel a quantity, a curve a name: the mean over seeds, and the range as a band.

    A name has one colour in all panels, from the first (dark) to the last (bright). The legend names twelve at most; see :func:`legend_names`.
    Where all values of a panel are positive and the largest is a hundred times the smallest or more, its axis is logarithmic.

    Args:
        panels: By quantity, and by what it is of, such as a layer; ``""`` for a number of the whole network.
        marks: Steps at which grey lines stand.
    """
    n_columns = 2 if len(panels) == 4 else min(_COLUMNS, len(panels))
    n_rows = ceil(len(panels) / n_columns)
    styles = _styles(dict.fromkeys(name for curves in panels.values() for name in curves))
    named = [name for name in styles if name]
    shown = legend_names(named)
    n_lines = ceil(len(shown) / _COLUMNS)
    figure = Figure(figsize=(max(4.6, 3.55 * n_columns), 2.15 * n_rows + 0.35 + 0.2 * n_lines), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, squeeze=False)
    for index, (title, curves) in enumerate(panels.items()):
        axes = grid.flat[index]
        _draw(axes, curves, styles, marks)
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=8, labelbottom=index + n_columns >= len(panels))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supxlabel("optimizer step", fontsize=9)
    if named:
        handles = [Line2D([], [], **styles[name], markersize=4) for name in shown]
        legend = figure.legend(handles, shown, loc="outside upper center", ncols=_COLUMNS, frameon=False, fontsize=8)
        for entry in legend.get_texts():
            entry.set_parse_math(False)
    return figure


def legend_names(names: Sequence[str]) -> list[str]:
    """Return what a legend names: all of up to twelve names, else twelve: with and without alignment, and layers at even distances."""
    if len(names) <= _NAMED:
        return list(names)
    layers = [name for name in names if name not in _PAIR]
    count = _NAMED - (len(names) - len(layers))
    kept = {layers[round(index * (len(layers) - 1) / (count - 1))] for index in range(count)}
    return [name for name in names if name in _PAIR or name in kept]


def _styles(names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return how the curve of each name is drawn."""
    layers = [name for name in names if name and name not in _PAIR]
    colors = {name: colormaps["viridis"](0.88 * index / max(1, len(layers) - 1)) for index, name in enumerate(layers)}
    return {name: _PAIR.get(name, {"color": colors.get(name, "0.25"), "marker": "o"}) for name in names}


def _draw(
    axes: Axes, curves: Mapping[str, Curve], styles: Mapping[str, Mapping[str, Any]], marks: Sequence[int]
) -> None:
    for mark in marks:
        axes.axvline(mark, color="0.85", linewidth=0.8, zorder=0)
    for name, curve in curves.items():
        style = dict(styles[name])
        known = curve.values.isfinite().any(0)
        steps, values = curve.steps[known].numpy(), curve.values[:, known]
        values = values.where(values.isfinite(), float("nan"))
        axes.plot(
            steps, values.nanmean(0).numpy(), **style, markersize=2.5 if len(steps) <= _DOTTED else 0, linewidth=1.2
        )
        low, high = values.nan_to_num(float("inf")).amin(0), values.nan_to_num(float("-inf")).amax(0)
        axes.fill_between(steps, low.numpy(), high.numpy(), color=style["color"], alpha=0.18, linewidth=0)
    if _spans_decades(curves):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def _spans_decades(curves: Mapping[str, Curve]) -> bool:
    found = [curve.values[curve.values.isfinite()] for curve in curves.values()]
    values = [(float(one.min()), float(one.max())) for one in found if one.numel()]
    lowest, highest = min((low for low, _ in values), default=0.0), max((high for _, high in values), default=0.0)
    return lowest > 0 and highest / lowest >= _DECADES
