"""Which group moves which axis of which weight, as a picture."""

from collections.abc import Iterator, Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from lit_rebasin.metrics.figures import COLORS
from lit_rebasin.symmetry import PermutationSpec

_ROWS = 40  # tensors in a column of the picture
_NAMED = 24  # groups up to which the legend names them
_CELLS = 24  # to which a dimension that several groups share is resolved
_HEIGHT = 0.84  # of a box; rows are 1 apart
_FIXED = "#DDDDDD"
_DARK = COLORS[:7]  # on which a white number can be read


def symmetry_figure(spec: PermutationSpec, shapes: Mapping[str, tuple[int, ...]]) -> Figure:
    """Draw a row a tensor and a box a dimension, in the colour and with the number of the group that moves it, or grey if it is fixed.

    Args:
        spec: The symmetries.
        shapes: Of the tensors to draw, in order.
    """
    names = list(shapes)
    groups = {name: number for number, name in enumerate(spec.groups, start=1)}
    legend = [(n, f"{n}  {name} ({spec.groups[name].size})") for name, n in groups.items()] + [(0, "fixed")]
    legend = legend if len(groups) <= _NAMED else []
    columns = [names[k : k + _ROWS] for k in range(0, len(names), _ROWS)] or [[]]
    rank = max([2, *map(len, shapes.values())])
    column_width = 0.085 * max(map(len, names), default=0) + 0.5 * rank + 0.3
    legend_width = 0.08 * max((len(text) for _, text in legend), default=0) + 0.7
    figure = Figure(
        figsize=(column_width * len(columns) + legend_width, 0.24 * len(columns[0]) + 0.8), layout="constrained"
    )
    strips = _strips(spec, shapes, groups)
    for axes, rows in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for row, name in enumerate(rows):
            for dim in range(len(shapes[name])):
                _draw_box(axes, row, dim, strips[name, dim])
        axes.set(xlim=(0, rank), ylim=(len(columns[0]) - 0.4, -0.6))
        axes.set_xticks([dim + 0.5 for dim in range(rank)], [f"[{dim}]" for dim in range(rank)], fontsize=8)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(rows)), rows, family="monospace", fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    if legend:
        handles = [Patch(color=_color(number), label=text) for number, text in legend]
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _strips(
    spec: PermutationSpec, shapes: Mapping[str, tuple[int, ...]], groups: Mapping[str, int]
) -> dict[tuple[str, int], list[Tensor]]:
    """Return, for each dimension, strips of one entry a position: the number of the group that moves it, or 0.

    There are several strips where several groups move the same positions, such as heads, and what is inside a head.
    """
    found = {
        (name, dim): [torch.zeros(n, dtype=torch.long)] for name, shape in shapes.items() for dim, n in enumerate(shape)
    }
    for name, group in spec.groups.items():
        for axis in group.axes:
            if axis.tensor in shapes:
                strips, entries = found[axis.tensor, axis.dim], axis.entries(group.size).flatten()
                if all(strip[entries].any() for strip in strips):
                    strips.append(torch.zeros_like(strips[0]))
                next(strip for strip in strips if not strip[entries].any())[entries] = groups[name]
    return found


def _draw_box(axes: Axes, row: int, dim: int, strips: list[Tensor]) -> None:
    height = _HEIGHT / len(strips)
    for level, strip in enumerate(strips):
        y = row - _HEIGHT / 2 + (level + 0.5) * height
        cells = [int(strip[k * len(strip) // _CELLS]) for k in range(_CELLS)] if len(strip) else []
        for start, stop, number in _runs(cells):
            left, width = dim + 0.03 + 0.94 * start / _CELLS, 0.94 * (stop - start) / _CELLS
            axes.barh(y, width, left=left, height=height, color=_color(number), edgecolor="white", linewidth=0.5)
            if number and stop - start > _CELLS // 6:
                size = 7 if len(strips) == 1 else 5
                axes.text(left + width / 2, y, str(number), color="white", fontsize=size, ha="center", va="center")


def _runs(cells: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield start, stop and value of each run of equal cells."""
    start = 0
    for k in range(1, len(cells) + 1):
        if k == len(cells) or cells[k] != cells[start]:
            yield start, k, cells[start]
            start = k


def _color(number: int) -> str:
    return _DARK[(number - 1) % len(_DARK)] if number else _FIXED
