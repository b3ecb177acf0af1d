"""Accuracy matrices and curves as pictures."""

from collections.abc import Mapping, Sequence
from math import ceil, isnan
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from lit_rebasin.metrics.continual import after_task, average_accuracy, check_matrix
from lit_rebasin.transport.arguments import check_count

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"


def check_drawn(name: str, drawn: Mapping[Any, Any]) -> None:
    """Raise an error unless an argument is a mapping that holds something to draw."""
    if not isinstance(drawn, Mapping):
        raise TypeError(f"{name} must be a mapping of what is drawn, got a {type(drawn).__name__}.")
    if not drawn:
        raise ValueError(f"{name} is empty, so there is nothing to draw.")


def accuracy_matrix_figure(matrix: Tensor) -> Figure:
    """Draw one accuracy matrix as a heat map."""
    check_matrix("matrix", matrix)
    return accuracy_matrices_figure({"": matrix})


def accuracy_matrices_figure(matrices: Mapping[str, Tensor], columns: int | None = None) -> Figure:
    """Draw the accuracy matrices of several methods side by side, with one colour scale.

    Args:
        matrices: By method.
        columns: The most that stand in a row; all of them by default.

    Raises:
        TypeError: If these are no matrices by name.
        ValueError: If there are none, one is not square, or ``columns`` is no whole number above 0.
    """
    check_drawn("matrices", matrices)
    for method, matrix in matrices.items():
        check_matrix(f"matrices[{method!r}]", matrix)
    if columns is not None:
        check_count("columns", columns)
    n_columns = min(columns or len(matrices), len(matrices))
    n_rows = ceil(len(matrices) / n_columns)
    figure = Figure(figsize=(3.6 * n_columns + 0.8, 3.9 * n_rows + 0.4), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes, (method, matrix) in zip(grid.flat, matrices.items(), strict=False):
        image = heat_map(axes, matrix)
        axes.set_title(method)
    for axes in grid.flat[len(matrices) :]:
        axes.remove()
    for row in grid:
        row[0].set_ylabel("task trained")
    figure.colorbar(
        image, ax=list(grid.flat[: len(matrices)]), label="accuracy", format=PercentFormatter(1), shrink=0.85
    )
    return figure


def accuracy_over_tasks_figure(matrices: Mapping[str, Sequence[Tensor]]) -> Figure:
    """Draw the average accuracy over the tasks seen so far: the mean over seeds, and the range as a band.

    Args:
        matrices: By method, one accuracy matrix a seed; a method without a name is not in the legend.

    Raises:
        TypeError: If these are no lists of matrices by name.
        ValueError: If there are none, or one is not square.
    """
    check_drawn("matrices", matrices)
    for method, seeds in matrices.items():
        _check_seeds(f"matrices[{method!r}]", seeds)
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (method, seeds) in enumerate(matrices.items()):
        curves = torch.tensor([[average_accuracy(after_task(m, t)) for t in range(len(m))] for m in seeds])
        tasks = range(1, curves.shape[1] + 1)
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        dashes = "-" if index < len(COLORS) else "--"
        axes.plot(
            tasks, curves.mean(0).numpy(), color=color, marker=marker, markersize=4, linestyle=dashes, label=method
        )
        axes.fill_between(
            tasks, curves.min(0).values.numpy(), curves.max(0).values.numpy(), color=color, alpha=0.18, linewidth=0
        )
    axes.set(xlabel="tasks learned", ylabel="average accuracy on them")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if any(matrices):
        axes.legend(frameon=False)
    return figure


def _check_seeds(name: str, seeds: Sequence[Tensor]) -> None:
    if not isinstance(seeds, Sequence):
        raise TypeError(f"{name} must be a list of accuracy matrices, one a seed, got a {type(seeds).__name__}.")
    for seed, matrix in enumerate(seeds):
        check_matrix(f"{name}[{seed}]", matrix)
    if len({len(matrix) for matrix in seeds}) != 1:
        raise ValueError(f"{name} must hold at least one accuracy matrix, all of as many tasks.")


def heat_map(axes: Axes, matrix: Tensor) -> AxesImage:
    """Draw an accuracy matrix into given axes."""
    n = len(matrix)
    image = axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
    axes.set_xlabel("task evaluated")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    if n <= 10:
        for row in range(n):
            for column in range(n):
                value = float(matrix[row, column])
                if isnan(value):  # not measured
                    continue
                color = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    return image
