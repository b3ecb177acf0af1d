"""The accuracy on every task of a stream, outside of a Trainer."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from lit_rebasin.continual.batches import Examples
from lit_rebasin.metrics import ContinualAccuracy


@torch.no_grad()
def evaluate(
    metric: ContinualAccuracy,
    model: nn.Module,
    loaders: Sequence[DataLoader[Examples]],
    trained: int,
    device: torch.device | str,
) -> None:
    """Feed a metric with the predictions on every task, in evaluation mode.

    Args:
        metric: Takes them, on ``device``.
        model: Maps images and task indices to logits; on ``device``.
        loaders: One a task, with batches ``(x, y, task)``.
        trained: Index of the task trained last.
        device: Where to compute.
    """
    training = model.training
    model.eval()
    for task, loader in enumerate(loaders):
        for x, y, tasks in loader:
            metric.update(model(x.to(device), tasks.to(device)), y.to(device), task=task, trained=trained)
    model.train(training)
