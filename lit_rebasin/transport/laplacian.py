"""The graph Laplacian ``L = diag(b) - P' diag(1/a) P`` of a plan, which its gradient and Newton's steps are solved by.

One problem on a CPU is computed by NumPy, on the memory of the tensors: of its calls each costs a third, and its products with a vector take
half as long as PyTorch's. All else is tensors. The arithmetic is the same, so most of the code does not ask which of the two it has.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A tensor ``(B, ...)``, or for one problem on a CPU an array ``(...)``.
Array = Any

# Share of a row on one entry from which it is dominant.
_DOMINANT = 0.5
# Entries of a matrix that are computed at a time, so that they stay in a cache.
_CHUNK = 1 << 15


def laplacian(plan: Tensor) -> "Laplacian":
    """Return the Laplacian of a batch of plans ``(B, n, m)``."""
    result = Laplacian(as_native(plan))
    # Row by row the largest entries take ten times as long, and are seldom needed.
    if result.plan.max() > _DOMINANT * result.a.min() and result.is_dominant.any():
        return DominantLaplacian(plan)
    return result


class Laplacian:
    """The Laplacian, as long as conjugate gradients do not need too many steps without its matrix.

    Attributes:
        plan: The plan, ``(B, n, m)`` or ``(n, m)``.
        inverse_a: ``1 / a``; of a row without mass some finite number.
        rows: Multiplies the plan with a vector.
        columns: Multiplies its transpose with a vector.
    """

    def __init__(self, plan: Array) -> None:
        self.plan = plan
        self.rows, self.columns = product(plan), product(plan.mT)
        self.a, self.b = self.rows(ones(plan, -1)), self.columns(ones(plan, -2))
        self.inverse_a = _inverse(self.a)
        self.diagonal = self.b

    @property
    def is_dominant(self) -> Array:
        """Whether a row has most of its mass on one entry."""
        return row_maxima(self.plan) > _DOMINANT * self.a

    def centre(self, change: Array) -> tuple[Array, Array]:
        """Return a matrix less an offset of each row that makes it small where the plan is large, and the offsets."""
        return change, 0.0

    def row_means(self, values: Array) -> tuple[Array, Array]:
        """Return ``P values / a`` in two parts: that of the dominant entries, and the rest."""
        return 0.0, self.rows(values) * self.inverse_a

    def __matmul__(self, values: Array) -> Array:
        return self.b * values - self.columns(self.rows(values) * self.inverse_a)

    def solve(self, right: Array) -> Array:
        """Return the solution, up to a constant; by conjugate gradients, and directly where that takes longer."""
        # Rounding leaves the right side a sum, for which there is no solution.
        right = right - self.diagonal * (right.sum(-1) * _inverse(self.diagonal.sum(-1)))[..., None]
        # A plan far from its masses may overflow, and is then solved directly.
        with np.errstate(over="ignore", invalid="ignore"):
            solution = _conjugate_gradients(self.__matmul__, right, _inverse(self.diagonal))
        if solution is not None:
            return solution
        batch = (as_tensor(array) for array in (self.plan, self.inverse_a, right))
        return as_native(_solve_directly(*batch)) if isinstance(right, np.ndarray) else _solve_directly(*batch)


class DominantLaplacian(Laplacian):
    """The Laplacian of plans of which some rows have a dominant entry, as near a permutation.

    Everything that a gradient lives on is as small there as the plan is off the permutation. So nothing is computed as a difference of large
    numbers: those rows are counted from their dominant entry. All in tensors.
    """

    def __init__(self, plan: Tensor) -> None:
        super().__init__(plan)
        self.dominant, self.has_dominant = plan.argmax(-1), self.is_dominant
        largest = plan.gather(-1, self.dominant[..., None])[..., 0]
        self.entry = torch.where(self.has_dominant, largest, 0.0)
        # The plan without the dominant entries; a row that has none keeps the one that was looked at.
        kept = torch.where(self.has_dominant, 0.0, largest)
        rest = plan.scatter(-1, self.dominant[..., None], kept[..., None])
        self.rows, self.columns = product(rest), product(rest.mT)
        self.off = torch.where(self.has_dominant, self.rows(ones(plan, -1)), 0.0)
        self.degrees = self.columns(ones(plan, -2))
        self.diagonal = self.degrees + self._to_columns(self.entry * self.off * self.inverse_a)
        # Products with the whole plan from here on.
        self.rest_rows, self.rest_columns = self.rows, self.columns
        self.rows, self.columns = product(plan), product(plan.mT)

    def _to_columns(self, values: Tensor) -> Tensor:
        """Add the value of each row to its dominant column."""
        return torch.zeros_like(self.b).scatter_add_(-1, self.dominant, values)

    def centre(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract from each row the value at its dominant entry."""
        offset = torch.where(self.has_dominant, change.gather(-1, self.dominant[..., None])[..., 0], 0.0)
        return change - offset[..., None], offset

    def row_means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value at the dominant entry, and what ``P values / a`` is above that."""
        at_dominant = torch.where(self.has_dominant, values.gather(-1, self.dominant), 0.0)
        return at_dominant, (self.rest_rows(values) - self.off * at_dominant) * self.inverse_a

    def __matmul__(self, values: Tensor) -> Tensor:
        at_dominant, excess = self.row_means(values)
        found: Tensor = (
            self.degrees * values - self.rest_columns(at_dominant + excess) - self._to_columns(self.entry * excess)
        )
        return found


def _conjugate_gradients(operator: Callable[[Array], Array], right: Array, inverse: Array) -> Array | None:
    """Solve ``operator(x) = right``, preconditioned by ``inverse``; None where it takes too many steps."""
    dot, at_least = (np.dot, max) if isinstance(right, np.ndarray) else (_dot, torch.clamp_min)
    residual_goal, tiny = (1e-14, 1e-300) if right.dtype in (torch.float64, np.float64) else (3e-7, 1e-37)
    direction = scaled = inverse * right
    solution, residual = 0.0, right
    energy = dot(right, scaled)
    if not (energy < float("inf")).all():  # a part of the plan has no link to the rest that the type could hold
        return None
    target = energy * residual_goal**2
    # A product costs about as much as n / 8 of the direct solution's n^3 operations.
    for _ in range(max(8, right.shape[-1] // 8)):
        image = operator(direction)
        # Of a problem of the batch that is solved, all is zero: its step is to be zero and not 0 / 0.
        step = energy / at_least(dot(direction, image), tiny)
        solution = solution + step * direction
        residual = residual - step * image
        scaled = inverse * residual
        before, energy = energy, dot(residual, scaled)
        if (energy <= target).all():
            return solution
        direction = scaled + energy / at_least(before, tiny) * direction
    return None


def _solve_directly(plan: Tensor, inverse_a: Tensor, right: Tensor) -> Tensor:
    """Solve by elimination. A Laplacian's diagonal is the sum of its other entries, which keeps it exact near a permutation."""
    links = plan.mT @ (plan * inverse_a[..., None])
    links.diagonal(dim1=-2, dim2=-1).zero_()
    root = links.sum(-1).clamp_min(torch.finfo(links.dtype).tiny).sqrt()
    null = root / root.norm(dim=-1, keepdim=True)
    # A term of rank one takes the place of the singular direction, and a ridge keeps it finite where the graph falls apart.
    system = links.div_(root[..., :, None]).div_(root[..., None, :]).neg_()
    system.add_(null[..., :, None] * null[..., None, :])
    system.diagonal(dim1=-2, dim2=-1).add_(1 + 10 * torch.finfo(links.dtype).eps)
    solution, _ = torch.linalg.solve_ex(system, (right / root)[..., None])
    found: Tensor = solution[..., 0] / root
    return found


