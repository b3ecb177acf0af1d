"""Sinkhorn's iteration: by scaling vectors, in the log domain where those could overflow, and by Newton steps where both are slow."""

from collections.abc import Callable
from math import ceil, log, log2
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_rebasin.transport.laplacian import Array, as_native, as_tensor, ones, product
from lit_rebasin.transport.newton import Progress, newton_step
from lit_rebasin.transport.problem import Problem, row_error

# Scores and logarithms of the masses that span less than this cannot overflow a float32 scaling vector, nor lose an entry that counts.
_NARROW = 40.0
# Scaling vectors are absorbed into the potentials before their logarithm exceeds this.
_ABSORB = 20.0
_CHECK_EVERY = 5
# Updates before it is asked whether Newton steps would be faster, and the updates that one of them is worth.
_PATIENCE, _NEWTON_WORTH = 40, 40
# Newton steps at each temperature of a warm start, unless one of them is shorter than one.
_LEVEL_STEPS = 15
# Factors by which a kernel may be wrong without an underflow that counts, in float32.
_MODERATE = 1e15
# Error of a float64 sum.
_ROUNDING = 1e-14

Potentials = tuple[Tensor, Tensor]


def solve(
    problem: Problem, start: Tensor | None, max_iterations: int, tolerance: float
) -> tuple[Array, Array, Array, Array, int]:
    """Return the plan, ``phi``, ``psi``, the error of the rows ``(B,)`` and the number of updates, Newton steps included.

    Tensors, or for one problem on a CPU it may be arrays without the leading dimension.

    Args:
        problem: The batch.
        start: Potentials ``psi`` of the columns ``(B, m)`` to start from, or None.
        max_iterations: Bound on the updates, at least 1.
        tolerance: Stop once every error of the rows is at most this; 0 runs all, and plain updates only.
    """
    if problem.span >= _NARROW or problem.largest_logarithm() >= _NARROW:
        return _solve_wide(problem, start, max_iterations, tolerance)
    kernel, shift = _kernel(problem)
    scaling = Scaling(problem, kernel)
    if start is not None:
        scaling.v = as_native((start - start.amax(-1, keepdim=True)).clamp_min(-_NARROW).exp().to(problem.cost.dtype))
    iterations, error = scaling.run(max_iterations, tolerance)
    phi, psi = _log(scaling.u) + shift, _log(scaling.v)
    plan = scaling.plan_()
    if iterations < max_iterations and (
        scaling.slow or (tolerance > 0 and problem.is_sharp(as_tensor(plan), tolerance))
    ):
        return _solve_wide(problem, as_tensor(psi).double(), max_iterations, tolerance, iterations, newton=True)
    return plan, phi, psi, error, iterations


def _kernel(problem: Problem) -> tuple[Array, Array]:
    """Return ``exp(x + shift)``, with the shift that brings scores near to zero where they are not; on a CPU by NumPy, in half the time."""
    cost = as_native(problem.cost)
    if isinstance(cost, np.ndarray):
        low, high = problem.bounds[0]
        shift = 0.0 if max(-low, high) < _NARROW else -(low + high) / 2
        scores = cost * problem.rates[0]
        if shift:
            scores += shift
        return np.exp(scores, out=scores), shift
    shifts = problem.rate.new_tensor([-(low + high) / 2 for low, high in problem.bounds])[:, None].to(cost.dtype)
    scores = (cost * problem.rate[:, :, None].to(cost.dtype)).add_(shifts[:, :, None])
    if scores.is_cpu:
        np.exp(scores.numpy(), out=scores.numpy())
        return scores, shifts
    return scores.exp_(), shifts


