"""Examples that are kept aside from the batches that a Trainer shows."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class KeptExamples:
    """The first examples of a pass over batches, from as many batches as it takes.

    Batches are joined where they are alike: of one structure, with tensors that differ in the number of examples alone. Else the first is all.

    Args:
        wanted: How many examples are kept at most.

    Attributes:
        batch: What was kept, in the form of a batch; None before the first.
    """

    def __init__(self, wanted: int) -> None:
        self.batch: Any = None
        self._missing = wanted

    def add(self, batch: Any, device: torch.device | None = None) -> None:
        """Keep copies of what is still wanted, on a device if one is named."""
        if self._missing <= 0:
            return
        part = first_examples(batch, self._missing)
        if device is not None:
            part = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), part)
        whole = part if self.batch is None else _joined(self.batch, part)
        if whole is None:
            self._missing = 0
            return
        self._missing -= _size(part) or self._missing
        self.batch = whole


def first_examples(batch: Any, count: int) -> Any:
    """Return copies of the first examples of a batch, whatever its structure."""
    size = _size(batch)
    return pytree.tree_map_only(
        Tensor, lambda tensor: (tensor[:count] if tensor.ndim and len(tensor) == size else tensor).clone(), batch
    )


def _size(batch: Any) -> int:
    """Return how many examples a batch has, by its first tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(tensors[0]) if tensors else 0


def _joined(first: Any, second: Any) -> Any | None:
    """Return two batches as one, or None if they are not alike."""
    (ours, form), (theirs, other_form) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    if form != other_form:
        return None
    sizes = (_size(first), _size(second))
    leaves = [_joined_leaf(one, other, sizes) for one, other in zip(ours, theirs, strict=True)]
    return None if any(leaf is None for leaf in leaves) else pytree.tree_unflatten(leaves, form)


def _joined_leaf(one: Any, other: Any, sizes: tuple[int, int]) -> Any | None:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        plain = isinstance(one, (int, float, str)) and type(one) is type(other)
        return one if plain and one == other else None
    if one.dtype != other.dtype or one.ndim != other.ndim:
        return None
    if one.ndim and (len(one), len(other)) == sizes:
        return torch.cat([one, other]) if one.shape[1:] == other.shape[1:] else None
    return one if torch.equal(one, other) else None
