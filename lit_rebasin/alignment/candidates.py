"""What a search for permutations keeps of all that it has seen."""

from collections.abc import Callable, Mapping
from math import inf, isnan

import torch
from torch import Tensor

from lit_rebasin.symmetry import PermutationSpec, permute


class Candidates:
    """The hard permutations that a search has tried, of which the best is kept.

    Args:
        model: Weights of the model to permute.
        spec: Its symmetries.
        evaluate: Maps hard-permuted weights to the scalar by which candidates are compared; always the same data.

    Attributes:
        history: The cost of each candidate; infinite where it is NaN.
        cost: The least of them.
        permutations: The candidate that it belongs to.
        residual: A copy of what was trained beside it.
    """

    def __init__(
        self, model: Mapping[str, Tensor], spec: PermutationSpec, evaluate: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> None:
        self._model, self._spec, self._evaluate = model, spec, evaluate
        self.history: list[float] = []
        self.cost = inf
        self.permutations: dict[str, Tensor] = {}
        self.residual: dict[str, Tensor] = {}

    def offer(self, permutations: dict[str, Tensor], residual: Mapping[str, Tensor] | None = None) -> None:
        """Compare another candidate; the first of equals is kept."""
        with torch.no_grad():
            value = float(self._evaluate(permute(self._model, self._spec, permutations)))
        self.history.append(inf if isnan(value) else value)
        if self.history[-1] < self.cost or len(self.history) == 1:
            self.cost, self.permutations = self.history[-1], permutations
            self.residual = {name: tensor.detach().clone() for name, tensor in (residual or {}).items()}
