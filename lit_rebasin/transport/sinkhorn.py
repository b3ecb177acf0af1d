"""Entropic transport plans between neurons, with an exact implicit gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class SinkhornResult:
    """What a Sinkhorn solve found.

    Attributes:
        plan: ``(..., n, n)``, non-negative, columns summing to one and rows to one within ``marginal_error``.
        potentials: The pair ``(f, g)``, each ``(..., n)``, with ``plan = exp(logits / regularization + f[..., None] + g[..., None, :])``.
        marginal_error: ``(...)``, the largest deviation of a row sum from one.
        iterations: Row-and-column updates that were run.
        converged: ``(...)``, whether ``marginal_error`` is within the tolerance.
    """

    plan: Tensor
    potentials: tuple[Tensor, Tensor]
    marginal_error: Tensor
    iterations: int
    converged: Tensor


def sinkhorn(
    logits: Tensor, *, regularization: float = 1.0, max_iterations: int = 200, tolerance: float = 1e-5
) -> SinkhornResult:
    """Scale ``exp(logits / regularization)`` to a doubly stochastic plan, in the log domain.

    Solves ``argmax_P <P, logits> - regularization * sum P (log P - 1)`` over doubly stochastic ``P`` (Cuturi, NeurIPS 2013; Mena et al.,
    ICLR 2018). The gradient comes from the optimality conditions (Eisenberger et al., CVPR 2022; Pena et al., CVPR 2023), so its memory does
    not grow with the iterations. It is the gradient of the plan as the solution of the problem with the marginals that were reached; where
    the solve stopped early it is therefore not the derivative of the truncated iteration.

    Args:
        logits: ``(..., n, n)``, the gain of each assignment. Below float32 it is computed in float32 and the plan cast back.
        regularization: Temperature, above 0.
        max_iterations: Bound on the row-and-column updates.
        tolerance: Stop once every row sum is this near to one; 0 runs all iterations.

    Returns:
        The plan, differentiable once with respect to ``logits``; every other field is detached.

    Raises:
        ValueError: If ``logits`` is not square or a number is out of range.
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be square in their last two dimensions, got shape {tuple(logits.shape)}.")
    if not regularization > 0:
        raise ValueError(f"regularization must be above 0, got {regularization}.")
    if max_iterations < 1 or tolerance < 0:
        raise ValueError(f"max_iterations must be >= 1 and tolerance >= 0, got {max_iterations} and {tolerance}.")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide / regularization
    with torch.no_grad():
        f, g, iterations = _potentials(scaled.detach(), max_iterations, tolerance)
    plan = _ImplicitPlan.apply(scaled, f, g)
    error = (plan.detach().sum(-1) - 1).abs().amax(-1)
    return SinkhornResult(plan.to(logits.dtype), (f, g), error, iterations, error <= tolerance)


def _potentials(scaled: Tensor, max_iterations: int, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """Alternate row and column updates until every row sum is one within ``tolerance``."""
    f = -scaled.logsumexp(-1)
    g = -(scaled + f[..., :, None]).logsumexp(-2)
    for iteration in range(1, max_iterations):
        new_f = -(scaled + g[..., None, :]).logsumexp(-1)
        # Row i of the current plan sums to exp(f_i - new_f_i): the error costs no pass of its own.
        if tolerance > 0 and torch.expm1(f - new_f).abs().max() <= tolerance:
            return f, g, iteration
        f = new_f
        g = -(scaled + f[..., :, None]).logsumexp(-2)
    return f, g, max_iterations


class _ImplicitPlan(torch.autograd.Function):
    """The plan of given potentials, differentiated as the solution of its optimality conditions."""

    @staticmethod
    def forward(ctx: FunctionCtx, scaled: Tensor, f: Tensor, g: Tensor) -> Tensor:
        plan = (scaled + f[..., :, None] + g[..., None, :]).exp_()
        ctx.save_for_backward(plan)
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return ``P * (G - u 1^T - 1 v^T)``, with ``u, v`` such that its rows and columns sum to zero.

        Eliminating ``u`` leaves the n x n system ``(diag(b) - P^T diag(1/a) P) v = c - P^T (r / a)``, where ``a, b`` are the marginals and
        ``r, c`` the row and column sums of ``P * G``. It is singular along the ones vector, which the shift removes.
        """
        (plan,) = ctx.saved_tensors  # type: ignore[attr-defined]
        weighted = plan * gradient
        rows, columns = plan.sum(-1), plan.sum(-2)
        r, c = weighted.sum(-1), weighted.sum(-2)
        n = plan.shape[-1]
        by_row = plan / rows[..., None]
        system = torch.diag_embed(columns) - plan.mT @ by_row + 1.0 / n
        # Near a permutation the system is almost zero, as is the gradient: the ridge keeps the solve finite there.
        system.diagonal(dim1=-2, dim2=-1).add_(10 * torch.finfo(plan.dtype).eps)
        right = c - (by_row.mT @ r[..., None])[..., 0]
        factor, info = torch.linalg.cholesky_ex(system)
        if info.any():
            v = torch.linalg.lstsq(system, right[..., None]).solution[..., 0]
        else:
            v = torch.cholesky_solve(right[..., None], factor)[..., 0]
        u = (r - (plan @ v[..., None])[..., 0]) / rows
        return weighted - plan * (u[..., :, None] + v[..., None, :]), None, None
