"""The loss along the linear path between two models, as a picture."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lit_rebasin.metrics.figures import COLORS
from lit_rebasin.transport.arguments import check_number, check_tensor

# How the losses before and after alignment are drawn.
STYLES: dict[str, dict[str, Any]] = {
    "before": {"label": "as trained", "color": COLORS[1], "marker": "o"},
    "after": {"label": "aligned", "color": COLORS[0], "marker": "s", "linestyle": "--"},
}


def path_figure(
    alphas: Tensor,
    before: Tensor,
    after: Tensor,
    alpha: float | None,
    task: int,
    other: str = "previous",
    accuracies: tuple[Tensor, Tensor] | None = None,
) -> Figure:
    """Draw the loss between the new model and another one, before and after alignment, and the accuracy beside it where it is given.

    Args:
        alphas: ``(points,)``, the weight of the other model.
        before: ``(points,)``, the loss without alignment.
        after: ``(points,)``, the loss with it.
        alpha: Where the two were merged, if anywhere.
        task: Index of the task just learned.
        other: Which model the other one is.
        accuracies: ``(points,)`` each, without alignment and with it.

    Raises:
        TypeError: If a curve is no tensor of real numbers, or ``alpha`` no number.
        ValueError: If the accuracies are no pair, or a curve has not as many points as there are alphas.
    """
    curves = {"loss": (before, after)} | ({"accuracy": accuracies} if accuracies is not None else {})
    for name, values in (("alphas", alphas), ("before", before), ("after", after)):
        _check_curve(name, values, alphas)
    if accuracies is not None:
        _check_pair(accuracies, alphas)
    if alpha is not None:
        check_number("alpha", alpha)
    figure = Figure(figsize=(5 if len(curves) == 1 else 8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (quantity, pair) in zip(panels, curves.items(), strict=True):
        for name, values in zip(STYLES, pair, strict=True):
            axes.plot(alphas.numpy(), values.numpy(), markersize=3, **STYLES[name])
        if alpha is not None:
            _mark(axes, alpha)
        axes.set(xlabel=f"alpha, weight of the {other} model", ylabel=quantity)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"Linear path to the {other} model, after task {task}")
    return figure


def _check_pair(accuracies: Sequence[Tensor], alphas: Tensor) -> None:
    if not isinstance(accuracies, Sequence):
        raise TypeError(f"accuracies must be a pair of tensors, got a {type(accuracies).__name__}.")
    if len(accuracies) != 2:
        raise ValueError(f"accuracies must be those without alignment and those with it, got {len(accuracies)}.")
    for index, values in enumerate(accuracies):
        _check_curve(f"accuracies[{index}]", values, alphas)


def _check_curve(name: str, curve: Tensor, alphas: Tensor) -> None:
    check_tensor(name, curve)
    if curve.ndim != 1 or len(curve) != len(alphas):
        raise ValueError(f"{name} must be (points,), as many as alphas, got {tuple(curve.shape)}.")


def _mark(axes: Axes, alpha: float) -> None:
    axes.axvline(alpha, color="0.5", linewidth=1)
    side, aside = ("right", -3) if alpha > 0.5 else ("left", 3)
    axes.annotate(
        f"merged at {alpha:.2f}",
        (alpha, 0),
        (aside, 4),
        ("data", "axes fraction"),
        "offset points",
        fontsize=8,
        color="0.4",
        horizontalalignment=side,
    )
