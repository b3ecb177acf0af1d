"""Weights that another callback averages while a task is trained, which are the network of that task."""

from collections.abc import Iterator
from itertools import chain

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lit_rebasin.continual.task_end import epochs_per_task


def check_averages(trainer: "pl.Trainer") -> None:
    """Raise a MisconfigurationException where an average would go over the tasks of a stream."""
    if epochs_per_task(trainer) and any(isinstance(one, StochasticWeightAveraging) for one in _callbacks(trainer)):
        raise MisconfigurationException(
            "StochasticWeightAveraging begins once a fit, so it cannot average each task of a stream: train one fit a task, or use "
            "EMAWeightAveraging."
        )


@torch.no_grad()
def take_averages(trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
    """Write what was averaged since the task began into a module, as the callbacks themselves do when a fit ends."""
    for callback in _callbacks(trainer):
        if isinstance(
            callback, WeightAveraging
        ):  # those behind us have not seen the last step yet; no step counts twice
            callback.on_train_batch_end(trainer, module, None, None, 0)
            callback.on_train_epoch_end(trainer, module)
    for pairs, count in _averages(trainer, module):
        if count > 0:
            for own, average in pairs:
                own.copy_(average)


@torch.no_grad()
def restart_averages(trainer: "pl.Trainer", module: nn.Module) -> None:
    """Begin the averages anew from the weights of a module: the neurons of a merge are not those of the steps before."""
    for pairs, count in _averages(trainer, module):
        count.zero_()
        for own, average in pairs:
            average.copy_(own)


def _callbacks(trainer: "pl.Trainer") -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _averages(trainer: "pl.Trainer", module: nn.Module) -> Iterator[tuple[Iterator[tuple[Tensor, Tensor]], Tensor]]:
    """Yield for every average the module's tensors beside those of the average, and of how many networks it is."""
    for callback in _callbacks(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging) and average is not None:
            ours, theirs = (chain(one.parameters(), one.buffers()) for one in (module, average.module))
            yield zip(ours, theirs, strict=True), average.n_averaged
        elif (
            isinstance(callback, StochasticWeightAveraging) and average is not None and callback.n_averaged is not None
        ):
            # It averages no buffers: BatchNorm's statistics are taken anew, in an epoch of their own.
            yield zip(module.parameters(), average.parameters(), strict=True), callback.n_averaged
