"""From a plan or a gain matrix to the best permutation."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assignment(gain: Tensor) -> Tensor:
    """Return the permutation ``p`` that maximises ``sum_i gain[i, p[i]]``.

    Args:
        gain: ``(n, n)``, finite: a plan, logits or any matrix of gains.

    Returns:
        LongTensor ``(n,)`` on the CPU, with ``P[i, p[i]] = 1`` for the matrix ``P`` of the permutation.

    Raises:
        ValueError: If ``gain`` is not a square matrix, or holds a NaN or an infinity.
    """
    if gain.ndim != 2 or gain.shape[0] != gain.shape[1]:
        raise ValueError(f"gain must be a square matrix, got shape {tuple(gain.shape)}.")
    values = gain.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        raise ValueError("gain holds a NaN or an infinity, so it has no best permutation.")
    _, columns = linear_sum_assignment(values.numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.long)
