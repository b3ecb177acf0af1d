"""What the callers of a solver give, as tensors of one shape and type."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Arguments:
    """Costs or logits, masses and regularization of a batch.

    Attributes:
        scores: ``(..., n, m)``, float32 or float64.
        sign: 1 for costs, -1 for logits.
        a: ``(..., n)``, or None where all masses are ones.
        b: ``(..., m)``, or None, too.
        regularization: ``(...)``, or a number for all.
        dtype: What the caller gave, and gets.
    """

    scores: Tensor
    sign: int
    a: Tensor | None
    b: Tensor | None
    regularization: float | Tensor
    dtype: torch.dtype


def read_arguments(
    cost: Tensor | None, logits: Tensor | None, a: Tensor | None, b: Tensor | None, regularization: float | Tensor
) -> Arguments:
    """Check the shapes, fill in the masses and bring all to one batch.

    Raises:
        ValueError: If not exactly one of ``cost`` and ``logits`` is given, or shapes do not fit.
    """
    if (cost is None) == (logits is None):
        raise ValueError("Give either cost or logits: a plan minimises the one or maximises the other.")
    name, sign, scores = ("cost", 1, cost) if logits is None else ("logits", -1, logits)
    for word, tensor in ((name, scores), ("a", a), ("b", b)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"{word} must be a tensor, got {type(tensor).__name__}.")
    if not isinstance(regularization, int | float | Tensor):
        raise ValueError(f"regularization must be a number or a tensor, got {type(regularization).__name__}.")
    assert scores is not None
    if scores.ndim < 2 or 0 in scores.shape[-2:]:
        raise ValueError(f"{name} must have shape (..., n, m) with n and m above 0, got {tuple(scores.shape)}.")
    for word, tensor in ((name, scores), ("a", a), ("b", b)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{word} must hold floating point numbers, got {tensor.dtype}.")
    given, (n, m) = scores.dtype, scores.shape[-2:]
    dtype = torch.float64 if given == torch.float64 else torch.float32
    scores = scores.to(dtype)
    if torch.compiler.is_compiling() and not isinstance(regularization, Tensor):
        regularization = torch.scalar_tensor(regularization, dtype=torch.float64, device=scores.device)
    shapes = {name: scores.shape[:-2]}
    if isinstance(regularization, Tensor):
        shapes["regularization"] = regularization.shape
    if a is not None or b is not None or n != m:
        a, b = fill_masses(a, b, n, m, scores)
        shapes |= {"a": a.shape[:-1], "b": b.shape[:-1]}
    if any(shapes.values()):
        batch = _batch(shapes)
        scores = scores.expand(*batch, n, m)
        regularization = regularization.expand(batch) if isinstance(regularization, Tensor) else regularization
        if a is not None and b is not None:
            a, b = a.expand(*batch, n), b.expand(*batch, m)
    return Arguments(scores, sign, a, b, regularization, given)


def check_count(name: str, count: int, least: int = 1) -> None:
    """Raise a ValueError unless a count is a whole number of at least ``least``."""
    if type(count) is not int or count < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {count!r}.")


def check_positive(**numbers: float) -> None:
    """Raise a ValueError unless all numbers, by the names of their arguments, are above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be above 0, got {number!r}.")


def check_number(name: str, value: object) -> None:
    """Raise a TypeError unless an argument is a number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got a {type(value).__name__}.")


def plain(value: Any) -> Any:
    """Return a number of NumPy's as one of Python's, which checkpoints can hold that are read with ``weights_only``."""
    return value.item() if isinstance(value, np.generic) else value


def check_seed(seed: object) -> None:
    """Raise an error unless torch takes a seed: a TypeError if it is no whole number, a ValueError if it has more than 64 bits."""
    if not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number, got a {type(seed).__name__}.")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed must be a whole number of 64 bits, got {seed}.")


def check_function(name: str, value: object, of: str) -> None:
    """Raise a TypeError unless an argument is a function; ``of`` says of what."""
    if not callable(value):
        raise TypeError(f"{name} must be a function of {of}, got a {type(value).__name__}.")


def check_tensor(name: str, value: object, *, floating: bool = False) -> None:
    """Raise a TypeError unless an argument is a tensor of real numbers, or of floating point alone."""
    wanted = f"{name} must be a tensor of {'floating point' if floating else 'real numbers'}"
    if not isinstance(value, Tensor):
        advice = ": torch.from_numpy makes it one" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{wanted}, got {type(value).__name__}{advice}.")
    if value.is_complex() or (floating and not value.is_floating_point()):
        raise TypeError(f"{wanted}, got {value.dtype}.")
    if value.layout is not torch.strided:
        raise TypeError(
            f"{wanted} that is dense, got {str(value.layout).removeprefix('torch.')}: to_dense() makes it so."
        )


def check_points(name: str, points: Tensor) -> None:
    """Raise an error unless an argument is a cloud of points ``(n, d)``.

    Raises:
        TypeError: If it is no tensor of real numbers.
        ValueError: If it has another shape or no points, or one is NaN or infinite.
    """
    check_tensor(name, points)
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"{name} must hold one point a row, (n, d), got shape {tuple(points.shape)}.")
    if not points.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity.")


def fill_masses(a: Tensor | None, b: Tensor | None, n: int, m: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return both masses; one that is not given shares out the total of the other, ones for the rows if there is none.

    Raises:
        ValueError: If a mass has not the size of its side.
    """
    for word, mass, size in (("a", a, n), ("b", b, m)):
        if mass is not None and (mass.ndim < 1 or mass.shape[-1] != size):
            side = "rows" if word == "a" else "columns"
            raise ValueError(f"{word} must hold one mass for each of the {size} {side}, got {tuple(mass.shape)}.")
    a = None if a is None else a.to(like.dtype)
    b = None if b is None else b.to(like.dtype)
    if a is None:
        a = like.new_ones(n) if b is None else (b.sum(-1, keepdim=True) / n).expand(*b.shape[:-1], n)
    if b is None:
        b = (a.sum(-1, keepdim=True) / m).expand(*a.shape[:-1], m)
    return a, b


def _batch(shapes: dict[str, torch.Size]) -> torch.Size:
    """Return the leading dimensions that all arguments broadcast to."""
    try:
        shape: torch.Size = torch.broadcast_shapes(*shapes.values())
        return shape
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"The leading dimensions do not broadcast: {listed}.") from None
