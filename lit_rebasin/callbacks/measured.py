"""What is kept of every task besides the weights: how much they matter, or what they were given."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lit_rebasin.alignment import Alignment
from lit_rebasin.callbacks.refusal import is_of_numbers, reason_of
from lit_rebasin.callbacks.settings import Measured, MergeSettings
from lit_rebasin.callbacks.step_fisher import check_fisher, step_fisher
from lit_rebasin.callbacks.step_loss import NoLossError, StepLoss
from lit_rebasin.merging import input_moments
from lit_rebasin.merging.path import weights_of
from lit_rebasin.symmetry import PermutationSpec, permute

Weights = dict[str, Tensor]
Draw = Callable[[], Generator[Any, None, None]]
# Rows that the moments of a layer are of, for each of its inputs.
_ROWS = 8


@dataclass
class Known:
    """What was measured of the tasks so far.

    Attributes:
        means: Over the tasks, by tensor name, on the CPU.
        tasks: How many tasks they are of.
    """

    means: Weights = field(default_factory=dict)
    tasks: int = 0

    def add(self, measured: Mapping[str, Tensor], share: float | None = None) -> None:
        """Take in what was measured of a task, which is ``share`` of the new mean; by default as much as every other task."""
        self.tasks += bool(measured)
        for name, new in measured.items():
            mean = self.means.get(name, new.cpu())
            self.means[name] = mean + (new.cpu() - mean) * (1 / self.tasks if share is None else share)

    def begin(self, settings: MergeSettings, step: StepLoss, draw: Draw) -> None:
        """Take in what is measured of the first task.

        Raises:
            RuntimeError: If that runs out of memory.
            ValueError: If it is NaN or infinite.
        """
        try:
            measured = _measured_now(settings, step, draw, settings.seed)
        except Exception as error:
            if (reason := reason_of(error)) is None or is_of_numbers(error):
                raise
            raise RuntimeError(
                f"The {settings.measured} after the first task, which every merge needs, cannot be measured: {reason}. Make the batches "
                "smaller, or choose another alpha or combine."
            ) from error
        broken = next((name for name, value in measured.items() if not value.isfinite().all()), None)
        if broken is not None:
            raise ValueError(
                f"The {settings.measured} of {broken!r} after the first task is NaN or infinite, and there is no previous model to go back "
                "to: lower the learning rate."
            )
        self.add(measured)

    def begin_anew(self, settings: MergeSettings, step: StepLoss, draw: Draw, task: int) -> None:
        """Measure a network that is kept without a merge: what is known is of another, whose neurons may stand in another order."""
        try:
            measured = _measured_now(settings, step, draw, settings.seed + task)
        except Exception as error:
            if reason_of(error) is None:
                raise
            return  # what is short now may not be later: the old is better than nothing
        self.add(measured, 1.0)


def copied(module: nn.Module) -> Weights:
    """Return a copy of a module's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in weights_of(module).items()}


def _measured_now(settings: MergeSettings, step: StepLoss, draw: Draw, seed: int) -> Weights:
    """Return what is to be kept of the network as it is."""
    if settings.measured is None:
        return {}
    with step.quiet():
        torch.manual_seed(seed)
        return measure(settings, step, copied(step.module), draw)


def first_batches(step: StepLoss, draw: Draw, count: int) -> list[Any]:
    """Return the first batches of a pass, but for those that the training skips."""
    with closing(draw()) as drawn:
        return step.with_loss(list(islice(drawn, count)))


def measure(settings: MergeSettings, step: StepLoss, weights: Mapping[str, Tensor], draw: Draw) -> Weights:
    """Return what is kept of a task, by the name of a tensor, if anything. Use inside :meth:`StepLoss.quiet`."""
    if settings.measured is None:
        return {}
    if settings.measured == "Fisher information":
        return step_fisher(step, weights, first_batches(step, draw, settings.batches))
    with step.silent(), closing(draw()) as drawn:
        return _moments(step, weights, drawn)


def _moments(step: StepLoss, weights: Mapping[str, Tensor], batches: Iterable[Any]) -> Weights:
    def forward(batch: Any) -> None:
        with suppress(NoLossError):  # the training skips this batch too
            step.at(weights, batch)

    return input_moments(step.module, forward, batches, rows=_ROWS)


def permuted(measured: Weights, weights: Mapping[str, Tensor], spec: PermutationSpec, alignment: Alignment) -> Weights:
    """Return what was measured of a model in the frame of the one that it is aligned to."""
    diagonal = {name for name, value in measured.items() if value.shape == weights[name].shape}
    moved = permute({**weights, **{name: measured[name] for name in diagonal}}, spec, alignment.permutations)
    inputs = {name: _input_numbers(weights[name]) for name in measured.keys() - diagonal}
    order = permute({**weights, **inputs}, spec, alignment.permutations)
    found = {name: moved[name] for name in diagonal}
    for name in inputs:
        bias = inputs[name][0].numel()  # which comes last and stays there
        index = torch.cat([order[name][0].flatten(), torch.tensor([bias], device=order[name].device)])
        found[name] = measured[name][index][:, index]
    return found


def check_measurable(kind: Measured | None, step: StepLoss, batch: Any) -> None:
    """Raise a MisconfigurationException if nothing can be measured on a batch, before a task is spent."""
    if kind == "Fisher information":
        check_fisher(step, batch)
    elif kind == "input moments":
        with step.quiet():
            try:
                step.loss(batch)
            except NoLossError:
                return
            found = _moments(step, weights_of(step.module), [batch])
        if not found:
            raise MisconfigurationException(
                f"{type(step.module).__name__}.training_step calls no nn.Linear or nn.Conv2d with weights of its own, so there is nothing that "
                "RegMean could solve: leave combine at 'average'."
            )


def _input_numbers(weight: Tensor) -> Tensor:
    """Return a tensor like a weight that holds the number of the input that each entry is multiplied with."""
    count = weight[0].numel()
    return torch.arange(count, device=weight.device).expand(len(weight), count).reshape(weight.shape)
