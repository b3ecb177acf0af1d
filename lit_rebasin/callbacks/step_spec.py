"""The permutation symmetries of whatever a training step calls."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.symmetry import Group, PermutationSpec, Trial, permutation_spec, spec_of_calls

# A loss is compared in the precision of the training.
_TOLERANCE = 1e-3


def step_spec(step: StepLoss, batch: Any) -> PermutationSpec:
    """Find which axes of a LightningModule's weights may be permuted together, from its training step on one batch.

    The whole step is traced, so that it may call its networks in any way: several times, one head a task, or weights by themselves. Where the
    step as a whole cannot be exported, the networks that it calls are traced one by one. The result is checked: the loss stays the same.

    Args:
        step: The loss of the module.
        batch: A training batch, on the module's device.

    Returns:
        The spec, by the module's own names; groups that move a frozen parameter are held.

    Raises:
        NoLossError: If the step gives no loss on this batch.
    """
    if isinstance(step.precision, MixedPrecision):
        step = StepLoss(step.module, Precision())  # autocast would round away what the check compares
    with step.quiet(), torch.no_grad():
        step.loss(batch)
        with step.silent():
            try:
                spec, traced = _unprefixed(permutation_spec(_Whole(step, batch), check=False)), True
            except ValueError:
                spec, traced = spec_of_calls(step.module, lambda: step.loss(batch)), False
        spec = _that_holds(step, batch, spec, traced=traced)
    spec = _by_first_names(step.module, spec)
    frozen = {name for name, parameter in step.module.named_parameters() if not parameter.requires_grad}
    held = {name for name, group in spec.groups.items() if any(axis.tensor in frozen for axis in group.axes)}
    return _without(spec, held, "it would move a frozen parameter")


def _by_first_names(module: nn.Module, spec: PermutationSpec) -> PermutationSpec:
    """Return the spec with tied weights under their first names only, by which a merge holds them."""
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    groups = {
        name: replace(group, axes=tuple(axis for axis in group.axes if axis.tensor in names))
        for name, group in spec.groups.items()
    }
    fixed = {axis: reason for axis, reason in spec.fixed.items() if axis.rpartition("[")[0] in names}
    return PermutationSpec(groups, fixed)


def _that_holds(step: StepLoss, batch: Any, spec: PermutationSpec, *, traced: bool) -> PermutationSpec:
    """Return the spec without the groups that change the loss; a training must not end for one that a trace has got wrong."""
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in step.module.parameters())
    batch = pytree.tree_map_only(Tensor, _single, batch) if half else batch  # as the trial's weights are
    while spec.groups:
        trial = Trial(step.module, spec, lambda weights: _seeded(step, weights, batch), seed=0)
        try:
            expected = trial.outputs()
        except RuntimeError:
            if traced and half:  # the step insists on its own precision, in which nothing can be compared
                return spec
            raise
        if traced and not all(loss.isfinite() for loss in expected):
            return spec  # the trial's weights need not give a loss that can be compared
        try:
            trial.check(expected, _TOLERANCE)
            return spec
        except RuntimeError as error:
            if traced:
                rank_zero_warn(f"{error} The groups are held in place.")
        wrong = set(trial.culprits(expected, _TOLERANCE)) or set(spec.groups)
        spec = _without(spec, wrong, "what training_step does tells the neurons apart")
    return spec


class _Whole(nn.Module):
    """A training step on one batch, as a module without inputs: batches of any type can be traced."""

    def __init__(self, step: StepLoss, batch: Any) -> None:
        super().__init__()
        self.step = step
        self.batch = batch

    def forward(self) -> Tensor:
        found: Tensor = self.step(self.batch)
        return found


def _seeded(step: StepLoss, weights: dict[str, Tensor], batch: Any) -> Tensor:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - a step may draw from NumPy's global state
    return step.at(weights, batch)


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _unprefixed(spec: PermutationSpec) -> PermutationSpec:
    prefix = "step.module."
    groups = {}
    for group in spec.groups.values():
        name = group.name.removeprefix(prefix)
        axes = tuple(replace(axis, tensor=axis.tensor.removeprefix(prefix)) for axis in group.axes)
        groups[name] = Group(name, group.size, axes)
    return PermutationSpec(groups, {axis.removeprefix(prefix): reason for axis, reason in spec.fixed.items()})


def _without(spec: PermutationSpec, held: set[str], reason: str) -> PermutationSpec:
    """Return the spec with some groups held in place."""
    groups = {name: group for name, group in spec.groups.items() if name not in held}
    moved = {str(axis) for group in groups.values() for axis in group.axes}
    axes = [str(axis) for name in held for axis in spec.groups[name].axes]
    return PermutationSpec(groups, {**spec.fixed, **{axis: reason for axis in axes if axis not in moved}})
