"""How far two clouds of points are from each other: exact transport, and kernels, which cost less."""

from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lit_rebasin.transport.arguments import check_number, check_points


def wasserstein_distance(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Return the Wasserstein distance of order 2 between two clouds of equal masses, and the plan that attains it.

    ``W_2^2 = min_P sum_ij P_ij |x_i - y_j|^2``. Of as many points on either side an optimal plan is a permutation over n, so that W_2 is the
    root mean square distance of the best pairing (Birkhoff; Ferbach et al., AISTATS 2024, lemma B.3), found by linear assignment; of clouds of
    different sizes it is found by POT. Exact; the cost grows with the cube of n.

    Args:
        x: ``(n, d)`` points.
        y: ``(m, d)`` points.

    Returns:
        The distance, and the plan ``(n, m)`` in float64 on the CPU, which sums to 1.

    Raises:
        TypeError: If the points are no tensors of real numbers.
        ValueError: If the shapes do not fit, or a point is NaN or infinite.
    """
    first, second = _points(x, y)
    costs: Any = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    plan = _matching(costs) if len(first) == len(second) else _transport(costs)
    return float((plan * costs).sum()) ** 0.5, torch.from_numpy(plan)


def _matching(costs: Any) -> Any:
    """Return the plan of a best pairing."""
    plan = np.zeros_like(costs)
    plan[linear_sum_assignment(costs)] = 1 / len(costs)
    return plan


def _transport(costs: Any) -> Any:
    """Return the plan between clouds of different sizes."""
    import ot

    masses = [np.full(size, 1 / size) for size in costs.shape]
    return ot.emd(*masses, costs, numItermax=10_000_000)


def energy_distance(x: Tensor, y: Tensor, *, exponent: float = 1.0) -> float:
    """Return the energy distance between two clouds of equal masses, a cheaper companion of the Wasserstein distance.

    ``D^2 = 2 E|X - Y|^r - E|X - X'|^r - E|Y - Y'|^r``, over all pairs, a point with itself among them, so that it is 0 for equal clouds only
    and never below (Szekely and Rizzo, 2013). ``D`` is the maximum mean discrepancy with the Riesz kernel ``-|x - y|^r``. For r = 1 and points
    on a line it is what SciPy calls so. The cost grows with the square of the number of points.

    Args:
        x: ``(n, d)`` points.
        y: ``(m, d)`` points.
        exponent: r, between 0 and 2, both not included.

    Raises:
        TypeError: If the points are no tensors of real numbers, or the exponent is no number.
        ValueError: If the shapes do not fit, a point is NaN or infinite, or the exponent is out of range.
    """
    check_number("exponent", exponent)
    if not 0 < exponent < 2:
        raise ValueError(f"exponent must lie between 0 and 2, got {exponent}.")
    first, second = _points(x, y)
    between, within_x, within_y = (
        float(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").pow(exponent).mean())
        for a, b in ((first, second), (first, first), (second, second))
    )
    value: float = max(0.0, 2 * between - within_x - within_y) ** 0.5
    return value


def _points(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return both clouds in float64 on the CPU."""
    for name, points in (("x", x), ("y", y)):
        check_points(name, points)
        if (points.detach().abs() > 1e150).any():
            raise ValueError(
                f"{name} holds coordinates above 1e150, whose squares overflow: divide x and y by a number."
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be points of one space, got {x.shape[1]} and {y.shape[1]} coordinates.")
    return x.detach().cpu().double(), y.detach().cpu().double()
