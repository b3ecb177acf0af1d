"""What the merges of a whole stream did, as pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, nan
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from lit_rebasin.metrics.figures import COLORS, MARKERS, check_drawn
from lit_rebasin.metrics.path_figure import STYLES
from lit_rebasin.transport.arguments import check_tensor

_COLUMNS = 5  # small multiples in a row


@dataclass(frozen=True)
class MergePaths:
    """The losses along the paths of one merge, in the seeds of a method; NaN where none was measured.

    Attributes:
        alphas: ``(points,)``, the weight of the previous model.
        before: ``(seeds, points)``, the loss without alignment.
        after: ``(seeds, points)``, the loss with it.
        merged_at: ``(seeds,)``, the alpha of the merge.
    """

    alphas: Tensor
    before: Tensor
    after: Tensor
    merged_at: Tensor

    @property
    def moved(self) -> bool:
        """Whether the alignment made any difference."""
        return not torch.equal(self.before.nan_to_num(), self.after.nan_to_num())


def paths_figure(merges: Mapping[int, MergePaths]) -> Figure:
    """Draw the loss along every merge as small multiples with one scale: the mean over seeds, the range as a band, alpha as a grey line.

    Where no merge had its networks aligned, there is one curve.

    Args:
        merges: By the task that was merged in.

    Raises:
        TypeError: If these are no :class:`MergePaths` by task.
        ValueError: If there are none.
    """
    check_drawn("merges", merges)
    for task, paths in merges.items():
        if not isinstance(paths, MergePaths):
            raise TypeError(f"merges[{task!r}] must be MergePaths, got a {type(paths).__name__}.")
    n_columns = min(_COLUMNS, len(merges))
    n_rows = ceil(len(merges) / n_columns)
    figure = Figure(figsize=(max(5.0, 2.15 * n_columns + 0.4), 1.75 * n_rows + 0.85), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    aligned = any(paths.moved for paths in merges.values())
    for index, (task, paths) in enumerate(merges.items()):
        axes = grid.flat[index]
        _draw_paths(axes, paths, aligned)
        axes.set_title(f"task {task}", fontsize=9)
        axes.tick_params(labelsize=8, labelbottom=index + n_columns >= len(merges))
    for axes in grid.flat[len(merges) :]:
        axes.remove()
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("alpha, weight of the previous model", fontsize=9)
    figure.supylabel("loss on training batches", fontsize=9)
    return figure


def _draw_paths(axes: Axes, paths: MergePaths, aligned: bool) -> None:
    for alpha in paths.merged_at[paths.merged_at.isfinite()].unique().tolist():
        axes.axvline(alpha, color="0.6", linewidth=1, label="merged here" if not axes.lines else None)
    for name, losses in {"before": paths.before, **({"after": paths.after} if aligned else {})}.items():
        _draw_seeds(axes, paths.alphas, losses, {**STYLES[name], "markersize": 2.5, "linewidth": 1.2})
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def displacement_figure(shares: Mapping[int, Mapping[str, float]]) -> Figure:
    """Draw the share of the neurons that each merge moved, by permutation group, as a heat map.

    Args:
        shares: By the task that was merged in, and by the name of the group.

    Raises:
        TypeError: If these are no shares by task and group.
        ValueError: If there are none, or a task has none.
    """
    check_drawn("shares", shares)
    for task, by_group in shares.items():
        check_drawn(f"shares[{task!r}]", by_group)
    tasks = sorted(shares)
    groups = list(dict.fromkeys(name for task in tasks for name in shares[task]))
    values = torch.tensor([[shares[task].get(name, nan) for task in tasks] for name in groups])
    width, height = max(4.6, 0.4 * len(tasks) + 3.2), max(1.9, 0.3 * len(groups) + 1.3)
    figure = Figure(figsize=(min(width, 12), min(height, 18)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(tasks)), [str(task) for task in tasks], fontsize=8)
    axes.set_yticks(range(len(groups)), [_shortened(name) for name in groups], fontsize=8, parse_math=False)
    axes.set(xlabel="task merged in", ylabel="permutation group")
    if len(tasks) <= 20:
        _write_shares(axes, values)
    figure.colorbar(image, ax=axes, label="neurons moved", format=PercentFormatter(1))
    return figure


def _write_shares(axes: Axes, values: Tensor) -> None:
    for row, column in values.isfinite().nonzero().tolist():
        share = float(values[row, column])
        color = "black" if share > 0.6 else "white"
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)


def alpha_figure(alphas: Mapping[str, Mapping[int, Tensor]]) -> Figure:
    """Draw alpha, the weight of the previous model, over the tasks: the mean over seeds, and the range as a band.

    Args:
        alphas: By method, and by the task that was merged in: ``(seeds,)``.

    Raises:
        TypeError: If these are no tensors by method and task.
        ValueError: If there are none, or a method has none.
    """
    check_drawn("alphas", alphas)
    for method, by_task in alphas.items():
        check_drawn(f"alphas[{method!r}]", by_task)
        for task, values in by_task.items():
            check_tensor(f"alphas[{method!r}][{task!r}]", values)
    figure = Figure(figsize=(4.9, 2.6), layout="constrained")
    axes = figure.subplots()
    for index, (method, by_task) in enumerate(alphas.items()):
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        _draw_seeds(
            axes, torch.tensor(list(by_task)), torch.stack(list(by_task.values()), 1), {**style, "label": method}
        )
    axes.set(xlabel="task merged in", ylabel="alpha, weight of\nthe previous model", ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure


def _draw_seeds(axes: Axes, x: Tensor, values: Tensor, style: Mapping[str, Any]) -> None:
    """Draw curves ``(seeds, points)``: their mean, and their range as a band."""
    axes.plot(x.numpy(), values.nanmean(0).numpy(), **style)
    low, high = values.nan_to_num(torch.inf).min(0).values, values.nan_to_num(-torch.inf).max(0).values
    axes.fill_between(x.numpy(), low.numpy(), high.numpy(), color=style["color"], alpha=0.18, linewidth=0)


def _shortened(name: str) -> str:
    """Return the end of a long name, which tells layers apart."""
    return name if len(name) <= 36 else f"…{name[-35:]}"
