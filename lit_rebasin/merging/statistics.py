"""Statistics of a merged network: its own, not an average of two others'."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a module holds a BatchNorm layer with running statistics."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def reestimate_batch_norm(model: nn.Module, forward: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Replace the running statistics of BatchNorm layers by their plain average over some batches.

    Averaged weights do not have the average's statistics (Jordan et al., ICLR 2023), so a merge of networks with BatchNorm needs this. Layers
    that no batch runs, such as those in the head of another task, and layers in evaluation mode keep their statistics.

    Args:
        model: The merged network, changed in place.
        forward: Runs the network on one batch, with the layers in the modes that they are in now.
        batches: The data: training data, in batches as the network is trained on.

    Raises:
        ValueError: If no BatchNorm layer is in training mode, or there are no batches.
        Exception: Whatever ``forward`` raises; the statistics are then what they were.
    """
    if has_batch_norm(model) and not any(m.training for m in model.modules() if isinstance(m, _BatchNorm)):
        raise ValueError(
            "No BatchNorm layer is in training mode, so none would be estimated: call model.train(), and model.eval() afterwards."
        )
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
    momenta = {layer: layer.momentum for layer in layers}
    before = {layer: {name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers}
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the cumulative average
    finished = False
    try:
        with torch.no_grad():
            empty = True
            for batch in batches:
                forward(batch)
                empty = False
        if empty:
            raise ValueError("batches is empty: the statistics of a merge come from data.")
        finished = True
    finally:
        for layer in layers:
            layer.momentum = momenta[layer]
            if not finished or layer.num_batches_tracked == 0:
                for name, buffer in layer.named_buffers():
                    buffer.copy_(before[layer][name])
