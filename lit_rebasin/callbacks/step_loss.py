"""The loss of a LightningModule's training step as a function of its weights."""

import contextlib
import copy
import inspect
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from lit_rebasin.callbacks.unwritten import unwritten
from lit_rebasin.merging.path import weights_of
from lit_rebasin.symmetry import attributes_kept, contents_kept


class NoLossError(ValueError):
    """``training_step`` skipped a batch."""


class StepLoss(nn.Module):
    """Run ``training_step`` on any weights, without a trace in the module's weights, its metrics or its logs.

    Use inside :meth:`quiet`. BatchNorm uses the statistics of the batch, as it will after its re-estimation on the merged weights; everything
    else, dropout among it, is in evaluation mode.

    Args:
        module: The user's LightningModule, or what has its ``training_step``.
        precision: Of the Trainer that trains it.

    Attributes:
        logged: The numbers that the last call of ``training_step`` logged, by name.
    """

    def __init__(self, module: "pl.LightningModule", precision: Precision) -> None:
        super().__init__()
        self.module = module
        self.precision = precision
        self.takes_index = len(inspect.signature(module.training_step).parameters) > 1
        self.logged: dict[str, float | Metric] = {}

    def forward(self, batch: Any) -> Tensor:
        """Return the loss of the module's present weights on a batch.

        Raises:
            NoLossError: If ``training_step`` returns None, by which Lightning skips a batch.
            ValueError: If it returns something that holds no loss.
        """
        try:
            with self.precision.train_step_context():
                output = self.module.training_step(batch, 0) if self.takes_index else self.module.training_step(batch)
        except StopIteration as error:  # by which Lightning would end the epoch without a word
            raise RuntimeError(
                f"{type(self.module).__name__}.training_step has come to the end of an iterator of its own, as merges and monitors run it "
                "some more times: let it begin anew there, as itertools.cycle does."
            ) from error
        loss = output.get("loss", output) if isinstance(output, Mapping) else output
        if loss is None:
            raise NoLossError(f"{type(self.module).__name__}.training_step returned None.")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"{type(self.module).__name__}.training_step returned {got}, but the merge needs its loss: "
                "return a tensor with one number, or a dict with the key 'loss'."
            )
        return loss

    def with_loss(self, batches: list[Any]) -> list[Any]:
        """Return the batches that ``training_step`` does not skip.

        Raises:
            ValueError: If it skips all of them.
        """
        kept = []
        for batch in batches:
            with torch.no_grad(), contextlib.suppress(NoLossError):
                self.loss(batch)
                kept.append(batch)
        if not kept:
            raise ValueError(
                f"{type(self.module).__name__}.training_step returned None for all {len(batches)} batches drawn for the merge, which needs "
                "its loss: return a tensor for some of them, or raise RebasinMerge(batches=...)."
            )
        return kept

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of the module's present weights on a batch, and leave its buffers as they are."""
        return self.at(weights_of(self.module), batch)

    def at(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss of the given weights on a batch, differentiable in the weights."""
        with self._attributes_kept():
            return self._at(weights, batch)

    def _at(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        # BatchNorm writes to its buffers, and takes none that carry a gradient; a step may write to frozen parameters, such as those of a
        # teacher that follows the network: both must get copies.
        copied = {name for name, _ in self.module.named_buffers()}
        copied |= {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        chosen = {f"module.{n}": tensor.detach().clone() if n in copied else tensor for n, tensor in weights.items()}
        found: Tensor = functional_call(self, chosen, (batch,))
        return found

    def mean(self, weights: Mapping[str, Tensor], batches: list[Any]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss over some batches without gradients, and the means of what ``training_step`` logs."""
        losses, logs = [], []
        metrics = {id(m): m for m in self.module.modules() if isinstance(m, Metric)}
        for metric in metrics.values():
            metric.reset()
        with torch.no_grad(), self._attributes_kept():
            for batch in batches:
                self.logged = {}
                losses.append(self._at(weights, batch))
                logs.append(self.logged)
        means: dict[str, float] = {}
        for name, last in logs[-1].items():
            if isinstance(last, Metric):  # it has seen all batches
                means |= _number(name, last.compute())
            elif all(name in entry for entry in logs):
                means[name] = statistics.fmean(float(entry[name]) for entry in logs)  # type: ignore[arg-type]
        return torch.stack(losses).mean(), means

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Set logging, metrics, training modes, the module's own notes and the global random state aside, and put them back."""
        modes = {module: module.training for module in self.module.modules()}
        with (
            contents_kept(self._noting()),
            self._attributes_kept(),
            self._replaced(_copied),
            _random_state_kept(),
            _alone(self.module),
            unwritten(self.module),
        ):
            object.__setattr__(self.module, "log", self._keep)  # log_dict calls it, too
            self.module.eval()
            for module, training in modes.items():
                if isinstance(module, _BatchNorm):
                    module.train(training)  # one that the user holds in evaluation mode stays there
            yield

    def _attributes_kept(self) -> AbstractContextManager[None]:
        """Put back what a step notes on the module or caches of its weights; a metric has to see several batches."""
        return attributes_kept(self._noting())

    def _noting(self) -> list[nn.Module]:
        return [part for part in self.module.modules() if not isinstance(part, Metric)]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within `quiet`, keep logs and metrics out of the step altogether: a trace has no values for them."""
        object.__setattr__(self.module, "log", lambda *args, **kwargs: None)
        object.__setattr__(self.module, "log_dict", lambda *args, **kwargs: None)
        try:
            with self._replaced(lambda metric: _NoMetric()):
                yield
        finally:
            object.__setattr__(self.module, "log", self._keep)
            self.module.__dict__.pop("log_dict", None)

    @contextmanager
    def _replaced(self, stand_in: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
        """Put something in the place of every metric for a while."""
        places = [(parent, name, child) for parent in self.module.modules() for name, child in parent.named_children()]
        metrics = [place for place in places if isinstance(place[2], (Metric, MetricCollection))]
        try:
            for parent, name, metric in metrics:
                parent._modules[name] = stand_in(metric)
            yield
        finally:
            for parent, name, metric in metrics:
                parent._modules[name] = metric

    def _keep(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged |= {name: value} if isinstance(value, Metric) else _number(name, value)


class _LocalBatchNorm(_BatchNorm):
    """A SyncBatchNorm that does not wait for other processes."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Take what SyncBatchNorm takes."""


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Let SyncBatchNorm look at the batch of this process alone, for the others may not be at this place."""
    synced = [part for part in module.modules() if type(part) is nn.SyncBatchNorm]
    for part in synced:
        part.__class__ = _LocalBatchNorm  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in synced:
            part.__class__ = nn.SyncBatchNorm


def _number(name: str, value: Any) -> dict[str, float]:
    """Return a logged value by its name, if it is a single number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return {name: float(value.detach())}
    return {name: float(value)} if isinstance(value, (int, float)) else {}


def _copied(metric: nn.Module) -> nn.Module:
    """Return a deep copy of a metric, which may keep tensors of the training's graph."""
    held = pytree.tree_leaves([vars(part) for part in metric.modules()])
    return copy.deepcopy(metric, {id(leaf): leaf.detach().clone() for leaf in held if isinstance(leaf, Tensor)})


class _NoMetric(nn.Module):
    """Takes the place of a metric and measures nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())

    def __getattr__(self, name: str) -> Any:
        if name in ("update", "compute", "reset"):
            return self.forward
        return super().__getattr__(name)


def as_trained(trainer: "pl.Trainer", batch: Any) -> Any:
    """Return a batch as the training gets it: in its precision, through the module's hooks, on its device."""
    module = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, module.device, dataloader_idx=0)


def draw_batches(trainer: "pl.Trainer") -> Generator[Any, None, None]:
    """Yield the batches of a fresh pass over the training data as the training gets them."""
    loader: Any = trainer.train_dataloader
    with _generators_kept(loader):
        nested = isinstance(loader, (Mapping, list, tuple))
        source = (item[0] for item in CombinedLoader(loader, "max_size_cycle")) if nested else iter(loader)
        for batch in source:
            yield as_trained(trainer, batch)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put the global random states back, also after an exception, which Lightning's isolate_rng does not."""
    states = _collect_rng_states()
    try:
        yield
    finally:
        _set_rng_states(states)


@contextmanager
def _generators_kept(loaders: Any) -> Iterator[None]:
    """Put the loaders' own random generators back to where they are."""
    found: dict[int, torch.Generator] = {}
    for loader in pytree.tree_leaves(loaders):
        samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
        for owner in (loader, *samplers):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    states = {key: generator.get_state() for key, generator in found.items()}
    try:
        yield
    finally:
        for key, generator in found.items():
            generator.set_state(states[key])
