"""The linear path between two models, and the loss along it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_rebasin.alignment import check_same_architecture, interpolate
from lit_rebasin.transport.arguments import check_count


class LinearPath:
    """``path(alpha) = alpha * previous + (1 - alpha) * new``, on weights by name or on modules.

    Args:
        previous: The reference: its weights by name, or the module.
        new: The aligned model, of the same names and shapes: a mapping if ``previous`` is one, else a module. Neither is written to.

    Attributes:
        previous: Weights of the reference, parameters and buffers by name.
        new: Weights of the aligned model.
        module: The aligned model where modules were given, else None.

    Raises:
        TypeError: If the two are not both mappings of tensors or both modules.
        ValueError: If the two differ in names or shapes.
    """

    def __init__(self, previous: Mapping[str, Tensor] | nn.Module, new: Mapping[str, Tensor] | nn.Module) -> None:
        self.module: nn.Module | None = None
        if isinstance(previous, nn.Module) and isinstance(new, nn.Module):
            self.module = new
            previous, new = weights_of(previous), weights_of(new)
        if not isinstance(previous, Mapping) or not isinstance(new, Mapping):
            raise TypeError(
                "previous and new must both be modules or both be tensors by name, "
                f"got a {type(previous).__name__} and a {type(new).__name__}."
            )
        check_same_architecture(new, previous)
        self.previous: Mapping[str, Tensor] = previous
        self.new: Mapping[str, Tensor] = new

    def at(self, alpha: float | Mapping[str, float]) -> dict[str, Tensor]:
        """Return the weights at ``alpha``, the weight of the previous model; counters are taken from the new one.

        Args:
            alpha: One number for all tensors, or one by name for every tensor of floating point.

        Raises:
            ValueError: If an alpha lies outside [0, 1], or a mapping lacks a tensor or names one that the models lack.
        """
        if not isinstance(alpha, Mapping):
            return interpolate(self.previous, self.new, _number(alpha, "alpha"))
        for name in alpha:
            if name not in self.new:
                raise ValueError(f"alpha has a number for {name!r}, but the models have no tensor of that name.")
        merged: dict[str, Tensor] = {}
        for name, tensor in self.new.items():
            if tensor.is_floating_point():
                merged |= interpolate({name: self.previous[name]}, {name: tensor}, alpha_of(alpha, name))
            else:
                merged[name] = tensor
        return merged

    def module_at(self, alpha: float | Mapping[str, float]) -> nn.Module:
        """Return a copy of the new module with the weights at ``alpha``, in the modes of the new module.

        Raises:
            TypeError: If the path is one of weights alone.
            ValueError: As :meth:`at` does.
        """
        merged, weights = copy.deepcopy(self.network), self.at(alpha)
        write_weights(merged, weights)
        return merged

    @property
    def network(self) -> nn.Module:
        """The module that runs the path; a TypeError where there is none."""
        if self.module is None:
            raise TypeError("This path is one of weights by name, which cannot be run: give LinearPath two modules.")
        return self.module

    def losses(self, loss: Callable[[Mapping[str, Tensor]], Tensor | float], points: int = 21) -> "PathLosses":
        """Return the loss at ``points`` evenly spaced values of alpha from 0 (new) to 1 (previous).

        Raises:
            ValueError: If there are fewer than 3 points, which is one between the ends.
        """
        alphas = grid(points)
        with torch.no_grad():
            values = [float(loss(self.at(alpha))) for alpha in alphas.tolist()]
        return PathLosses(alphas, torch.tensor(values, dtype=torch.float64))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name, detached; a tensor of two names appears once.

    Raises:
        ValueError: If one is of a lazy layer that has not seen an input yet.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"{lazy[0]!r} of {type(module).__name__} is of a lazy layer: call the network once on an example before."
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module's own parameters and buffers."""
    for name, tensor in weights_of(module).items():
        tensor.copy_(weights[name].detach())


def alpha_of(alpha: float | Mapping[str, float], name: str) -> float:
    """Return the alpha of one tensor; a ValueError if it has none in [0, 1]."""
    if not isinstance(alpha, Mapping):
        return _number(alpha, "alpha")
    if name not in alpha:
        raise ValueError(f"alpha has no number for the tensor {name!r}: give one for every tensor of floating point.")
    return _number(alpha[name], f"alpha[{name!r}]")


def _number(alpha: float, argument: str) -> float:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{argument} is the weight of the previous model and must lie in [0, 1], got {alpha}.")
    return alpha


def even_shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the share of each model, which sum to one."""
    numbers = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(numbers) != count or not all(number > 0 and isfinite(number) for number in numbers):
        raise ValueError(f"weights must be one positive number for each of the {count} models, got {weights}.")
    return [number / sum(numbers) for number in numbers]


def grid(points: int) -> Tensor:
    """Return evenly spaced alphas from 0 to 1, in float64."""
    check_count("points", points, 3)
    return torch.linspace(0, 1, points, dtype=torch.float64)


@dataclass(frozen=True)
class PathLosses:
    """The loss along a linear path, and the accuracy where it was measured.

    Attributes:
        alphas: ``(points,)`` from 0, the new model, to 1, the previous one.
        losses: ``(points,)``.
        accuracies: ``(points,)``, shares in [0, 1], or None.
    """

    alphas: Tensor
    losses: Tensor
    accuracies: Tensor | None = None

    @property
    def excess(self) -> Tensor:
        """``L(path(alpha)) - [alpha * L(previous) + (1 - alpha) * L(new)]`` at every point; 0 at both ends."""
        return self._above_the_chord(self.losses)

    @property
    def barrier(self) -> float:
        """The largest excess between the ends (Frankle et al., ICML 2020), signed: below 0 where every merge beats the straight line."""
        return float(self.excess[1:-1].max())

    @property
    def area(self) -> float:
        """The mean excess; negative where the path dips below the straight line."""
        return float(self.excess.mean())

    @property
    def accuracy_barrier(self) -> float:
        """The largest loss of accuracy between the ends, as a share: how far a merge falls below the straight line, signed as the barrier.

        Raises:
            ValueError: If no accuracies were measured.
        """
        if self.accuracies is None:
            raise ValueError("No accuracies were measured along this path: they need targets that are class indices.")
        return float(self._above_the_chord(-self.accuracies)[1:-1].max())

    def _above_the_chord(self, values: Tensor) -> Tensor:
        return values - (self.alphas * values[-1] + (1 - self.alphas) * values[0])
