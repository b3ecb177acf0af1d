"""Avalanche's own strategies on the stream, the splits, the network and the evaluation of ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.data_attribute import TaskLabels
from avalanche.core import SupervisedPlugin
from avalanche.models.dynamic_modules import MultiTaskModule
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import BalancedExemplarsBuffer, ClassBalancedBuffer
from avalanche.training.supervised import AGEM, DER, ER_ACE, EWC, Cumulative, JointTraining, LwF, Naive
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lit_rebasin.continual.classifier import ContinualClassifier
from lit_rebasin.continual.datamodule import ContinualDataModule
from lit_rebasin.continual.evaluate import evaluate
from lit_rebasin.metrics import ContinualAccuracy


@dataclass(frozen=True)
class _Memory:
    """The examples that a strategy may keep: as many as ours keeps, in all and of a task."""

    total: int
    of_task: int
    per_class: int
    n_tasks: int
    batch_size: int


def _without_memory(kind: type[SupervisedTemplate], **defaults: Any) -> Callable[..., SupervisedTemplate]:
    return lambda memory, **arguments: kind(**{**defaults, **arguments})


def _agem(memory: _Memory, **arguments: Any) -> SupervisedTemplate:
    # Avalanche draws sample_size // tasks of each task, which must not come to none.
    return AGEM(patterns_per_exp=memory.of_task, **{"sample_size": max(64, memory.batch_size), **arguments})


def _replay(memory: _Memory, plugins: list[SupervisedPlugin], **arguments: Any) -> SupervisedTemplate:
    return Naive(plugins=[*plugins, ReplayPlugin(memory.total, storage_policy=_Kept(memory))], **arguments)


def _der(memory: _Memory, **arguments: Any) -> SupervisedTemplate:
    return DER(mem_size=memory.total, **{"batch_size_mem": min(memory.batch_size, memory.total), **arguments})


def _er_ace(memory: _Memory, **arguments: Any) -> SupervisedTemplate:
    strategy = ER_ACE(mem_size=memory.total, **{"batch_size_mem": min(memory.batch_size, memory.total), **arguments})
    strategy.storage_policy.update = partial(_update_quietly, strategy.storage_policy)
    return strategy


def _update_quietly(buffer: Any, strategy: Any, **kwargs: Any) -> None:
    """Do what Avalanche's own update of a buffer does, which its plugins call, without the warning that nobody can turn off."""
    buffer.post_adapt(strategy, strategy.experience)


class _Kept(BalancedExemplarsBuffer):  # type: ignore[misc]
    """As many examples of each class of each task, drawn by Avalanche's buffer of each class, as our replay keeps."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__(memory.total, adaptive_size=False, total_num_groups=memory.n_tasks)
        self.per_class = memory.per_class

    update = _update_quietly

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Keep examples of an experience."""
        n_classes = len(exp.dataset.targets.uniques)
        buffer = ClassBalancedBuffer(self.per_class * n_classes, adaptive_size=False, total_num_classes=n_classes)
        buffer.update_from_dataset(exp.dataset)
        self.buffer_groups[len(self.buffer_groups)] = buffer


# Name -> what makes the strategy.
BASELINES: dict[str, Callable[..., SupervisedTemplate]] = {
    "finetune": _without_memory(Naive),
    "ewc": _without_memory(EWC, ewc_lambda=1.0),
    "lwf": _without_memory(LwF, alpha=1.0, temperature=2.0),
    "agem": _agem,
    "replay": _replay,
    "der": _der,
    "er-ace": _er_ace,
    "joint": _without_memory(JointTraining),
    "cumulative": _without_memory(Cumulative),
}

ONE_HEAD = ("der",)
REPLAYING = ("agem", "replay", "der", "er-ace")
TASK_BALANCED = ("joint", "cumulative")


