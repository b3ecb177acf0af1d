"""What a merged model gets beyond averaged weights: statistics of its own."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lit_rebasin.callbacks.merge import MergeOutcome
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.merging import reestimate_batch_norm, repair, reset_batch_norm
from lit_rebasin.merging.path import weights_of


def correct(module: torch.nn.Module, step: StepLoss, outcome: MergeOutcome, statistics: str) -> None:
    """Correct the statistics of a module that holds the weights of a merge, in place; what is logged of it follows.

    Args:
        module: The module.
        step: Its training step.
        outcome: The merge.
        statistics: One of ``STATISTICS``.
    """
    batches = outcome.batches
    held = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and not layer.training]
    kept = {buffer: buffer.clone() for layer in held for buffer in layer.buffers()}
    if statistics == "reestimate" and any(
        layer.training for layer in module.modules() if isinstance(layer, _BatchNorm)
    ):
        reestimate_batch_norm(module, step, batches)
    elif statistics == "data-free":
        reset_batch_norm(module, outcome.path, outcome.alpha, step, batches[0])
    elif statistics in ("repair", "rescale"):
        repair(module, outcome.path, outcome.alpha, step, batches, mean=statistics == "repair")
        for buffer, value in kept.items():  # of layers that the user holds in evaluation mode
            buffer.copy_(value)
        loss, logged = step.mean(weights_of(module), batches)
        outcome.numbers["loss_after"] = float(loss)
        outcome.numbers.update({f"{name}_after": value for name, value in logged.items()})
