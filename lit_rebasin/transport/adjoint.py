"""The linear system behind the gradient of a plan: how the plan answers to a change of its scores and masses.

With ``P = exp(x + phi + psi)``, ``a = P 1`` and ``b = P' 1``, a change ``dx`` of the scores and ``da, db`` of the masses moves the plan by
``P * (dx - alpha 1' - 1 beta')``, where ``a alpha + P beta = (P * dx) 1 - da`` and ``P' alpha + b beta = (P * dx)' 1 - db`` (Eisenberger et
al., CVPR 2022, theorem 3). The map is symmetric, so that the same system gives the gradient. Eliminating ``alpha`` leaves the Schur complement
``L = diag(b) - P' diag(1/a) P``, the Laplacian of a graph between the columns, singular along the ones vector.
"""

import numpy as np
import torch
from torch import Tensor

from lit_rebasin.transport.laplacian import Array, as_native, laplacian, ones, product, row_chunks


def adjoint(
    plan: Tensor, change: Tensor, da: Tensor | None = None, db: Tensor | None = None
) -> tuple[Array, Array, Array]:
    """Solve the system; return ``P * (change - alpha 1' - 1 beta')``, ``alpha`` and ``beta``.

    Tensors, or for one problem on a CPU it may be arrays without the leading dimension. A constant may be added to ``alpha`` and taken from
    ``beta``; which one is left open, and what a row or column without mass gets.

    Args:
        plan: ``(B, n, m)``.
        change: ``(B, n, m)``: ``dx``, or the incoming gradient.
        da: ``(B, n)``, default 0.
        db: ``(B, m)`` with the total of ``da``, default 0.
    """
    if plan.shape[-2] < plan.shape[-1]:
        moved, beta, alpha = adjoint(plan.mT, change.mT, db, da)
        return moved.mT, alpha, beta
    system = laplacian(plan)
    native = as_native if isinstance(system.plan, np.ndarray) else (lambda tensor: tensor)
    matrix, (centred, offset) = system.plan, system.centre(native(change))
    rows, columns = _weighted_sums(matrix, centred)
    if da is not None:
        rows = rows - native(da)
    if db is not None:
        columns = columns - native(db)
    rows = rows * system.inverse_a
    beta = system.solve(columns - system.columns(rows))
    at_dominant, excess = system.row_means(beta)
    shift = rows - excess
    # In this order the dominant entry of a row is left with -shift, as small as it is.
    moved = centred - beta[..., None, :]
    if isinstance(at_dominant, Tensor):
        moved += at_dominant[..., None]
    moved -= shift[..., None]
    moved *= matrix
    return moved, shift - at_dominant + offset, beta


def _weighted_sums(plan: Array, change: Array) -> tuple[Array, Array]:
    """Return the sums of the rows and of the columns of ``plan * change``, some rows at a time: new memory takes longer than the sums."""
    rows, columns = [], 0.0
    for some in row_chunks(plan):
        weighted = plan[..., some, :] * change[..., some, :]
        rows.append(product(weighted)(ones(weighted, -1)))
        columns = columns + product(weighted.mT)(ones(weighted, -2))
    if len(rows) == 1:
        return rows[0], columns
    return (np.concatenate(rows) if isinstance(plan, np.ndarray) else torch.cat(rows, -1)), columns
