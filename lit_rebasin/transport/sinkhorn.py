"""Entropic transport plans between neurons."""

from dataclasses import dataclass

from torch import Tensor

from lit_rebasin.transport.arguments import Arguments, check_count, read_arguments
from lit_rebasin.transport.implicit import ImplicitPlan


@dataclass(frozen=True)
class SinkhornResult:
    """What a Sinkhorn solve found. All but the plan is detached.

    Attributes:
        plan: ``(..., n, m)``, non-negative; the columns have their masses, the rows theirs within ``marginal_error``, up to rounding.
        potentials: The pair ``(f, g)``, ``(..., n)`` and ``(..., m)`` in units of the cost, with
            ``plan = exp((f + g - cost) / regularization)``, ``cost = -logits`` where those were given. -inf where there is no mass.
        marginal_error: ``(...)``, the largest deviation of a row sum from its mass, as a multiple of the mean mass of a row; that of the
            potentials, which the entries of a float32 plan round.
        iterations: Row-and-column updates that were run, Newton steps included; the same for the whole batch.
        converged: ``(...)``, whether ``marginal_error`` is within the tolerance.
    """

    plan: Tensor
    potentials: tuple[Tensor, Tensor]
    marginal_error: Tensor
    iterations: int
    converged: Tensor


def sinkhorn(
    cost: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    regularization: float | Tensor = 1.0,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    warm_start: tuple[Tensor, Tensor] | None = None,
) -> SinkhornResult:
    """Return the plan ``P`` that minimises ``<P, cost> + regularization * sum P (log P - 1)`` with row sums ``a`` and column sums ``b``.

    Scaling vectors and matrix products (Cuturi, NeurIPS 2013) where nothing can overflow, log-domain updates where it could (Schmitzer, SIAM
    J. Sci. Comput. 2019), and, unless all iterations are asked for, a warm start from higher temperatures and damped Newton steps where both
    are slow. The plan is that of a float64 solve in the log domain at any temperature, to the precision of the costs' type.

    **The gradient** with respect to cost or logits, masses and regularization comes from the optimality conditions (Eisenberger et al., CVPR
    2022; Pena et al., CVPR 2023), so that its memory does not grow with the iterations. It is the gradient of the plan as the exact solution
    for the masses that it has: where the solve stopped early it is not the derivative of the truncated iteration, but that of the solution
    whose row sums are those reached. It may be differentiated again, and runs under ``torch.func`` (``grad``, ``vmap``, ``jacrev``) and
    ``torch.compile``. Total masses stay equal, so the gradients of ``a`` and ``b`` are known up to a constant, given such that
    ``sum_j b_j grad_j = 0``; where there is no mass they are 0.

    Args:
        cost: ``(..., n, m)``, finite. Below float32 it is computed in float32 and the plan cast back.
        a: ``(..., n)``, masses of the rows, 0 or more. Default: ones, or even shares of the total of ``b``.
        b: ``(..., m)``, masses of the columns with the total of ``a``. Default: even shares of it; ones for a square plan.
        logits: Gains, in the place of ``cost``: ``cost = -logits``, as the re-basin literature maximises.
        regularization: Temperature, above 0, in units of the cost: a number, or ``(...)`` for one a problem.
        max_iterations: Bound on the updates.
        tolerance: Stop once ``marginal_error`` is at most this; looked at every fifth update. With 0 all iterations are run, and plain
            updates only.
        warm_start: Potentials ``(f, g)`` of a similar problem. Default: zeros, or where ``tolerance`` is above 0 and the temperature low,
            potentials found at higher ones.

    Returns:
        The plan and how it was reached.

    Raises:
        ValueError: If shapes do not fit, or a number is out of range, NaN or infinite.

    Example:
        >>> plan = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), regularization=0.5).plan
        >>> plan.diagonal()
        tensor([0.8808, 0.8808])
    """
    check_count("max_iterations", max_iterations)
    if not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}.")
    arguments = read_arguments(cost, logits, a, b, regularization)
    start = None if warm_start is None else _column_potentials(warm_start, arguments.scores)
    return solution(arguments, start, max_iterations, tolerance, tolerance=tolerance)


def solution(arguments: Arguments, extra: Tensor | None, *settings: float, tolerance: float) -> SinkhornResult:
    """Run the solver that the settings belong to, and say whether it has reached the tolerance."""
    problem = (arguments.scores, arguments.a, arguments.b, arguments.regularization)
    plan, f, g, error, iterations = ImplicitPlan.apply(*problem, extra, arguments.sign, *settings)
    return SinkhornResult(plan.to(arguments.dtype), (f, g), error, int(iterations), error <= tolerance)


def _column_potentials(warm_start: tuple[Tensor, Tensor], scores: Tensor) -> Tensor:
    """Return those of the columns, for the first update makes those of the rows."""
    *batch, n, m = scores.shape
    if not isinstance(warm_start, tuple) or [type(one) for one in warm_start] != [Tensor, Tensor]:
        raise ValueError("warm_start must be a pair of tensors, the potentials of another result.")
    f, g = warm_start
    try:
        f.expand(*batch, n)
        return g.detach().to(scores.dtype).expand(*batch, m)
    except RuntimeError:
        expected = f"{(*batch, n)} and {(*batch, m)}"
        raise ValueError(
            f"warm_start must be of shapes {expected}, got {tuple(f.shape)} and {tuple(g.shape)}."
        ) from None
