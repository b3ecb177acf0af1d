"""Damped Newton steps on the semi-dual of a transport problem, and when to end them."""

import numpy as np
import torch
from torch import Tensor

from lit_rebasin.transport.laplacian import as_tensor, laplacian
from lit_rebasin.transport.problem import Problem

# Length of a Newton step after which the potentials are right to about its square.
_SETTLED = 1e-3


class Progress:
    """Whether Newton steps are taken, and whether they still gain anything.

    Attributes:
        newton: Whether they are taken.
        settled: Whether the last of them was so short that, as they converge quadratically, no other is needed.
    """

    def __init__(self, newton: bool, rounding: float) -> None:
        self.newton, self._rounding = newton, rounding
        self._best, self._since = float("inf"), 0
        self.settled, self._polished = False, 0

    def is_stuck(self, error: float) -> bool:
        """Return whether the error is as small as rounding and some Newton steps have not halved it."""
        if not self.newton or error > self._rounding:
            return False
        self._since = 0 if error < self._best / 2 else self._since + 1
        self._best = min(self._best, error)
        return self._since >= 4

    def note(self, distance: float, reached: bool) -> None:
        """Take account of a Newton step; between parts of a plan that hardly touch they never settle, so that some must do."""
        self._polished += reached
        self.settled = distance < _SETTLED or self._polished >= 10


def newton_step(problem: Problem, phi: Tensor, psi: Tensor) -> tuple[Tensor, float]:
    """Return a damped Newton step of ``psi`` and how far it would have gone undamped; ``phi`` is the row update.

    It raises the semi-dual ``<b, psi> - sum_i a_i LSE_j(x_ij + psi_j)``, whose third derivative along a step ``h`` is at most ``max h - min h``
    times the second: so a share ``log(1 + d) / d`` of the step with ``d = max h - min h`` raises it from any start (Sun and Tran-Dinh,
    Mathematical Programming 2019, generalized self-concordance).
    """
    system = laplacian(problem.plan(phi, psi))
    # b less the sums of the columns, from the logarithms: near a permutation both are equal to all digits of a sum.
    residual = (-torch.expm1(psi - problem.column_update(phi)).nan_to_num(0.0) * problem.b).to(problem.b.dtype)
    right = residual[0].numpy() if isinstance(system.plan, np.ndarray) else residual
    # Where it has no finite solution, the step is left to the plain update that follows.
    step = as_tensor(system.solve(right)).double().nan_to_num(0.0, 0.0, 0.0)
    with_mass = problem.b > 0
    high = torch.where(with_mass, step, -torch.inf).amax(-1, keepdim=True)
    low = torch.where(with_mass, step, torch.inf).amin(-1, keepdim=True)
    distance = (high - low).clamp_min(torch.finfo(step.dtype).eps)
    return (step - low) * (distance.log1p() / distance), float(distance.max())
