"""The plane through three networks, and the loss on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from numbers import Real

import torch
from torch import Tensor

from lit_rebasin.alignment import check_same_architecture, check_weights
from lit_rebasin.transport.arguments import check_count, check_function, check_number

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class PlaneLosses:
    """The loss on a grid in the plane through three networks.

    Attributes:
        x: ``(columns,)``, along the line from the first network to the second, in the distance of the weights.
        y: ``(rows,)``, across it, towards the third network.
        losses: ``(rows, columns)``.
        corners: ``(3, 2)``, where the three networks are.
    """

    x: Tensor
    y: Tensor
    losses: Tensor
    corners: Tensor


def loss_plane(
    first: Weights,
    second: Weights,
    third: Weights,
    loss: Callable[[Weights], Tensor | float],
    *,
    points: int = 15,
    margin: float = 0.25,
) -> PlaneLosses:
    """Measure the loss on a grid in the plane through three networks (as Garipov et al., NeurIPS 2018, draw it).

    Args:
        first: Parameters and buffers by name; of this network is what has no floating point.
        second: Those of another network of the architecture.
        third: Those of a third one, not on the line of the other two.
        loss: The loss of weights. Beyond the three networks a running variance may come out below 0: leave those of BatchNorm to the batch.
        points: How many points the grid has along either axis.
        margin: How far it goes beyond the three, as a share of their extent.

    Raises:
        TypeError: If a network is no mapping of tensors, the loss is no function or gives no number, or the margin is no number.
        ValueError: If the three differ in names or shapes, lie on a line, the second or third is NaN or infinite where the first is not,
            there are fewer than 2 points, the margin is below 0 or infinite,
            or the loss is not one number.
    """
    check_count("points", points, 2)
    check_number("margin", margin)
    if not 0 <= margin < inf:
        raise ValueError(f"margin must be at least 0 and finite, got {margin}.")
    check_function("loss", loss, "weights by name")
    for name, weights in (("first", first), ("second", second), ("third", third)):
        check_weights(name, weights)
        check_same_architecture(weights, first, (f"{name} network", "first network"))
    origin = {name: tensor.detach() for name, tensor in first.items()}
    _check_origin(origin, second, third)
    along, across = (_difference(other, origin) for other in (second, third))
    for name, difference in (("second", along), ("third", across)):
        _check_finite(f"{name} network", difference)
    length, on_line, height = _triangle(along, across)
    if not _has_area(length, height):
        raise ValueError(
            "The three networks lie on a line, or two of them are the same, so there is no plane through them."
        )
    corners = torch.tensor([[0.0, 0.0], [length, 0.0], [on_line, height]], dtype=torch.float64)
    x, y = (_grid(corners[:, axis], points, margin) for axis in (0, 1))

    def measured(left: float, up: float) -> float:
        # In the basis of the two differences: the second is what remains of it off the line.
        share = up / height
        step = left / length - share * on_line / length
        moved = {name: origin[name] + step * along[name] + share * across[name] for name in along}
        return _one_number(loss({**origin, **moved}))

    with torch.no_grad():
        values = [[measured(left, up) for left in x.tolist()] for up in y.tolist()]
    return PlaneLosses(x, y, torch.tensor(values, dtype=torch.float64), corners)


def _check_origin(origin: Weights, *others: Weights) -> None:
    """Refuse what is not finite in the first network alone; a mask of minus infinity is there in all."""
    for key, tensor in origin.items():
        if not tensor.isfinite().all():
            for other in others:
                if not torch.allclose(tensor, other[key].detach(), equal_nan=True):
                    raise ValueError(f"The first network holds NaN or infinity in {key!r}, which the others do not.")


def _check_finite(name: str, difference: Weights) -> None:
    for key, tensor in difference.items():
        if not tensor.isfinite().all():
            raise ValueError(f"The {name} holds NaN or infinity in {key!r}, so it is not on a plane with the first.")


def _one_number(value: object) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"loss must return one number, such as a mean, got shape {tuple(value.shape)}.")
    if not isinstance(value, Tensor | Real):
        raise TypeError(f"loss must return a number, or a tensor of one, got a {type(value).__name__}.")
    return float(value)


def is_plane(first: Weights, second: Weights, third: Weights) -> bool:
    """Return whether three networks are not on a line, so that there is one plane through them."""
    length, _, height = _triangle(*(_difference(other, first) for other in (second, third)))
    return _has_area(length, height)


def _triangle(along: Weights, across: Weights) -> tuple[float, float, float]:
    """Return the length of the first side, and how far along and across it the third corner is."""
    length = _dot(along, along) ** 0.5
    on_line = _dot(across, along) / length if length > 0 else 0.0
    return length, on_line, max(0.0, _dot(across, across) - on_line**2) ** 0.5


def _has_area(length: float, height: float) -> bool:
    return height > 1e-6 * length > 0


def _difference(other: Weights, origin: Weights) -> dict[str, Tensor]:
    return {
        name: other[name].detach() - tensor
        for name, tensor in origin.items()
        if tensor.is_floating_point() and tensor.isfinite().all()
    }


def _dot(one: Weights, other: Weights) -> float:
    return sum(float((tensor.double() * other[name].double()).sum()) for name, tensor in one.items())


def _grid(values: Tensor, points: int, margin: float) -> Tensor:
    low, high = float(values.min()), float(values.max())
    beyond = margin * (high - low)
    return torch.linspace(low - beyond, high + beyond, points, dtype=torch.float64)
