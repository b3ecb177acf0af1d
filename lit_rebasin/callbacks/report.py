"""What a merge leaves in the loggers. The tags are listed in ``docs/tensorboard.md``."""

from dataclasses import asdict

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rebasin.callbacks.merge import MergeOutcome
from lit_rebasin.callbacks.settings import MergeSettings
from lit_rebasin.metrics.path_figure import path_figure


def log_settings(trainer: "pl.Trainer", settings: MergeSettings) -> None:
    """Log the arguments of the callback as hyper-parameters of the run."""
    for logger in trainer.loggers:
        logger.log_hyperparams({f"rebasin_merge/{name}": value for name, value in asdict(settings).items()})


def log_merge(trainer: "pl.Trainer", outcome: MergeOutcome, task: int) -> None:
    """Log the numbers of a merge at step ``task``, its alignment's cost curve, and the path as a figure."""
    for logger in trainer.loggers:
        logger.log_metrics({f"merge/{name}": value for name, value in outcome.numbers.items()}, step=task)
        for step, cost in enumerate(outcome.alignment.history):
            logger.log_metrics({f"alignment/cost_task_{task:02d}": cost}, step=step)
        if isinstance(logger, TensorBoardLogger):
            alpha = outcome.numbers["alpha"]
            figure = path_figure(outcome.after.alphas, outcome.before.losses, outcome.after.losses, alpha, task)
            logger.experiment.add_figure("merge/path", figure, global_step=task)
        logger.save()
