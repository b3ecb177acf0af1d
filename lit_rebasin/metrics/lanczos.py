"""The largest eigenvalues of a symmetric operator that is known by its products with vectors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Products for each eigenvalue before convergence is believed: a random direction among a million sees next to nothing of a sharp one, so that
# where all curvatures but a few are the same (weight decay) the residual is small at once.
_FEWEST = 10

_NOISE = 8  # what is left of a product below so many roundings of the operator's norm says nothing


@dataclass(frozen=True)
class HessianEigenvalues:
    """The largest eigenvalues that were found, and how well.

    Attributes:
        values: ``(count,)`` in float64 on the CPU, descending. As Ritz values they are never above the true ones, but for rounding.
        residuals: ``(count,)``, estimates of ``|H u - value u|`` for the unit vector ``u`` found: an eigenvalue lies within it.
        iterations: Products with the Hessian that were made.
        converged: Whether every residual is at most ``tolerance`` times the largest absolute eigenvalue of those found on the way, or the
            directions were used up.
    """

    values: Tensor
    residuals: Tensor
    iterations: int
    converged: bool


def largest_eigenvalues(
    product: Callable[[Tensor], Tensor], start: Tensor, *, steps: int, tolerance: float
) -> HessianEigenvalues:
    """Return the largest eigenvalues of a symmetric operator by band Lanczos with full reorthogonalisation.

    The basis grows from all start vectors in turn (Ruhe, Mathematics of Computation 1979), so that an eigenvalue of multiplicity up to their
    number is found as often as it occurs. A product that lies in the span of the basis is dropped; when none is left, the span is invariant,
    and as the start is random it holds the largest eigenvalues.

    Args:
        product: ``v -> H v`` on vectors ``(n,)``.
        start: ``(count, n)``, random, ``count`` at most ``n``. The basis has its dtype.
        steps: The most products, at least ``count``.
        tolerance: Largest residual, as a share of the largest absolute Ritz value.
    """
    count = len(start)
    fewest = min(_FEWEST * count, steps)
    basis, projected = start.new_empty(0, start.shape[1]), torch.zeros(0, 0, dtype=torch.float64)
    # What may enter the basis, and the index in it of the vector that this is the product of, -1 for a start.
    waiting = [(-1, vector / vector.norm()) for vector in start]
    while True:
        values, vectors = torch.linalg.eigh(projected)
        norm = float(values.abs().max()) if len(basis) else 0.0
        direction = _take(waiting, basis, norm)
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        if direction is None:
            return HessianEigenvalues(values, _residuals(waiting, vectors), len(basis), converged=True)
        if len(basis) >= fewest:
            residuals = _residuals([*waiting, direction], vectors)
            converged = bool((residuals <= tolerance * norm).all())
            if converged or len(basis) == steps:
                return HessianEigenvalues(values, residuals, len(basis), converged)
        unit = direction[1] / direction[1].norm()
        basis = torch.cat([basis, unit[None]])
        image, coefficients = _orthogonalise(product(unit), basis)
        projected = _bordered(projected, coefficients)
        waiting = [(owner, vector - (unit @ vector) * unit) for owner, vector in waiting] + [(len(basis) - 1, image)]


def _take(waiting: list[tuple[int, Tensor]], basis: Tensor, norm: float) -> tuple[int, Tensor] | None:
    """Take the first vector that leaves the span of the basis off the list, orthogonal to it; None if there is none."""
    floor = _NOISE * torch.finfo(basis.dtype).eps * norm
    while waiting:
        owner, vector = waiting.pop(0)
        rest, _ = _orthogonalise(vector, basis)  # a second time for products, which full orthogonality takes
        if owner < 0 or float(rest.norm()) > floor:
            return owner, rest
    return None


def _orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return what of a vector is orthogonal to the rows of a basis, and its coefficients along them, in float64 on the CPU."""
    coefficients = basis @ vector
    return vector - coefficients @ basis, coefficients.double().cpu()


def _bordered(matrix: Tensor, column: Tensor) -> Tensor:
    """Return a symmetric matrix with one more column and row."""
    n = len(column)
    grown = torch.zeros(n, n, dtype=torch.float64)
    grown[: n - 1, : n - 1] = matrix
    grown[:, -1] = column
    grown[-1] = column
    return grown


def _residuals(waiting: list[tuple[int, Tensor]], vectors: Tensor) -> Tensor:
    """Return the lengths of ``H u - value u`` for the Ritz vectors, given by their coefficients ``(basis, count)``: what waits is all of it."""
    products = [(owner, vector) for owner, vector in waiting if owner >= 0]
    if not products:
        return torch.zeros(vectors.shape[1], dtype=torch.float64)
    stacked = torch.stack([vector for _, vector in products])
    gram = (stacked @ stacked.T).double().cpu()
    shares = vectors[[owner for owner, _ in products]]
    return (shares * (gram @ shares)).sum(0).clamp(min=0).sqrt()
