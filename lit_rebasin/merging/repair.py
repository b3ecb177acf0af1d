"""REPAIR and RESCALE: give the channels of a merged network the spread that those of its endpoints have."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lit_rebasin.alignment import check_same_architecture
from lit_rebasin.merging.data import evaluating, hooks
from lit_rebasin.merging.moments import Moments, along_channels, channels_of, fuse, rows_of
from lit_rebasin.merging.path import LinearPath, alpha_of, weights_of, write_weights
from lit_rebasin.merging.statistics import reestimate_batch_norm

Forward = Callable[[Any], Any]


def repair(
    merged: nn.Module,
    path: LinearPath,
    alpha: float | Mapping[str, float],
    forward: Forward,
    batches: Iterable[Any],
    *,
    mean: bool = True,
) -> list[str]:
    r"""Correct what every layer of a merged network puts out, and fuse the correction into its weights.

    Averaged weights put out less variance than their endpoints, layer by layer, until nothing is left of the input. REPAIR (Jordan et al.,
    ICLR 2023) scales and shifts every channel so that

    ``E[X] = alpha E[X_previous] + (1 - alpha) E[X_new]`` and ``std X = alpha std X_previous + (1 - alpha) std X_new``,

    where ``X`` is the output of a linear or convolutional layer, before its nonlinearity. RESCALE (Qu & Horvath, arXiv 2402.05966)
    multiplies only, by ``goal / std X``, bias and all, and leaves the mean to follow. As published, the goals come from one pass of each
    endpoint; then the merged network runs once with every layer normalised to its goals by the moments of the batch, so that later layers
    see corrected earlier ones, and the moments that go into the weights are those over all batches. On one batch the goals are therefore met
    exactly; on several, up to the differences between batches, so take large ones.

    Left alone are layers that are the same as at both ends, so that nothing was averaged; layers that feed a BatchNorm directly, whose running
    statistics are re-estimated in the same pass (:func:`reestimate_batch_norm`); the layers whose outputs leave the network, and the one that
    runs last; and layers that run more than once a batch or share weights with others, which no single correction fits. A layer without a
    bias is scaled only, so that no tensor is added. A channel that is constant in the merge is shifted only.

    Args:
        merged: The merged network, changed in place; layers run in evaluation mode but for BatchNorm, and are then in their modes again.
        path: The endpoints, as weights or modules; neither is changed.
        alpha: Weight of the previous model in the merge, one number or one by tensor name; a layer's goals take that of its weight.
        forward: Runs ``merged`` on one batch; each endpoint runs in it as well, with its weights written to ``merged`` for the time.
        batches: Training data, read three times (an iterator is kept in a list).
        mean: Whether to correct means too (REPAIR); False is RESCALE, which Qu & Horvath find better on plain VGG.

    Returns:
        The names of the layers that were corrected.

    Raises:
        ValueError: If ``merged`` and the path differ in tensors or share memory, there are no batches, or an output is NaN or infinite.
        Exception: Whatever ``forward`` raises. The merged network is then what it was.
    """
    batches = list(batches) if isinstance(batches, Iterator) else batches
    own = {name: tensor.clone() for name, tensor in weights_of(merged).items()}
    check_endpoints(merged, path)
    finished = False
    try:
        with torch.no_grad(), evaluating(merged):
            write_weights(merged, path.previous)
            previous, fits = _observe(merged, forward, batches)
            write_weights(merged, path.new)
            new, _ = _observe(merged, forward, batches)
            write_weights(merged, own)
            correction = _Correction(mean)
            for name in (fits - _unchanged(merged, path)) & previous.keys() & new.keys():
                share = alpha_of(alpha, f"{name}.weight")
                correction.set_goal(name, previous[name], new[name], share)
            correction.run(merged, forward, batches)
            corrected = correction.fuse(merged)
        finished = True
        return corrected
    finally:
        if not finished:
            write_weights(merged, own)


def _unchanged(merged: nn.Module, path: LinearPath) -> set[str]:
    """Return the layers that a merge has as both of its ends have them, such as frozen ones."""
    return {
        name
        for name, layer in channels_of(merged).items()
        if all(
            torch.equal(end[f"{name}.{own}"].to(tensor.device), tensor)
            for own, tensor in layer.named_parameters(recurse=False)
            for end in (path.previous, path.new)
        )
    }


class _Correction:
    """Normalises layers to their goals, batch by batch, and then for good."""

    def __init__(self, mean: bool) -> None:
        self.mean = mean
        self.goals: dict[str, tuple[Tensor, Tensor]] = {}
        self.moments: dict[str, Moments] = {}

    def set_goal(self, name: str, previous: Moments, new: Moments, alpha: float) -> None:
        self.goals[name] = (
            alpha * previous.mean + (1 - alpha) * new.mean,
            alpha * previous.std + (1 - alpha) * new.std,
        )

    def run(self, merged: nn.Module, forward: Forward, batches: Iterable[Any]) -> None:
        """Run the merged network with corrected layers, and BatchNorm as it does in training."""
        for module in merged.modules():
            if isinstance(module, _BatchNorm):
                module.train(module.track_running_stats)
        layers = channels_of(merged)
        with hooks() as handles:
            for name in self.goals:
                handles.append(layers[name].register_forward_hook(self._corrected(name)))
            reestimate_batch_norm(merged, forward, batches)

    def fuse(self, merged: nn.Module) -> list[str]:
        """Write the corrections into the weights, all or none."""
        layers = channels_of(merged)
        affine = {name: self._affine(name, layers[name], moments) for name, moments in self.moments.items()}
        for name, values in affine.items():
            if not all(value.isfinite().all() for value in values):
                raise ValueError(
                    f"The outputs of layer {name!r} have a NaN or infinite mean or spread on these batches."
                )
        names = [name for name in layers if name in affine]
        for name in names:
            fuse(layers[name], *affine[name])
        return names

    def _corrected(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            rows, batch = rows_of(layer, output), Moments()
            batch.add(rows)
            self.moments.setdefault(name, Moments()).add(rows)
            scale, shift = self._affine(name, layer, batch)
            return output * along_channels(layer, scale, output) + along_channels(layer, shift, output)

        return hook

    def _affine(self, name: str, layer: nn.Module, moments: Moments) -> tuple[Tensor, Tensor]:
        """Return what to multiply by and then to add, a number a channel."""
        goal_mean, goal_std = self.goals[name]
        alive = moments.std > 0
        scale = torch.where(alive, goal_std / torch.where(alive, moments.std, 1.0), 1.0)
        if self.mean and layer.bias is not None:
            return scale, goal_mean - scale * moments.mean
        return scale, torch.zeros_like(scale)


def _observe(model: nn.Module, forward: Forward, batches: Iterable[Any]) -> tuple[dict[str, Moments], set[str]]:
    """Run a network; return the moments of its layers, and which of them one correction fits."""
    moments: dict[str, Moments] = {}
    unfit: set[str] = set()
    run: list[str] = []  # names in the order of their calls in this batch
    outputs: dict[str, weakref.ref[Tensor]] = {}

    def observe(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            moments.setdefault(name, Moments()).add(rows_of(layer, output))
            run.append(name)
            outputs[name] = weakref.ref(output)

        return hook

    def leave(values: Any) -> None:
        """Rule out the layers whose very outputs these are."""
        unfit.update(name for value in tree_leaves(values) for name, output in outputs.items() if output() is value)

    empty = True
    with hooks() as handles:
        for name, layer in channels_of(model).items():
            handles.append(layer.register_forward_hook(observe(name)))
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(lambda module, inputs: leave(inputs)))
        handles.append(model.register_forward_hook(lambda module, inputs, output: leave(output)))
        for batch in batches:
            run.clear()
            forward(batch)
            unfit.update(run[-1:], (name for name in run if run.count(name) > 1))
            empty = False
    if empty:
        raise ValueError("batches is empty: the statistics of a merge come from data.")
    return moments, moments.keys() - unfit


def check_endpoints(merged: nn.Module, path: LinearPath) -> None:
    """Raise a ValueError unless a path has the tensors of a merged network, at places of their own."""
    own = weights_of(merged)
    check_same_architecture(own, {name: tensor for name, tensor in path.new.items() if name in own})
    places = {tensor.data_ptr() for tensor in own.values() if tensor.numel()}
    for name, tensor in [*path.previous.items(), *path.new.items()]:
        if tensor.numel() and tensor.data_ptr() in places:
            raise ValueError(
                f"merged holds the very tensor {name!r} of an endpoint: give a copy, as path.module_at does."
            )
