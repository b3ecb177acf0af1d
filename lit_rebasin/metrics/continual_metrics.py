"""What the accuracy matrix says, as metrics that are fed with predictions."""

from numbers import Integral
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lit_rebasin.metrics.continual import backward_transfer, forgetting, forward_transfer, learning_accuracy
from lit_rebasin.metrics.figures import heat_map
from lit_rebasin.transport.arguments import check_tensor


class ContinualAccuracy(Metric):
    """The accuracy matrix of a continual learner, from its predictions.

    ``update`` takes predictions ``(B,)`` or logits ``(B, C)``, targets ``(B,)``, the ``task`` they are of, an index or ``(B,)``, and
    ``trained``, the index of the task trained last, -1 before the first. ``compute`` returns ``(T, T)`` in float64: the accuracy on task
    ``s`` after training task ``t`` at ``[t, s]``, NaN where nothing was predicted. (torchmetrics makes a number of it for a single task.)

    In a :class:`~torchmetrics.MetricCollection` with the other metrics of this file the counts are kept once.

    Args:
        n_tasks: Number of tasks T of the stream.
        **kwargs: Of :class:`~torchmetrics.Metric`.

    Raises:
        TypeError: If predictions or targets of an update are no tensors of real numbers, or a task is no whole number.
        ValueError: If ``n_tasks`` is no whole number above 0, or an update does not fit.

    Example::

        metric = ContinualAccuracy(n_tasks=5)
        metric.update(model(x), y, task=0, trained=2)
        figure, axes = metric.plot()
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    n_tasks: int
    correct: Tensor
    total: Tensor

    def __init__(self, n_tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(n_tasks, Integral) or n_tasks < 1:
            raise ValueError(f"n_tasks must be a whole number of at least 1, got {n_tasks!r}.")
        self.n_tasks = int(n_tasks)
        for name in ("correct", "total"):  # the first row is of the network before any training
            self.add_state(name, torch.zeros(self.n_tasks + 1, self.n_tasks, dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor, task: int | Tensor, trained: int) -> None:
        """Count the right predictions of a batch."""
        self._check(preds, target, trained)
        tasks = self._tasks(task, target)
        right = (preds.argmax(1) if preds.ndim == 2 else preds) == target
        self.total[trained + 1] += torch.bincount(tasks, minlength=self.n_tasks).to(self.total.device)
        self.correct[trained + 1] += torch.bincount(tasks[right], minlength=self.n_tasks).to(self.total.device)

    @override
    def compute(self) -> Tensor:
        """Return the accuracy matrix."""
        return self._accuracies()[1:]

    @override
    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure | None, Axes]:
        """Draw the matrix as a heat map.

        Args:
            val: A matrix that was computed before. Default: that of now.
            ax: Where to draw. Default: a figure of its own.

        Returns:
            The figure, ``None`` where ``ax`` is given, and the axes.
        """
        figure = None
        if ax is None:
            figure = Figure(layout="constrained")
            ax = figure.subplots()
        heat_map(ax, (self.compute() if val is None else val).cpu().reshape(self.n_tasks, self.n_tasks))
        ax.set_ylabel("task trained")
        return figure, ax

    def _accuracies(self) -> Tensor:
        """Return ``(T + 1, T)``, the first row that before any training."""
        return self.correct.double() / self.total  # 0 / 0 is NaN

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Return the square matrix of the tasks trained so far, and the row of these before any training."""
        accuracies = self._accuracies()
        measured = (self.total[1:].sum(1) > 0).nonzero()
        n = 1 if len(measured) == 0 else int(measured[-1]) + 1
        return accuracies[1 : n + 1, :n], accuracies[0, :n]

    def _check(self, preds: Tensor, target: Tensor, trained: int) -> None:
        for name, tensor in (("preds", preds), ("target", target)):
            check_tensor(name, tensor)
        if target.ndim != 1 or preds.ndim not in (1, 2) or len(preds) != len(target):
            raise ValueError(
                f"preds must be (B,) or (B, C) and target (B,), got shapes {tuple(preds.shape)} and {tuple(target.shape)}."
            )
        if not isinstance(trained, Integral):
            raise TypeError(f"trained must be a task index, a whole number, got a {type(trained).__name__}.")
        if not -1 <= trained < self.n_tasks:
            raise ValueError(f"trained must be a task index below n_tasks={self.n_tasks}, or -1, got {trained}.")

    def _tasks(self, task: int | Tensor, target: Tensor) -> Tensor:
        """Return the task of every example."""
        try:
            tasks = torch.as_tensor(task, device=target.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"task must be a task index, or one an example, got a {type(task).__name__}.") from error
        if tasks.is_floating_point() or tasks.is_complex():
            raise TypeError(f"task must be a task index, or one an example, in whole numbers, got {tasks.dtype}.")
        if tasks.shape not in (torch.Size(), target.shape):
            raise ValueError(
                f"task must be one index or one an example, {tuple(target.shape)}, got shape {tuple(tasks.shape)}."
            )
        tasks = tasks.long().expand(target.shape)
        if len(tasks) and not (int(tasks.min()) >= 0 and int(tasks.max()) < self.n_tasks):
            raise ValueError(
                f"task must lie in 0 ... {self.n_tasks - 1}, got {int(tasks.min())} ... {int(tasks.max())}."
            )
        return tasks


class _OfMatrix(ContinualAccuracy):
    """A number that the accuracy matrix of the tasks trained so far is summed up in; NaN where an entry that it needs was not measured."""

    plot_lower_bound: float | None = -1.0

    @override
    def compute(self) -> Tensor:
        """Return the number, in float64."""
        return torch.tensor(self._number(*self._seen()), dtype=torch.float64, device=self.total.device)

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value, or several after each other, as :meth:`torchmetrics.Metric._plot` does."""
        return self._plot(val, ax)

    def _number(self, matrix: Tensor, untrained: Tensor) -> float:
        raise NotImplementedError


class Forgetting(_OfMatrix):
    """:func:`~lit_rebasin.metrics.forgetting` from predictions; arguments and updates are those of :class:`ContinualAccuracy`."""

    higher_is_better = False

    def _number(self, matrix: Tensor, untrained: Tensor) -> float:
        return forgetting(matrix)


class BackwardTransfer(_OfMatrix):
    """:func:`~lit_rebasin.metrics.backward_transfer` from predictions; arguments and updates are those of :class:`ContinualAccuracy`."""

    def _number(self, matrix: Tensor, untrained: Tensor) -> float:
        return backward_transfer(matrix)


class ForwardTransfer(_OfMatrix):
    """:func:`~lit_rebasin.metrics.forward_transfer` from predictions; arguments and updates are those of :class:`ContinualAccuracy`.

    Needs predictions of the untrained network too, with ``trained=-1``.
    """

    def _number(self, matrix: Tensor, untrained: Tensor) -> float:
        return forward_transfer(matrix, untrained)


class LearningAccuracy(_OfMatrix):
    """:func:`~lit_rebasin.metrics.learning_accuracy` from predictions; arguments and updates are those of :class:`ContinualAccuracy`."""

    plot_lower_bound = 0.0

    def _number(self, matrix: Tensor, untrained: Tensor) -> float:
        return learning_accuracy(matrix)
