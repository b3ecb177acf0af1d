"""Pictures for whatever loggers take them."""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import numpy as np
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_WARNED: "WeakSet[Logger]" = WeakSet()

# Gives a logger a figure, under a tag and at a step.
_Way = Callable[[Any, str, Figure, int], object]


@rank_zero_only
def log_figure(loggers: Iterable[Logger], tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Give a figure to every logger that takes pictures; it is drawn once, and only if there is one.

    TensorBoard gets it through ``add_figure``, and any logger with a method ``log_image(key, images, step)``, such as ``WandbLogger``, as an
    RGB array; MLflow as the artifact ``<tag>/step_<step>.png``, and Comet through ``log_figure``. If a logger fails to take it, a warning says
    so once a logger, and the training goes on.

    Args:
        loggers: Of the Trainer.
        tag: The name of the picture.
        draw: Makes the figure, without pyplot, so that nothing keeps it.
        step: Where it belongs.
    """
    takers = [(logger, way) for logger in loggers if (way := _way_into(logger)) is not None]
    if not takers:
        return
    figure = draw()
    for logger, give in takers:
        try:
            give(logger, tag, figure, step)
        except Exception as error:  # what a logger raises is its own; a picture is not worth a training
            _warn_once(logger, tag, error)


def _way_into(logger: Logger) -> _Way | None:
    if isinstance(logger, TensorBoardLogger):
        return _to_tensorboard
    # Of the class: Lightning's DummyLogger answers to any name.
    if callable(getattr(type(logger), "log_image", None)):
        return _to_log_image
    if isinstance(logger, MLFlowLogger):
        return _to_mlflow
    return _to_comet if isinstance(logger, CometLogger) else None


def _to_tensorboard(logger: TensorBoardLogger, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.add_figure(tag, figure, global_step=step)


def _to_log_image(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.log_image(key=tag, images=[_as_array(figure)], step=step)


def _to_mlflow(logger: MLFlowLogger, tag: str, figure: Figure, step: int) -> None:
    # Artifacts have no step but their name; zeros in front keep them in order.
    logger.experiment.log_figure(logger.run_id, figure, f"{tag}/step_{step:08d}.png")


def _to_comet(logger: CometLogger, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(figure_name=tag, figure=figure, step=step)


def _warn_once(logger: Logger, tag: str, error: Exception) -> None:
    if logger not in _WARNED:
        _WARNED.add(logger)
        rank_zero_warn(f"{type(logger).__name__} did not take the picture {tag}: {type(error).__name__}: {error}")


def _as_array(figure: Figure) -> np.ndarray:
    """Return the figure's pixels, ``(height, width, 3)`` in uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
