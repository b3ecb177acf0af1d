"""Sinkhorn updates at a falling temperature, on the way to the unregularized plan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rebasin.transport.arguments import check_count, read_arguments
from lit_rebasin.transport.sinkhorn import SinkhornResult, solution


@dataclass(frozen=True)
class Schedule:
    """Inverse temperatures ``beta_t = beta_0 * (1 + t) ** kappa`` for a cost of range 1 (Chizat, arXiv 2408.11620).

    Any loop can step it: ``regularization(t)`` is the temperature of its step ``t``, so that one optimisation can anneal. The transport found
    converges to the optimal one if ``beta`` grows without bound while its steps vanish, that is for ``kappa`` between 0 and 1; 1/2 is the best
    for plain annealing, 2/3 for debiased.

    Args:
        beta_0: The first one, above 0.
        kappa: How fast it grows, above 0.

    Raises:
        ValueError: If one of them is not.
    """

    beta_0: float = 10.0
    kappa: float = 2 / 3

    def __post_init__(self) -> None:
        for name, value in (("beta_0", self.beta_0), ("kappa", self.kappa)):
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0 and finite, got {value}.")

    def beta(self, step: int) -> float:
        """Return the inverse temperature of a step, counted from 0.

        Raises:
            ValueError: If the step is negative.
        """
        if not step >= 0:
            raise ValueError(f"step must be 0 or more, got {step}.")
        value: float = self.beta_0 * (1 + step) ** self.kappa
        return value

    def regularization(self, step: int) -> float:
        """Return the temperature of a step, ``1 / beta``."""
        return 1 / self.beta(step)


def annealed_sinkhorn(
    cost: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    steps: int = 200,
    schedule: Schedule | None = None,
    debiased: bool = True,
) -> SinkhornResult:
    """Approach the unregularized plan by one Sinkhorn update at each temperature of a schedule (Chizat, arXiv 2408.11620).

    Annealing relaxes the row sums: they are as far off as the temperature falls in a step. Debiased, each row update keeps the share
    ``theta_t = (beta_t - beta_{t-1}) / beta_t`` of the one before, which cancels this error to the first order: in logarithms, relative to the
    masses, ``u_t = theta_t u_{t-1} - LSE_j(log b_j + v_{t-1,j} - beta_t c_ij)``, then ``v_t = -LSE_i(log a_i + u_{t,i} - beta_{t+1} c_ij)``.

    What is left of it shows in ``marginal_error``; :func:`round_to_polytope` turns the plan into a transport plan, :func:`assignment` into a
    permutation. The gradient is that of :func:`sinkhorn` at the last temperature, for the masses that the plan has.

    Args:
        cost: ``(..., n, m)``, as for :func:`sinkhorn`. The schedule is in units of its range, ``max - min`` of each problem.
        a: ``(..., n)``, masses of the rows.
        b: ``(..., m)``, masses of the columns.
        logits: Gains, in the place of ``cost``.
        steps: Updates.
        schedule: Default: ``kappa`` 2/3 if debiased, else 1/2.
        debiased: Whether to cancel the error of relaxing the row sums.

    Returns:
        The plan at the temperature of the last step; ``converged`` says whether its row sums are right to 1e-5.

    Raises:
        ValueError: If ``steps`` is not above 0, and as for :func:`sinkhorn`.
    """
    check_count("steps", steps)
    schedule = Schedule(kappa=2 / 3 if debiased else 1 / 2) if schedule is None else schedule
    arguments = read_arguments(cost, logits, a, b, _range(cost, logits) * schedule.regularization(steps))
    betas = torch.tensor([schedule.beta(step) for step in range(steps + 1)], dtype=torch.float64)
    return solution(arguments, betas, debiased, tolerance=1e-5)


def _range(cost: Tensor | None, logits: Tensor | None) -> Tensor | float:
    """Return the range of each problem, 1 where it is 0; any number where there is none, which is an error to come."""
    scores = cost if logits is None else logits
    if scores is None or scores.ndim < 2 or scores.numel() == 0:
        return 1.0
    scores = scores.detach().to(torch.float64)
    spread = scores.amax((-2, -1)) - scores.amin((-2, -1))
    # A cost that is not finite is an error of its own, not one of the regularization.
    return torch.where(spread > 0, spread, 1.0).nan_to_num(1.0, 1.0, 1.0)
