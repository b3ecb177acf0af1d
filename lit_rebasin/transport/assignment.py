"""From a soft plan to what it stands for: a permutation, or a plan whose masses are exact."""

from collections.abc import Sequence
from typing import overload

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lit_rebasin.transport.arguments import fill_masses


@overload
def assignment(gain: Tensor) -> Tensor: ...
@overload
def assignment(gain: Sequence[Tensor]) -> list[Tensor]: ...
def assignment(gain: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Return the permutation ``p`` that maximises ``sum_i gain[i, p[i]]``.

    Args:
        gain: ``(..., n, n)``, finite: plans, logits or any matrices of gains; or a sequence of such tensors, one a permutation group.

    Returns:
        LongTensor ``(..., n)`` on the CPU, with ``P[i, p[i]] = 1`` for the matrix ``P`` of the permutation; a list for a sequence.

    Raises:
        ValueError: If a gain is not square in its last two dimensions, or holds a NaN or an infinity.
    """
    if not isinstance(gain, Tensor):
        if isinstance(gain, str) or not all(isinstance(one, Tensor) for one in gain):
            raise ValueError(f"gain must be a tensor or a sequence of tensors, got {type(gain).__name__}.")
        return [assignment(one) for one in gain]
    if gain.ndim < 2 or gain.shape[-1] != gain.shape[-2]:
        raise ValueError(f"gain must be square in its last two dimensions, got shape {tuple(gain.shape)}.")
    values = gain.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        raise ValueError("gain holds a NaN or an infinity, so it has no best permutation.")
    n = gain.shape[-1]
    if values.numel() == 0:
        return torch.empty(gain.shape[:-1], dtype=torch.long)
    best = values.argmax(-1)
    for one, columns in zip(values.reshape(-1, n, n), best.view(-1, n), strict=True):
        # Where the best columns of the rows differ, no permutation is better; as of a sharp plan.
        if len(columns.unique()) < n:
            columns[:] = torch.as_tensor(linear_sum_assignment(one.numpy(), maximize=True)[1])
    return best


def round_to_polytope(plan: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Return a plan near to the given one whose rows and columns sum to their masses (Altschuler et al., NeurIPS 2017, algorithm 2).

    Rows, then columns with too much mass are scaled down, and what is missing is added as a matrix of rank one. The plan moves by at most
    twice the total error of its masses, in the sum of absolute values.

    Args:
        plan: ``(..., n, m)``, non-negative.
        a: ``(..., n)``, masses of the rows. Default: ones, or even shares of the total of ``b``.
        b: ``(..., m)``, masses of the columns with the total of ``a``. Default: even shares of it.

    Returns:
        ``(..., n, m)``.

    Raises:
        ValueError: If the plan is negative or not finite, or shapes or totals do not fit.
    """
    if plan.ndim < 2 or 0 in plan.shape[-2:] or not plan.is_floating_point():
        given = f"{tuple(plan.shape)} of {plan.dtype}"
        raise ValueError(f"plan must hold floating point numbers (..., n, m) with n and m above 0, got {given}.")
    if not bool((plan >= 0).all() & plan.isfinite().all()):
        raise ValueError("plan holds an entry that is negative, infinite or NaN.")
    n, m = plan.shape[-2:]
    a, b = fill_masses(a, b, n, m, plan)
    for name, mass in (("a", a), ("b", b)):
        if not bool((mass >= 0).all() & mass.isfinite().all()):
            raise ValueError(f"{name} holds a mass that is negative, infinite or NaN.")
    total_a, total_b = a.sum(-1), b.sum(-1)
    if not bool(((total_a - total_b).abs() <= 1e-4 * total_a).all()):
        raise ValueError(f"a and b must have the same total mass, got {total_a.tolist()} and {total_b.tolist()}.")
    tiny = torch.finfo(plan.dtype).tiny
    # Quotients of at most one, not clamped ones: those have gradients of 0 * inf where a sum is next to nothing.
    plan = plan * (a / plan.sum(-1).maximum(a).clamp_min(tiny))[..., None]
    plan = plan * (b / plan.sum(-2).maximum(b).clamp_min(tiny))[..., None, :]
    rows, columns = (a - plan.sum(-1)).clamp_min(0), (b - plan.sum(-2)).clamp_min(0)
    # Equal but for rounding; by the larger one, a plan without an error in its rows is not divided by nothing.
    missing = rows.sum(-1).maximum(columns.sum(-1)).clamp_min(tiny)
    return plan + rows[..., :, None] * (columns / missing[..., None])[..., None, :]


def plan_entropy(plan: Tensor) -> Tensor:
    """Return ``-sum P log P`` in nats, ``(...)``: of a doubly stochastic plan 0 for a permutation and ``n log n`` for the even one.

    Args:
        plan: ``(..., n, m)``, non-negative.
    """
    found: Tensor = torch.special.entr(plan).sum((-2, -1))
    return found
