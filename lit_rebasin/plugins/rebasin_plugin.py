"""The merge of `RebasinMerge` for an Avalanche strategy."""

from collections.abc import Generator
from typing import Any, Literal

import lightning.pytorch as pl
from avalanche.core import SupervisedPlugin
from avalanche.models import avalanche_forward
from avalanche.training.templates import SupervisedTemplate
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lit_rebasin.callbacks.settings import MergeSettings, Method
from lit_rebasin.callbacks.start import Start
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.callbacks.task_merger import TaskMerger
from lit_rebasin.merging.path import weights_of


class RebasinPlugin(TaskMerger, SupervisedPlugin):  # type: ignore[misc]
    r"""Align and merge a strategy's network with its previous self at the end of every experience.

    The first experience is only remembered. After every later one the trained weights are permuted into the basin of the previous ones and
    merged, ``theta_t = alpha * theta_{t-1} + (1 - alpha) * pi(theta_new) + delta`` (after Pena et al., CVPR 2023, eq. 12, whose
    theta_new is theta_{t-1} itself), in place and before any evaluation that follows.

    Works beside other plugins and in any supervised strategy whose loss is ``criterion(model(x), y)`` or holds that: the merge sees this
    loss, on batches of the strategy's loader, which has whatever replay its plugins mix in, and none of the terms that others add. Plugins
    run in their order: name this one first, so that what they measure after an experience, such as the importances of EWC, is of the merged
    network. A strategy's own memory is filled before any plugin runs, so the logits that DER keeps are of the network as it was trained.

    Parameters that no experience before has trained, such as a new head, are taken from the new network as they are.

    Args:
        alpha: As for :class:`~lit_rebasin.RebasinMerge`, and so are all other arguments.
        method: How to align.
        cost: What ``"sinkhorn"`` and ``"straight-through"`` minimise.
        init: The method that finds the start.
        options: Further arguments of the method.
        statistics: What the merged weights are given.
        batches: Training batches that each merge uses.
        start: Where each experience but the first begins.
        margin: How much worse than both networks a merge may be.
        seed: Seed of everything drawn in a merge; the global random states are not touched.

    Attributes:
        history: One entry a merge: its task and numbers, or why it was refused.

    Raises:
        ValueError: If an argument is out of range; in training, if a tensor has another shape than in the experience before, if there is
            nothing to align, or if the strategy has two of these plugins.

    Example::

        strategy = Naive(model=model, optimizer=optimizer, criterion=criterion, plugins=[RebasinPlugin(), ReplayPlugin(1000)])
    """

    def __init__(
        self,
        alpha: float | Literal["line-search", "fisher", "layer-fisher"] = 0.8,
        method: Method = "weights",
        cost: Literal["incremental", "midpoint", "random-point", "l2", "l1", "cosine"] | None = None,
        init: Method | None = None,
        options: dict[str, Any] | None = None,
        statistics: Literal["reestimate", "repair", "rescale", "data-free", "none"] = "reestimate",
        batches: int = 10,
        start: Start = "previous",
        combine: Literal["average", "regmean"] = "average",
        margin: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            MergeSettings(alpha, method, cost, init, options or {}, statistics, batches, seed, start, combine, margin)
        )

    def before_training_exp(self, strategy: SupervisedTemplate, *args: Any, **kwargs: Any) -> None:
        """Compare the network with the one that is remembered, and note what is not trained yet."""
        if sum(isinstance(plugin, RebasinPlugin) for plugin in strategy.plugins) > 1:
            raise ValueError("a strategy takes one RebasinPlugin: a second one would merge what the first has merged.")
        module = _module(strategy)
        if self.previous is not None:
            new = {name: tensor for name, tensor in weights_of(module).items() if name not in self.previous}
            self.previous |= {name: tensor.cpu().clone() for name, tensor in new.items()}
        self._check(module)
        self._begin_task(module)

    def before_training_iteration(self, strategy: SupervisedTemplate, *args: Any, **kwargs: Any) -> None:
        """Find the permutation groups on the first batch, so that a network without any fails at once."""
        batch = list(strategy.mbatch)
        if hasattr(strategy.experience, "task_labels"):
            # Of one task, named by a number: what a network makes of several is no graph that can be traced.
            task = int(batch[-1][0])
            batch = [*(part[batch[-1] == task] for part in batch[:-1]), task]
        self._look_at(_step(strategy), batch)

    def after_training_exp(self, strategy: SupervisedTemplate, *args: Any, **kwargs: Any) -> None:
        """Merge."""

        def draw() -> Generator[Any, None, None]:
            return ([part.to(strategy.device) for part in batch] for batch in strategy.dataloader)

        self._finish_task(_step(strategy), draw)


class _Step(pl.LightningModule):
    """What a strategy trains, as a module with a training step."""

    def __init__(self, strategy: SupervisedTemplate) -> None:
        super().__init__()
        self.model: nn.Module = strategy.model
        self.criterion = strategy._criterion
        self.knows_tasks = hasattr(strategy.experience, "task_labels")

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch[:2]
        output = avalanche_forward(self.model, x, batch[-1]) if self.knows_tasks else self.model(x)
        found: Tensor = self.criterion(output, y)
        return found


def _module(strategy: SupervisedTemplate) -> _Step:
    """Return what is trained, under the name of its network, by which errors call it."""
    named: type[_Step] = type(type(strategy.model).__name__, (_Step,), {})
    return named(strategy)


def _step(strategy: SupervisedTemplate) -> StepLoss:
    return StepLoss(_module(strategy), Precision())