def product(matrix: Array) -> Callable[[Array], Array]:
    """Return the function that multiplies an array ``(n, m)`` with a vector, or matrices ``(B, n, m)`` with vectors ``(B, m)``.

    For the batch a loop: PyTorch's batched product with a vector takes up to six times as long on a CPU, but for small matrices.
    """
    if isinstance(matrix, np.ndarray):
        return matrix.dot
    batch, n, m = matrix.shape
    if batch == 1:  # of one row, without a view before and after
        transposed = matrix[0].mT
        return lambda vector: torch.mm(vector, transposed)
    if matrix.is_cuda or n * m < 1 << 13:
        return lambda vector: (matrix @ vector[..., None])[..., 0]
    each = matrix.unbind()
    return lambda vector: torch.stack([torch.mv(one, other) for one, other in zip(each, vector, strict=True)])


def as_native(tensor: Tensor) -> Array:
    """Return one problem on a CPU as an array, anything else as it is."""
    return tensor.numpy()[0] if tensor.shape[0] == 1 and tensor.is_cpu else tensor


def as_tensor(array: Array) -> Tensor:
    """Return the batch again that ``as_native`` was given."""
    return array if isinstance(array, Tensor) else torch.from_numpy(np.asarray(array)[None])


def row_chunks(matrix: Array) -> list[slice]:
    """Return slices of the rows of matrices, each of few enough entries."""
    *batch, n, m = matrix.shape
    size = max(1, _CHUNK // (m * (batch[0] if batch else 1)))
    return [slice(start, start + size) for start in range(0, n, size)]


def ones(matrix: Array, dim: int) -> Array:
    """Return the vector of ones that goes with a dimension of the matrices."""
    shape = (*matrix.shape[:-2], matrix.shape[dim])
    return np.ones(shape, matrix.dtype) if isinstance(matrix, np.ndarray) else matrix.new_ones(shape)


def row_maxima(array: Array) -> Array:
    """Return the largest entries along the last dimension."""
    return array.max(-1) if isinstance(array, np.ndarray) else array.amax(-1)


def _inverse(values: Array) -> Array:
    """Return ``1 / values``; of a zero a number that is finite, for what it is multiplied with is zero, too."""
    if isinstance(values, Tensor):
        return 1 / values.clamp_min(torch.finfo(values.dtype).tiny)
    return 1 / np.maximum(values, np.finfo(values.dtype).tiny)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
