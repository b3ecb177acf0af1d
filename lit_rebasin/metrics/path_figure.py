"""The loss along the linear path between two models, as a picture."""

from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from lit_rebasin.metrics.figures import COLORS

# How the losses before and after alignment are drawn.
STYLES: dict[str, dict[str, Any]] = {
    "before": {"label": "as trained", "color": COLORS[1], "marker": "o"},
    "after": {"label": "aligned", "color": COLORS[0], "marker": "s", "linestyle": "--"},
}


def path_figure(alphas: Tensor, before: Tensor, after: Tensor, alpha: float | None, task: int) -> Figure:
    """Draw the loss between the previous and the new model, before and after alignment.

    Args:
        alphas: ``(points,)``, the weight of the previous model.
        before: ``(points,)``, the loss without alignment.
        after: ``(points,)``, the loss with it.
        alpha: Where the two were merged, if anywhere.
        task: Index of the task just learned.
    """
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, losses in {"before": before, "after": after}.items():
        axes.plot(alphas.numpy(), losses.numpy(), markersize=3, **STYLES[name])
    if alpha is not None:
        axes.axvline(alpha, color="0.5", linewidth=1)
        axes.annotate(
            f"merged at {alpha:.2f}",
            (alpha, 0),
            (3, 4),
            ("data", "axes fraction"),
            "offset points",
            fontsize=8,
            color="0.4",
        )
    axes.set(
        xlabel="alpha, weight of the previous model",
        ylabel="loss",
        title=f"Linear path after task {task}",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