def _solve_wide(
    problem: Problem,
    psi: Tensor | None,
    max_iterations: int,
    tolerance: float,
    iterations: int = 0,
    newton: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Update in the log domain, by scaling for as many iterations as cannot overflow, and by Newton steps.

    An update is 1-Lipschitz in the largest norm of a potential, so that no later one moves it further than the one before did. Of a sharp
    plan the errors of the rows tell little, for they are small from the start: it is followed until the potentials have settled.
    """
    if psi is None and tolerance > 0:
        psi, iterations = _warm_start(problem, max_iterations)
    psi = torch.zeros_like(problem.log_b) if psi is None else psi.nan_to_num(0.0, 0.0, 0.0)
    phi, psi = _update(problem, torch.where(problem.b > 0, psi, -torch.inf))
    iterations += 1
    progress = Progress(newton, 100 * torch.finfo(problem.cost.dtype).eps)
    while True:
        step = problem.row_update(psi)
        moved = torch.where(problem.a > 0, step - phi, 0.0)
        error = row_error((-moved).exp() * problem.a, problem.a)
        worst = float(error.max())
        reached = tolerance > 0 and worst <= tolerance
        if iterations >= max_iterations or reached or progress.is_stuck(worst):
            plan = problem.plan(phi, psi)
            settled = progress.settled or worst < _ROUNDING
            if not reached or iterations >= max_iterations or settled or not problem.is_sharp(plan, tolerance):
                return plan, phi, psi, error.to(problem.cost.dtype), iterations
        furthest = float(moved.abs().max())
        if progress.newton or reached:
            longer, distance = newton_step(problem, step, psi)
            phi, psi = _update(problem, psi + longer)
            progress.note(distance, reached)
            ran = 1
        elif furthest > _ABSORB / 4:
            phi, psi, ran = step, problem.column_update(step), 1
        else:
            allowed = min(max_iterations - iterations, int(_ABSORB / max(furthest, 1e-12)))
            scaling = Scaling(problem, as_native(problem.plan(phi, psi)))
            ran, _ = scaling.run(allowed, tolerance)
            u, v = as_tensor(scaling.u).double(), as_tensor(scaling.v).double()
            phi, psi = phi + u.log(), psi + v.log()
            progress.newton = scaling.slow
        iterations += ran
        progress.newton |= tolerance > 0 and iterations > 2 * _PATIENCE


def _warm_start(problem: Problem, max_iterations: int) -> tuple[Tensor | None, int]:
    """Return potentials to start from, found at scores that double from the ordinary range on, and the updates that took."""
    halvings = max(0, ceil(log2(problem.span / _NARROW))) if problem.span > 0 else 0
    if (_LEVEL_STEPS + 1) * halvings + _PATIENCE > max_iterations:
        return None, 0
    psi = torch.zeros_like(problem.log_b)
    iterations = halvings
    for level in range(halvings, 0, -1):
        warmer = problem.at(1 / 2**level)
        _, psi = _update(warmer, psi)
        for _ in range(_LEVEL_STEPS):
            longer, distance = newton_step(warmer, warmer.row_update(psi), psi)
            psi = psi + longer
            iterations += 1
            if distance < 1:
                break
        psi = 2 * psi
    return psi, iterations


def anneal(problem: Problem, betas: list[float], debiased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Update once at each temperature of a falling sequence; return what ``solve`` returns.

    Args:
        problem: The batch, with the rates of the end.
        betas: Inverse temperatures relative to the last of them, one more than there are updates.
        debiased: Whether a row update keeps the share ``theta`` of the one before.
    """
    psi = problem.log_b
    phi = row_update = problem.at(betas[0]).row_update(psi)
    highest = problem.rate.new_tensor([[high] for _, high in problem.bounds])
    for t, beta in enumerate(betas[1:]):
        theta = 1 - betas[t - 1] / betas[t] if debiased and t else 0.0
        # A row without mass has nothing to keep: -inf less -inf.
        phi = row_update + theta * (phi - problem.log_a).nan_to_num(0.0)
        # The potentials of the step before, less what the largest score gains: the new kernel is no larger than their plan.
        colder, guess = problem.at(beta), psi - (beta - betas[t]) * highest
        kernel = colder.plan(phi, guess)
        columns = _ratio(problem.b, kernel.sum(-2))
        rows = _ratio(problem.a, product(kernel)(columns))
        if _is_moderate(rows) and _is_moderate(columns):
            psi, row_update = guess + columns.double().log(), phi + rows.double().log()
        else:
            psi = colder.column_update(phi)
            row_update = colder.row_update(psi)
    plan = problem.plan(phi, psi)
    return plan, phi, psi, row_error(plan.sum(-1), problem.a), len(betas) - 1


def _ratio(mass: Tensor, sums: Tensor) -> Tensor:
    """Return ``mass / sums``, 0 where there is no mass."""
    return torch.where(mass > 0, mass / sums, 0.0)


def _is_moderate(scaling: Tensor) -> bool:
    """Return whether a kernel held all that counts for a scaling vector."""
    return bool(((scaling < _MODERATE) & ((scaling > 1 / _MODERATE) | (scaling == 0))).all())


def _update(problem: Problem, psi: Tensor) -> Potentials:
    phi = problem.row_update(psi)
    return phi, problem.column_update(phi)


class Scaling:
    """Row and column updates of a kernel ``K``: the plan is ``u * K * v``. One problem on a CPU is an array, on the memory of the kernel.

    Attributes:
        u: ``(B, n)``, the scaling of the rows.
        v: ``(B, m)``, that of the columns.
        slow: Whether a run was left because Newton steps would be faster.
    """

    def __init__(self, problem: Problem, kernel: Array) -> None:
        self._kernel = kernel
        self.u, self.v = ones(kernel, -2), ones(kernel, -1)
        if problem.masses is None:
            self._a, self._b = ones(kernel, -2), ones(kernel, -1)
        else:
            self._a, self._b = map(as_native, problem.masses)
            _hold_empty(as_tensor(kernel), problem)
        self.slow = False

    def run(self, iterations: int, tolerance: float) -> tuple[int, Array]:
        """Run up to ``iterations`` updates, fewer where the tolerance is reached or too far away.

        Returns the number of updates and the error of the rows ``(B,)``; the columns are exact.
        """
        a, b, u, v = self._a, self._b, self.u, self.v
        rows, columns = product(self._kernel), product(self._kernel.mT)
        divide: Callable[..., Any] = np.divide if isinstance(a, np.ndarray) else torch.div
        before = 0.0
        sums = rows(v)
        for done in range(1, iterations + 1):
            divide(a, sums, out=u)
            divide(b, columns(u), out=v)
            sums = rows(v)
            if tolerance > 0 and done % _CHECK_EVERY == 0:
                error = float(row_error(u * sums, a).max())
                self.slow = done >= _PATIENCE and _remaining(before, error, tolerance) > _NEWTON_WORTH
                if error <= tolerance or self.slow:
                    break
                before = error
        return done, row_error(u * sums, a)

    def plan_(self) -> Array:
        """Turn the kernel into the plan, in its place."""
        self._kernel *= self.u[..., :, None]
        self._kernel *= self.v[..., None, :]
        return self._kernel


def _log(scaling: Array) -> Array:
    """Return the logarithms, -inf where there is no mass."""
    if isinstance(scaling, Tensor):
        return scaling.log()
    with np.errstate(divide="ignore"):
        return np.log(scaling)


def _remaining(before: float, error: float, tolerance: float) -> float:
    """Return how many more updates the tolerance will take, as the last few have gone."""
    if error >= before:
        return float("inf")
    return _CHECK_EVERY * log(tolerance / error) / log(error / before)


def _hold_empty(kernel: Tensor, problem: Problem) -> None:
    """Give rows and columns without mass one entry, so that their scaling is 0 and not 0 / 0."""
    rows, columns = problem.a == 0, problem.b == 0
    if rows.any() or columns.any():
        batch = torch.arange(len(kernel), device=kernel.device)
        kernel[batch, :, problem.b.argmax(-1)] += rows
        kernel[batch, problem.a.argmax(-1)] += columns