def run_baseline(
    name: str,
    model: ContinualClassifier,
    data: ContinualDataModule,
    *,
    options: Mapping[str, Any] | None = None,
    n_tasks: int | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int], None] | None = None,
    on_task: Callable[[Tensor, int], None] | None = None,
) -> Tensor:
    """Train a network on a stream with one of Avalanche's strategies.

    The strategy gets the training examples that a fit of ours gets, in batches of as many new ones, as many epochs a task, with the optimizer
    of ``model``, fresh for each task, and may keep as many examples. Batches and what is kept are drawn by Avalanche from the global random
    states, of Python among them; its replay shows a kept example no more than once a batch, while half of each of our batches is replayed.

    Args:
        name: A key of `BASELINES`.
        model: Trained in place.
        data: The stream.
        options: Further arguments of Avalanche's strategy, such as ``ewc_lambda``.
        n_tasks: How many of the first tasks are trained. Default: all.
        device: Where to train.
        on_epoch: Called after every epoch with the index of its task.
        on_task: Called after every task with the accuracy matrix so far, and with the index of the task.

    Returns:
        The accuracy matrix ``(T, T)`` on the data of ``data.val_dataloader()``. Of ``joint`` only the last row is measured, the others are NaN.

    Raises:
        ValueError: If there is no such strategy, the strategy has no such option, knows no heads, replays what is not kept or needs larger
            batches, or the stream has fewer tasks.
    """
    if name in ONE_HEAD and data.n_heads > 1:
        raise ValueError(f"Avalanche's strategy for {name!r} knows no network with a head a task.")
    if name in REPLAYING and data.replay_per_class == 0:
        raise ValueError(f"{name!r} replays examples, but the stream keeps none: pass replay_per_class=1 or more.")
    n_tasks = n_tasks or data.n_tasks
    if name in TASK_BALANCED and data.n_heads > 1 and data.batch_size < n_tasks:
        raise ValueError(
            f"batch_size={data.batch_size} is too small for {name!r}, whose batches hold examples of all {n_tasks} tasks where each has "
            f"a head: pass {n_tasks} or more."
        )
    if n_tasks > data.n_tasks:
        raise ValueError(f"n_tasks={n_tasks}, but the stream has {data.n_tasks}: pass that many or fewer.")
    datasets = [_dataset(data, task) for task in range(n_tasks)]
    of_tasks = [data.replay_per_class * len(dataset.targets.uniques) for dataset in datasets]
    memory = _Memory(sum(of_tasks), max(of_tasks), data.replay_per_class, n_tasks, data.batch_size)
    network = model if data.n_heads == 1 else _PerTask(model)
    strategy = _strategy(
        name,
        memory,
        options or {},
        model=network.to(device),
        optimizer=model.optimizer(model.parameters()),
        train_mb_size=data.batch_size,
        train_epochs=data.epochs_per_task,
        device=device,
        plugins=[_Report(on_epoch)],
    )
    metric = ContinualAccuracy(n_tasks).to(device)
    loaders = data.val_dataloader()[:n_tasks]
    experiences = list(with_task_labels(benchmark_from_datasets(train=datasets)).train_stream)
    groups: list[Any] = [experiences] if name == "joint" else experiences
    for trained, group in enumerate(groups, start=n_tasks - len(groups)):
        strategy.train(group, eval_streams=[], reset_optimizer_state=True)
        evaluate(metric, model, loaders, trained, device)
        if on_task is not None:
            on_task(metric.compute().cpu().reshape(n_tasks, n_tasks), trained)
    return metric.compute().cpu().reshape(n_tasks, n_tasks)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise a ValueError if a strategy does not take some options, before anything is trained."""
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    sizes = {"train_mb_size": 1, "train_epochs": 1, "device": "cpu"}
    _strategy(name, _Memory(1, 1, 1, 1, 1), options, model=network, optimizer=optimizer, plugins=[], **sizes)


def _strategy(name: str, memory: _Memory, options: Mapping[str, Any], **arguments: Any) -> SupervisedTemplate:
    if name not in BASELINES:
        raise ValueError(f"There is no baseline {name!r}; choose from {', '.join(BASELINES)}.")
    taken = sorted(options.keys() & {*arguments, "criterion", "evaluator"})
    if taken:
        raise ValueError(f"Option {taken[0]!r} of {name!r} is set by the stream; leave it out.")
    try:
        return BASELINES[name](memory, criterion=nn.CrossEntropyLoss(), evaluator=None, **arguments, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"Avalanche's strategy for {name!r} does not take these options: {error}.") from error


def _dataset(data: ContinualDataModule, task: int) -> TaskAwareSupervisedClassificationDataset:
    x, y, tasks = data.new_examples(task)
    labels = TaskLabels((tasks if data.n_heads > 1 else torch.zeros_like(tasks)).tolist())
    targets = DataAttribute(y.tolist(), "targets")
    return TaskAwareSupervisedClassificationDataset([TensorDataset(x, y)], data_attributes=[targets, labels])


class _PerTask(MultiTaskModule):  # type: ignore[misc]
    """A classifier with a head a task, as Avalanche asks for one."""

    def __init__(self, classifier: ContinualClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def adaptation(self, experience: Any) -> None:
        """Note a task; all heads are there from the start."""
        if self.training:
            self.known_train_tasks_labels |= set(experience.task_labels)

    def forward(self, x: Tensor, task_labels: Tensor | None) -> Any:
        """Return the logits, of all known tasks by index where no task is named."""
        if task_labels is not None:
            return self.classifier(x, task_labels)
        return {t: self.classifier(x, torch.full((len(x),), t)) for t in self.known_train_tasks_labels}


class _Report(SupervisedPlugin):  # type: ignore[misc]
    """Says how far the training is."""

    def __init__(self, on_epoch: Callable[[int], None] | None) -> None:
        super().__init__()
        self.on_epoch = on_epoch

    def after_training_epoch(self, strategy: SupervisedTemplate, *args: Any, **kwargs: Any) -> None:
        if self.on_epoch is not None:
            self.on_epoch(strategy.clock.train_exp_counter)
