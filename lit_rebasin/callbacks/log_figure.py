"""Pictures for whatever loggers take them."""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_WARNED: "WeakSet[Logger]" = WeakSet()


@rank_zero_only
def log_figure(loggers: Iterable[Logger], tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Give a figure to every logger that takes pictures; it is drawn once, and only if there is one.

    TensorBoard gets it through ``add_figure``. Any other logger with a method ``log_image(key, images, step)``, such as ``WandbLogger``,
    gets it as an RGB array. If that method fails, a warning says so once a logger, and the training goes on.

    Args:
        loggers: Of the Trainer.
        tag: The name of the picture.
        draw: Makes the figure, without pyplot, so that nothing keeps it.
        step: Where it belongs.
    """
    takers = [logger for logger in loggers if isinstance(logger, TensorBoardLogger) or _takes_images(logger)]
    if not takers:
        return
    figure = draw()
    for logger in takers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, global_step=step)
        else:
            _log_image(logger, tag, figure, step)


def _takes_images(logger: Logger) -> bool:
    # Of the class: Lightning's DummyLogger answers to any name.
    return callable(getattr(type(logger), "log_image", None))


def _log_image(logger: Any, tag: str, figure: Figure, step: int) -> None:
    image = _as_array(figure)
    try:
        logger.log_image(key=tag, images=[image], step=step)
    except Exception as error:  # what a logger raises is its own; a picture is not worth a training
        if logger not in _WARNED:
            _WARNED.add(logger)
            rank_zero_warn(f"{type(logger).__name__} did not take the picture {tag}: {type(error).__name__}: {error}")


def _as_array(figure: Figure) -> np.ndarray:
    """Return the figure's pixels, ``(height, width, 3)`` in uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
