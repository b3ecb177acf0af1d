"""The loss of a LightningModule's training step as a function of its weights."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric, MetricCollection


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name, detached but not copied; tied weights appear under their first name."""
    both = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in both}


class StepLoss(nn.Module):
    """Run ``training_step`` on any weights, without a trace in the module, its metrics or its logs.

    Use inside :meth:`quiet`. BatchNorm uses the statistics of the batch, as it will after its re-estimation on the merged weights; everything
    else, dropout among it, is in evaluation mode.

    Args:
        trainer: The trainer that the module is attached to.
        module: The user's LightningModule.

    Attributes:
        logged: The numbers that the last call of ``training_step`` logged, by name.
    """

    def __init__(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        super().__init__()
        self.module = module
        self.precision = trainer.precision_plugin
        self.takes_index = len(inspect.signature(module.training_step).parameters) > 1
        self.logged: dict[str, float] = {}

    def forward(self, batch: Any) -> Tensor:
        """Return the loss of the module's present weights on a batch."""
        with self.precision.train_step_context():
            output = self.module.training_step(batch, 0) if self.takes_index else self.module.training_step(batch)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{type(self.module).__name__}.training_step returned {type(loss).__name__}, but the merge needs its loss: "
                "return a tensor, or a dict with the key 'loss'."
            )
        return loss

    def at(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss of the given weights on a batch, differentiable in the weights."""
        buffers = {name for name, _ in self.module.named_buffers()}
        # BatchNorm writes to its buffers, and takes none that carry a gradient: it must get copies.
        chosen = {f"module.{n}": tensor.detach().clone() if n in buffers else tensor for n, tensor in weights.items()}
        return functional_call(self, chosen, (batch,))

    def mean(self, weights: Mapping[str, Tensor], batches: list[Any]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss over some batches without gradients, and the means of what ``training_step`` logs."""
        losses, logs = [], []
        with torch.no_grad():
            for batch in batches:
                self.logged = {}
                losses.append(self.at(weights, batch))
                logs.append(self.logged)
        means = {
            name: sum(entry[name] for entry in logs) / len(logs) for name in logs[0] if all(name in e for e in logs)
        }
        return torch.stack(losses).mean(), means

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Set logging, metrics, training modes and the global random state aside, and put them back."""
        modes = {module: module.training for module in self.module.modules()}
        metrics = [(parent, name, child) for parent in self.module.modules() for name, child in parent.named_children()]
        metrics = [entry for entry in metrics if isinstance(entry[2], (Metric, MetricCollection))]
        with torch.random.fork_rng():
            try:
                for parent, name, metric in metrics:
                    parent._modules[name] = copy.deepcopy(metric)
                object.__setattr__(self.module, "log", self._keep)
                object.__setattr__(self.module, "log_dict", self._keep_all)
                self.module.eval()
                for module in self.module.modules():
                    if isinstance(module, _BatchNorm):
                        module.train()
                yield
            finally:
                for name in ("log", "log_dict"):
                    self.module.__dict__.pop(name, None)
                for parent, name, metric in metrics:
                    parent._modules[name] = metric
                for module, training in modes.items():
                    module.training = training

    def _keep(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Metric):
            value = value.compute()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            self.logged[name] = float(value.detach() if isinstance(value, Tensor) else value)

    def _keep_all(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            self._keep(name, value)


def draw_batches(trainer: "pl.Trainer", count: int) -> list[Any]:
    """Return the first ``count`` batches of a fresh pass over the training data, on the module's device."""
    batches: list[Any] = []
    loader: Any = trainer.train_dataloader
    if isinstance(loader, (Mapping, list, tuple)):
        from lightning.pytorch.utilities import CombinedLoader

        combined = CombinedLoader(loader, "max_size_cycle")
        source: Any = (item[0] for item in combined)
    else:
        source = iter(loader)
    for batch in source:
        module = trainer.lightning_module
        batch = trainer.precision_plugin.convert_input(batch)
        batches.append(trainer.strategy.batch_to_device(batch, module.device))
        if len(batches) == count:
            break
    return batches
