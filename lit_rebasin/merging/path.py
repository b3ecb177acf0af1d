"""The linear path between two models, and the loss along it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rebasin.alignment import check_same_architecture, interpolate


@dataclass(frozen=True)
class LinearPath:
    """``path(alpha) = alpha * previous + (1 - alpha) * new``, on weights by name.

    Args:
        previous: Weights of the reference.
        new: Weights of the aligned model, of the same names and shapes.

    Raises:
        ValueError: If the two differ in names or shapes.
    """

    previous: Mapping[str, Tensor]
    new: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_same_architecture(self.new, self.previous)

    def at(self, alpha: float) -> dict[str, Tensor]:
        """Return the weights at ``alpha``, the weight of the previous model; counters are taken from the new one.

        Raises:
            ValueError: If ``alpha`` lies outside [0, 1].
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is the weight of the previous model and must lie in [0, 1], got {alpha}.")
        return interpolate(self.previous, self.new, alpha)

    def losses(self, loss: Callable[[Mapping[str, Tensor]], Tensor | float], points: int = 21) -> "PathLosses":
        """Return the loss at ``points`` evenly spaced values of alpha from 0 (new) to 1 (previous).

        Raises:
            ValueError: If there are fewer than 3 points, which is one between the ends.
        """
        if points < 3:
            raise ValueError(f"points must be at least 3, got {points}.")
        alphas = torch.linspace(0, 1, points, dtype=torch.float64)
        with torch.no_grad():
            values = [float(loss(self.at(alpha))) for alpha in alphas.tolist()]
        return PathLosses(alphas, torch.tensor(values, dtype=torch.float64))


@dataclass(frozen=True)
class PathLosses:
    """The loss along a linear path.

    Attributes:
        alphas: ``(points,)`` from 0, the new model, to 1, the previous one.
        losses: ``(points,)``.
    """

    alphas: Tensor
    losses: Tensor

    @property
    def excess(self) -> Tensor:
        """``L(path(alpha)) - [alpha * L(previous) + (1 - alpha) * L(new)]`` at every point; 0 at both ends."""
        return self.losses - (self.alphas * self.losses[-1] + (1 - self.alphas) * self.losses[0])

    @property
    def barrier(self) -> float:
        """The largest excess between the ends (Frankle et al., ICML 2020), signed: below 0 where every merge beats the straight line."""
        return float(self.excess[1:-1].max())

    @property
    def area(self) -> float:
        """The mean excess; negative where the path dips below the straight line."""
        return float(self.excess.mean())
