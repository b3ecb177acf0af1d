"""The data that an alignment is given."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Batches:
    """Batches on the device of a network, checked as they are read.

    Args:
        data: Any iterable of batches that can be read more than once.
        network: The network.

    Raises:
        ValueError: If it is no such iterable; when it is read, if a batch holds a NaN or an infinity, or there is none.
    """

    def __init__(self, data: Any, network: nn.Module) -> None:
        pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(one, Tensor) for one in data)
        if isinstance(data, Tensor | str) or (pair and not data[1].is_floating_point()):
            example = "[(inputs, targets)]" if pair else "[inputs]"
            raise ValueError(f"data must be batches, such as a DataLoader or {example}, got {_kind(data)}.")
        try:
            once = iter(data) is data
        except TypeError:
            raise ValueError(f"data must be batches, such as a DataLoader or a list, got {_kind(data)}.") from None
        if once:
            raise ValueError("data must give its batches more than once: a DataLoader or a list, not an iterator.")
        self.data = data
        weight = next(network.parameters(), None)
        self.device = weight.device if weight is not None else torch.device("cpu")

    def __iter__(self) -> Iterator[Any]:
        index = -1
        for index, batch in enumerate(self.data):
            for leaf in pytree.tree_leaves(batch):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
                    raise ValueError(f"Batch {index} of data holds a NaN or an infinity.")
            yield pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self.device), batch)
        if index < 0:
            raise ValueError("data holds no batch: it is empty.")


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """Return the arguments of a forward pass that a batch stands for: the first of a tuple or list, else the batch."""
    first = batch[0] if isinstance(batch, list | tuple) else batch
    return tuple(first) if isinstance(first, list | tuple) else (first,)


def _kind(data: Any) -> str:
    return (
        f"a tensor of shape {tuple(data.shape)}" if isinstance(data, Tensor) else f"{type(data).__name__} {data!r:.60}"
    )
