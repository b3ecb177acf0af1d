"""REPAIR and RESCALE: give the channels of a merged network the spread that those of its endpoints have."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lit_rebasin.alignment import check_same_architecture
from lit_rebasin.alignment.progress import shown
from lit_rebasin.merging.data import evaluating, hooks
from lit_rebasin.merging.moments import Moments, Sighting, along_channels, channels_of, fuse, rows_of
from lit_rebasin.merging.path import LinearPath, alpha_of, even_shares, weights_of, write_weights
from lit_rebasin.merging.statistics import reestimate_batch_norm
from lit_rebasin.symmetry import use_batch_statistics

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
    ends = [
        _End(path.previous, lambda name: alpha_of(alpha, name)),
        _End(path.new, lambda name: 1 - alpha_of(alpha, name)),
    ]
    return _repair(merged, ends, forward, batches, mean)


def repair_many(
    merged: nn.Module,
    members: Sequence[Mapping[str, Tensor] | nn.Module],
    forward: Forward,
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    mean: bool = True,
) -> list[str]:
    """Correct a merge of many as :func:`repair` does one of two: the goals are the means of the members' means and standard deviations.

    (Crisostomi et al., NeurIPS 2024, take the mean of the variances there.)

    Args:
        merged: The merged network, changed in place.
        members: The networks that were averaged, permuted into one frame: modules, or weights and buffers by name.
        forward: As of :func:`repair`.
        batches: As of :func:`repair`; read once for every member, and once more.
        weights: The share of each member up to scale, as of :func:`~lit_rebasin.merge_many`. Default: even.
        mean: Whether to correct means too.

    Returns:
        The names of the layers that were corrected.

    Raises:
        ValueError: As of :func:`repair`, or if there are no members, or not one positive weight for each.
    """
    if not members:
        raise ValueError("members is empty: give the networks that were averaged.")
    shares = even_shares(weights, len(members))
    held = [weights_of(member) if isinstance(member, nn.Module) else member for member in members]
    ends = [_End(one, lambda name, share=share: share) for one, share in zip(held, shares, strict=True)]  # type: ignore[misc]
    return _repair(merged, ends, forward, batches, mean)


@dataclass(frozen=True)
class _End:
    """A network that was averaged, and its share in the merge by tensor name."""

    weights: Mapping[str, Tensor]
    share: Callable[[str], float]


def _repair(merged: nn.Module, ends: Sequence[_End], forward: Forward, batches: Iterable[Any], mean: bool) -> list[str]:
    batches = list(batches) if isinstance(batches, Iterator) else batches
    own = {name: tensor.clone() for name, tensor in weights_of(merged).items()}
    check_ends(merged, [end.weights for end in ends])
    finished = False
    try:
        with torch.no_grad(), evaluating(merged):
            unchanged, observed = _unchanged(merged, ends), []
            for end in ends:
                write_weights(merged, end.weights)
                observed.append(_observe(merged, forward, batches))
            write_weights(merged, own)
            names = set.intersection(*(fits for _, fits in observed)) - unchanged
            correction = _Correction(
                mean, {name: _goal(name, ends, [found for found, _ in observed]) for name in names}
            )
            correction.run(merged, forward, batches)
            corrected = correction.fuse(merged)
        finished = True
        return corrected
    finally:
        if not finished:
            write_weights(merged, own)


def _goal(name: str, ends: Sequence[_End], observed: Sequence[Mapping[str, Moments]]) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation that the outputs of a layer should have."""
    shares = [end.share(f"{name}.weight") for end in ends]
    moments = [found[name] for found in observed]
    mean = torch.stack([share * one.mean for share, one in zip(shares, moments, strict=True)]).sum(0)
    std = torch.stack([share * one.std for share, one in zip(shares, moments, strict=True)]).sum(0)
    return mean, std


def _unchanged(merged: nn.Module, ends: Sequence[_End]) -> set[str]:
    """Return the layers that a merge has as all of its ends have them, such as frozen ones."""
    return {
        name
        for name, layer in channels_of(merged).items()
        if all(
            torch.equal(end.weights[f"{name}.{own}"].to(tensor.device), tensor)
            for own, tensor in layer.named_parameters(recurse=False)
            for end in ends
        )
    }


class _Correction:
    """Normalises layers to their goals, batch by batch, and then for good."""

    def __init__(self, mean: bool, goals: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.mean, self.goals = mean, goals
        self.moments: dict[str, Moments] = {}

    def run(self, merged: nn.Module, forward: Forward, batches: Iterable[Any]) -> None:
        """Run the merged network with corrected layers, and BatchNorm as it does in training."""
        use_batch_statistics(merged)
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
    outputs: dict[str, Sighting] = {}

    def observe(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            moments.setdefault(name, Moments()).add(rows_of(layer, output))
            run.append(name)
            outputs[name] = Sighting(output)

        return hook

    def leave(values: Any) -> None:
        """Rule out the layers whose very outputs these are."""
        unfit.update(
            name for value in tree_leaves(values) for name, output in outputs.items() if output.is_still(value)
        )

    empty = True
    with hooks() as handles:
        for name, layer in channels_of(model).items():
            handles.append(layer.register_forward_hook(observe(name)))
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(lambda module, inputs: leave(inputs)))
        handles.append(model.register_forward_hook(lambda module, inputs, output: leave(output)))
        for batch in shown(batches, "Reading what layers put out"):
            run.clear()
            forward(batch)
            unfit.update(run[-1:], (name for name in run if run.count(name) > 1))
            empty = False
    if empty:
        raise ValueError("batches is empty: the statistics of a merge come from data.")
    if channels_of(model) and not moments:
        raise ValueError("forward ran no layer of the merged network: give the network itself, or what calls it.")
    return moments, moments.keys() - unfit


def check_ends(merged: nn.Module, ends: Iterable[Mapping[str, Tensor]]) -> None:
    """Raise a ValueError unless all ends have the tensors of a merged network, at places of their own."""
    own = weights_of(merged)
    places = {tensor.data_ptr() for tensor in own.values() if tensor.numel()}
    for end in ends:
        check_same_architecture(own, {name: tensor for name, tensor in end.items() if name in own})
        for name, tensor in end.items():
            if tensor.numel() and tensor.data_ptr() in places:
                raise ValueError(
                    f"merged holds the very tensor {name!r} of an endpoint: give a copy, as path.module_at does."
                )
