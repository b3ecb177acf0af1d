"""Merge layer by layer as a regression: the weights that give each network's outputs on what that network takes in."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from lit_rebasin.merging.data import hooks
from lit_rebasin.merging.path import LinearPath

Weights = dict[str, Tensor]


def input_moments(
    model: nn.Module, forward: Callable[[Any], Any], batches: Iterable[Any], *, rows: float | None = None
) -> Weights:
    """Return the second moments ``E[x x']`` of what the linear and convolutional layers of a network take in.

    ``x`` is an input of the layer with a 1 behind it, for the bias; of a convolution it is a patch under the kernel, so the mean is also over
    positions. Layers that a batch does not reach, whose weights another layer shares or a parametrization computes, grouped and one- or
    three-dimensional convolutions, and those whose padding is not of zeros are left out.

    Args:
        model: The network; it runs in the modes that it is in.
        forward: Runs ``model`` on a batch.
        batches: Data of the network's task. Take more examples than the widest layer has inputs.
        rows: Stop as soon as every layer has had so many times as many rows as it has inputs. Default: read all batches.

    Returns:
        By the name of a layer's weight, a matrix in float32 with a row for each of its inputs and, last, one for the bias.

    Raises:
        Exception: Whatever ``forward`` raises.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else named["input"]
            seen = pad(_rows(layer, x.detach()).float(), (0, 1), value=1.0)
            totals[name] = totals.get(name, 0) + seen.T @ seen
            counts[name] = counts.get(name, 0) + len(seen)

        return hook

    with torch.no_grad(), hooks() as handles:
        for name, layer in _layers(model).items():
            handles.append(layer.register_forward_pre_hook(watch(name), with_kwargs=True))
        for batch in batches:
            forward(batch)
            if rows is not None and totals and all(counts[name] >= rows * len(totals[name]) for name in totals):
                break
    return {name: total / counts[name] for name, total in totals.items() if counts[name]}


def regmean(
    path: LinearPath,
    previous_moments: Mapping[str, Tensor],
    new_moments: Mapping[str, Tensor],
    *,
    alpha: float = 0.5,
    ridge: float = 1e-3,
) -> Weights:
    r"""Return the merge whose every layer is nearest to both networks' on the inputs of each (RegMean, Jin et al., ICLR 2023, eq. 2).

    Of a layer with weight and bias ``W = (weight, bias)`` it is the minimiser of

    ``alpha E_prev |(W - W_prev) x|^2 + (1 - alpha) E_new |(W - W_new) x|^2``

    in closed form, ``W = (alpha W_prev G_prev + (1 - alpha) W_new G_new) (alpha G_prev + (1 - alpha) G_new)^-1`` with ``G = E[x x']``. Where
    the inputs of a task have no part, the other's weights stay as they are, which an average would spoil. In place of the paper's factor on
    what is off the diagonals, ``ridge`` times the mean of its diagonal is added to the diagonal of each ``G``, and biases are part of the
    regression. What has no moments is averaged.

    Args:
        path: From the previous network to the new one, aligned to it.
        previous_moments: Of the previous network, by weight name; see :func:`input_moments`.
        new_moments: Of the new network, in the frame of the previous one: permuted as the inputs of the weights are.
        alpha: Weight of the previous network. With the mean of moments over ``n`` tasks, ``n / (n + 1)`` has all tasks count the same.
        ridge: How strongly directions that no input has are averaged.

    Returns:
        All tensors of the path by name.

    Raises:
        ValueError: If ``alpha`` lies outside [0, 1], ``ridge`` is not positive, or a moment is of a tensor that the path lacks, of another
            size or not finite.
    """
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be a positive number, got {ridge}.")
    merged = path.at(alpha)
    for argument, moments in (("previous_moments", previous_moments), ("new_moments", new_moments)):
        for name, moment in moments.items():
            _check(path, name, moment, argument)
    if alpha in (0, 1):
        return merged
    for name in previous_moments.keys() & new_moments.keys():
        ends = [(alpha, path.previous, previous_moments[name]), (1 - alpha, path.new, new_moments[name])]
        merged |= _solve(name, ends, ridge, merged[name])
    return merged


def _solve(name: str, ends: list[tuple[float, Mapping[str, Tensor], Tensor]], ridge: float, like: Tensor) -> Weights:
    """Return weight and bias of one layer."""
    bias = _bias_of(name, ends[0][1])
    grams, products = [], []
    for share, weights, moment in ends:
        layer = weights[name].detach().flatten(1)
        column = weights[bias].detach()[:, None] if bias is not None else layer.new_zeros(len(layer), 0)
        rows = torch.cat([layer, column.to(layer)], 1).to(like.device).double()
        gram = moment.to(like.device).double()[: rows.shape[1], : rows.shape[1]]
        gram = share * (gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), device=like.device).double())
        grams.append(gram)
        products.append(gram @ rows.T)
    solved = torch.linalg.solve(sum(grams), sum(products)).T
    found = {name: solved[:, : like[0].numel()].reshape(like.shape).to(like)}
    return found if bias is None else {**found, bias: solved[:, -1].to(like)}


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer multiplies its weight with, one row a product."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    assert isinstance(layer, nn.Conv2d)
    # "same" and "valid" stand for numbers; an even kernel has one more at the end.
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    x = pad(x if x.ndim == 4 else x.unsqueeze(0), (left, right, top, bottom))
    patches = unfold(x, _pair(layer.kernel_size), _pair(layer.dilation), 0, _pair(layer.stride))
    return patches.transpose(1, 2).flatten(0, 1)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    return sizes[0], sizes[1]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose moments are taken, by the name of their weight."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [
        part
        for part in model.modules()
        if isinstance(part, nn.Linear)
        or (isinstance(part, nn.Conv2d) and part.groups == 1 and part.padding_mode == "zeros")
    ]
    owners: dict[int, int] = {}
    for part in model.modules():
        for parameter in part._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        names[id(layer.weight)]: layer
        for layer in layers
        if id(layer.weight) in names and owners[id(layer.weight)] == 1
    }


def _bias_of(name: str, weights: Mapping[str, Tensor]) -> str | None:
    bias = f"{name.rpartition('weight')[0]}bias"
    return bias if bias in weights else None


def _check(path: LinearPath, name: str, moment: Tensor, argument: str) -> None:
    if name not in path.new:
        raise ValueError(f"{argument} has the tensor {name!r}, which the path lacks.")
    inputs = path.new[name][0].numel() + 1
    if tuple(moment.shape) != (inputs, inputs):
        raise ValueError(
            f"{argument}[{name!r}] has shape {tuple(moment.shape)}, but the layer has {inputs - 1} inputs: ({inputs}, {inputs}) with the bias."
        )
    if not torch.isfinite(moment).all():
        raise ValueError(f"{argument}[{name!r}] must be finite: the inputs of the layer hold NaN or infinity.")
