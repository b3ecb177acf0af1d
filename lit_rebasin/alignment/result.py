"""What every way of aligning returns."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alignment:
    """The permutations that carry a model towards a reference.

    Attributes:
        permutations: By group name, a LongTensor ``(size,)`` on the CPU: ``w_new = w.index_select(dim, p)``.
        cost: The cost of the hard permutations returned, in the unit of the method's cost.
        history: The cost of the hard permutations along the way, in the unit of ``cost``; the first entry is the cost of the start.
        method: The name of the method.
        converged: Whether the method came to its end: weight matching to a sweep that improves nothing, the Sinkhorn alignment to soft plans
            that are nearly hard, so that what it trained stands for what it returns.
        seconds: Wall time.
        residual: Added to the merged weights, by tensor name; empty where the cost has none.
    """

    permutations: dict[str, Tensor]
    cost: float
    history: list[float]
    method: str
    converged: bool
    seconds: float
    residual: dict[str, Tensor] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """How many neurons, over all groups, are not where they were."""
        return sum(map(_count_moved, self.permutations.values()))

    @property
    def displacement(self) -> dict[str, float]:
        """By group name, the share of its neurons that are not where they were."""
        return {name: _count_moved(p) / len(p) for name, p in self.permutations.items()}


def _count_moved(permutation: Tensor) -> int:
    return int((permutation != torch.arange(len(permutation), device=permutation.device)).sum())
