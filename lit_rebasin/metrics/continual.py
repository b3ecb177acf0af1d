"""What an accuracy matrix says about a continual learner.

``matrix[t, s]`` is the accuracy on task ``s`` after training task ``t``, in [0, 1]; NaN where it was not measured. Definitions are those of
Avalanche: forgetting is the accuracy right after a task was learned minus the accuracy at the end.
"""

from torch import Tensor

from lit_rebasin.transport.arguments import check_count, check_tensor


def average_accuracy(matrix: Tensor) -> float:
    """Return ``mean_s A[T-1, s]``, the accuracy at the end over all T tasks."""
    return float(_square(matrix)[-1].mean())


def forgetting(matrix: Tensor) -> float:
    """Return ``mean_{s<T-1} (A[s, s] - A[T-1, s])``: how much was lost since each task was learned; 0 for a single task."""
    matrix = _square(matrix)
    if len(matrix) == 1:
        return 0.0
    return float((matrix.diagonal()[:-1] - matrix[-1, :-1]).mean())


def backward_transfer(matrix: Tensor) -> float:
    """Return the negative of `forgetting` (Lopez-Paz and Ranzato, NeurIPS 2017)."""
    return -forgetting(matrix)


def forward_transfer(matrix: Tensor, untrained: Tensor) -> float:
    """Return ``mean_{s>0} (A[s-1, s] - untrained[s])``: what is known of a task before it comes (Lopez-Paz and Ranzato, NeurIPS 2017).

    Args:
        matrix: ``(T, T)``.
        untrained: ``(T,)``, the accuracy on each task before any training.

    Returns:
        0 for a single task.

    Raises:
        TypeError: If one of the two is no tensor of real numbers.
        ValueError: If the shapes do not fit.
    """
    matrix = _square(matrix)
    check_tensor("untrained", untrained)
    if untrained.shape != (len(matrix),):
        raise ValueError(
            f"untrained must have one accuracy a task, ({len(matrix)},), got shape {tuple(untrained.shape)}."
        )
    if len(matrix) == 1:
        return 0.0
    return float((matrix.diagonal(1) - untrained.double()[1:]).mean())


def learning_accuracy(matrix: Tensor) -> float:
    """Return ``mean_t A[t, t]``, the accuracy on each task right after it was learned (Riemer et al., ICLR 2019)."""
    return float(_square(matrix).diagonal().mean())


def after_task(matrix: Tensor, task: int) -> Tensor:
    """Return the matrix ``(task + 1, task + 1)`` of the stream as it stood after ``task``."""
    check_matrix("matrix", matrix)
    check_count("task", task, 0)
    if task >= len(matrix):
        raise ValueError(f"task must be one of the {len(matrix)} tasks of the matrix, counted from 0, got {task}.")
    return matrix[: task + 1, : task + 1]


def check_matrix(name: str, matrix: Tensor) -> None:
    """Raise an error unless an argument is an accuracy matrix."""
    check_tensor(name, matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(f"{name} must be an accuracy matrix, square and not empty, got shape {tuple(matrix.shape)}.")


def _square(matrix: Tensor) -> Tensor:
    check_matrix("matrix", matrix)
    return matrix.double()
