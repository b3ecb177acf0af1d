"""BatchNorm has no statistics of a batch of one example: who asks for them is told so, before the first task if it can be foreseen."""

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import functional_call

_WORDS_OF_TORCH = "Expected more than 1 value per channel"


def is_of_single_example(error: ValueError) -> bool:
    """Return whether an error is that of a normalization layer which was given one value a channel."""
    return _WORDS_OF_TORCH in str(error)


def check_single_examples(network: nn.Module, data: Any) -> None:
    """Refuse a stream that has a batch of one example, if the network cannot be trained on one.

    Args:
        network: Maps images to outputs.
        data: A :class:`~lit_rebasin.ContinualDataModule`; another datamodule is not looked at.

    Raises:
        MisconfigurationException: If it is so; the message names the task.
    """
    if not hasattr(data, "smallest_batch"):
        return
    alone = next((task for task in range(data.n_tasks) if data.smallest_batch(task) == 1), None)
    if alone is None or _takes_one(network, data.input_shape):
        return
    raise MisconfigurationException(
        f"Task {alone} has a batch of one example, of which the network's normalization has no statistics: batch_size={data.batch_size} leaves "
        "a rest of one, or the task has no more; pass another batch_size or n_tasks, or a network without BatchNorm."
    )


def _takes_one(network: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a network in its present modes takes a batch of one image; it stays as it is."""
    like = next((parameter for parameter in network.parameters()), torch.zeros(()))
    image = torch.zeros(1, *shape, dtype=like.dtype, device=like.device)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    devices = [like.device] if like.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            functional_call(network, buffers, (image,))
    except ValueError as error:
        return not is_of_single_example(error)
    return True
