"""Networks of the protocols that end in features, for a head a task."""

import torch
from torch import nn


def slim_resnet18(width: int = 20) -> nn.Module:
    """Make Avalanche's reduced ResNet-18 (that of Lopez-Paz and Ranzato, NeurIPS 2017) without its last layer.

    Args:
        width: Channels of the first block; 20 in the literature.

    Returns:
        A network that maps images ``(B, 3, 32, 32)`` to ``(B, 8 * width)`` features.
    """
    from avalanche.models import SlimResNet18  # slow to import

    network = SlimResNet18(1, nf=width)
    network.linear = nn.Identity()
    made: nn.Module = network.to(memory_format=torch.channels_last)  # a third faster on a CPU
    return made
