"""Statistics of a merged network: its own, not an average of two others'."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a module holds a BatchNorm layer with running statistics."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def reestimate_batch_norm(model: nn.Module, forward: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Replace the running statistics of every BatchNorm layer by their plain average over some batches.

    Averaged weights do not have the average's statistics (Jordan et al., ICLR 2023), so a merge of networks with BatchNorm needs this.

    Args:
        model: The merged network, changed in place; its training modes are left as they were.
        forward: Runs the network on one batch.
        batches: The data: training data, in batches as the network is trained on.
    """
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        update_bn(([batch] for batch in batches), _Forward(model, forward))
    for module, training in modes.items():
        module.training = training


class _Forward(nn.Module):
    """What `update_bn` may call: it passes the first entry of each item on."""

    def __init__(self, model: nn.Module, forward: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.run = forward

    def forward(self, batch: Any) -> Any:
        return self.run(batch)
