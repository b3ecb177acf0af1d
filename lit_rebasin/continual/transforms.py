"""Transforms of whole batches of images."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_rebasin.transport.arguments import check_count


class RandomShift(nn.Module):
    """Move every image of a batch by a draw of its own; what moves in repeats the edge.

    torchvision's ``RandomCrop`` with padding moves all images of a batch by the same draw.

    Args:
        pixels: How far at most, up or down and left or right.

    Raises:
        ValueError: If ``pixels`` is below 1.
    """

    def __init__(self, pixels: int = 1) -> None:
        super().__init__()
        check_count("pixels", pixels)
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)``, moved; draws from the global random state."""
        n, _, height, width = images.shape
        padded = pad(images, (self.pixels,) * 4, mode="replicate")
        down, right = torch.randint(2 * self.pixels + 1, (2, n, 1), device=images.device)
        rows = (torch.arange(height, device=images.device) + down)[:, None, :, None]
        columns = (torch.arange(width, device=images.device) + right)[:, None, None, :]
        examples = torch.arange(n, device=images.device)[:, None, None, None]
        channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        return padded[examples, channels, rows, columns]
