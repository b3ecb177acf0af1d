"""Initial weights and learning rates under which every layer of a network learns."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from lit_rebasin.merging.data import arguments_of, check_module, hooks, kind, saying, to_device
from lit_rebasin.metrics.hessian import checked_loss
from lit_rebasin.metrics.residual import LAYERS, Layout, layout
from lit_rebasin.symmetry.keep import use_batch_statistics
from lit_rebasin.transport.arguments import check_function, check_number

_FIRST_MOVE = 1e-3  # of the weights that move most, relative, in the first trial step
_CORRECTIONS = 20
_CLOSE = 0.01  # relative distance from the change asked for at which the search ends


@dataclass(frozen=True)
class LayerScale:
    """What is suggested for one layer.

    Attributes:
        name: Name of the layer in the network.
        weight_scale: Factor for its weight and bias, before training.
        learning_rate: Rate of plain gradient descent for the two once they are scaled.
        on_branch: Whether it sets the size of a residual branch.
    """

    name: str
    weight_scale: float
    learning_rate: float
    on_branch: bool


def suggest_scales(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    change: float = 0.01,
) -> list[LayerScale]:
    """Suggest initial scales and learning rates by the rules of the feature speed formula (Chizat and Netrapalli, NeurIPS 2024).

    The paper asks of a network at its start for signal propagation (features of root mean square 1), feature learning (features before the
    output that change by a given share in a step) and balanced contributions (every layer takes as much off the loss). Here these are measured
    on a batch, with the layers as they were drawn:

    * ``weight_scale`` makes the root mean square of every layer's output 1, each measured behind the scaled layers before it. The last layer
      stays as it is: its scale sets how much the loss falls for a change of the features, of which nothing is asked here.
    * The last layer of each residual branch gets a root mean square of ``1 / sqrt(number of branches)``, under which the angle between updates
      and backward pass does not degenerate with depth. Where a normalization follows that layer, the factor is the normalization's.
    * ``learning_rate`` is ``c / |gradient|^2`` of the layer's weight and bias, so that each takes ``c`` off the loss to first order. ``c`` is
      found by trial steps on a copy, such that one step changes the input of the last layer by ``change``.

    The network runs in evaluation mode but for BatchNorm, which takes the statistics of the batch. All is of this batch, and the rates are of
    its loss: measure the batch size that will be trained with. What is no linear or convolution layer, such as an embedding, stays as it is.

    Args:
        model: The network as it was initialized. It is left as it was. Layers that take no gradient are left out, and layers whose weight is
            computed, as with ``torch.nn.utils.parametrizations``.
        batch: Inputs and target.
        loss: ``loss(output, target)``, one number.
        change: Relative change of the features before the last layer in one step.

    Returns:
        One for each layer, in the order of use; of layers with one and the same weight, the last. A layer whose weight another module uses
        without a call, such as the output projection of ``nn.MultiheadAttention``, is not measured: it is scaled only as the end of a branch.
        Nor is one whose output is all zeros.

    Raises:
        TypeError: If the network is no module, the batch no pair of inputs and target, the loss no function or its result no tensor, or
            ``change`` no number.
        ValueError: If there are fewer than two layers, the batch does not fit the network or the loss, ``torch.export`` cannot follow the
            network, the loss is not one number, is NaN or infinite or has no gradient in some layer, or no step brings about the change.

    Example::

        for scale in suggest_scales(model, (x, y)):
            for parameter in model.get_submodule(scale.name).parameters(recurse=False):
                parameter.data.mul_(scale.weight_scale)
    """
    check_module("model", model)
    check_function("loss", loss, "output and target")
    check_number("change", change)
    if not (change > 0 and math.isfinite(change)):
        raise ValueError(f"change must be a share above 0, such as 0.01, got {change}.")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"batch must be a pair of inputs and target, got {kind(batch)}.")
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        # Tensors of inference mode cannot be differentiated through.
        inputs, target = pytree.tree_map_only(Tensor, torch.clone, to_device(tuple(batch), model))
        args = arguments_of(inputs)
        _check_fit(model, args, loss, target)
        trial = copy.deepcopy(model).eval()
        found = layout(trial, args)
        names = [name for name in found.names if _parameters(trial, name)]
        layers = [name for name in names if isinstance(trial.get_submodule(name), LAYERS)]
        if len(layers) < 2:
            raise ValueError(
                f"{type(model).__name__} uses {len(layers)} linear or convolution layers that take a gradient: scales are "
                "suggested for two at least, one of them the output's."
            )
        use_batch_statistics(trial)
        factors = _propagate(trial, args, names, layers, found)
        gradients = _gradients(trial, names, lambda: loss(trial(*args), target))
        rates = _balanced_rates(trial, args, gradients, layers[-1], change)
    return [LayerScale(name, factors[name], rates[name], name in found.ends) for name in names]


def _check_fit(model: nn.Module, args: tuple[Any, ...], loss: Callable[[Any, Any], Tensor], target: Any) -> None:
    """Run a copy of a network for its loss, so that a batch which does not fit is not blamed on the graph or on a layer."""
    with torch.no_grad():
        with saying(f"{type(model).__name__} cannot be run on the inputs of the batch"):
            output = copy.deepcopy(model).eval()(*args)
        with saying("loss cannot be computed of the network's output and the target"):
            loss(output, target)


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer that take a gradient, by their names in the network."""
    part = model.get_submodule(name)
    prefix = f"{name}." if name else ""
    return {prefix + own: p for own, p in part.named_parameters(recurse=False) if p.requires_grad}


def _propagate(
    trial: nn.Module, args: tuple[Any, ...], names: list[str], layers: list[str], found: Layout
) -> dict[str, float]:
    """Scale the layers of a network such that signals propagate, and return the factors."""
    sizes = {name: 1 / math.sqrt(found.branches) if name in found.ends else 1.0 for name in names}
    measured = {name for name in names if name != layers[-1] or name in found.ends} & _called(trial, args, names)
    factors = {name: size for name, size in sizes.items() if name not in measured}
    for name, factor in factors.items():
        _scale(trial, name, factor)

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def rescaled(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if name not in factors:  # at the first use; what was used before is scaled already
                size = float(output.double().square().mean().sqrt())
                factors[name] = sizes[name] / size if size > 0 else 1.0
            return output * factors[name]

        return rescaled

    with torch.no_grad(), hooks() as handles:
        for name in measured:
            handles.append(trial.get_submodule(name).register_forward_hook(hook(name)))
        trial(*args)
    for name in measured:
        if not math.isfinite(factors[name]) or factors[name] == 0:
            raise ValueError(f"The output of layer {name!r} is NaN or infinite on the batch, so it cannot be scaled.")
        _scale(trial, name, factors[name])
    return factors


def _called(trial: nn.Module, args: tuple[Any, ...], names: list[str]) -> set[str]:
    """Return the layers that are called themselves, rather than read by another module."""
    called: set[str] = set()
    with torch.no_grad(), hooks() as handles:
        for name in names:
            part = trial.get_submodule(name)
            handles.append(part.register_forward_pre_hook(lambda _module, _inputs, name=name: called.add(name)))
        trial(*args)
    return called


def _scale(trial: nn.Module, name: str, factor: float) -> None:
    with torch.no_grad():
        for parameter in trial.get_submodule(name).parameters(recurse=False):
            parameter.mul_(factor)


def _gradients(trial: nn.Module, names: list[str], loss: Callable[[], Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the gradients by layer and parameter.

    Raises:
        ValueError: If one layer has none.
    """
    keys = {name: list(_parameters(trial, name)) for name in names}
    flat = {key: trial.get_parameter(key) for own in keys.values() for key in own}
    values = torch.autograd.grad(checked_loss(loss()), list(flat.values()), allow_unused=True)
    found = {key: value for key, value in zip(flat, values, strict=True) if value is not None}
    gradients = {name: {key: found[key] for key in own if key in found} for name, own in keys.items()}
    for name, own in gradients.items():
        if not 0 < _square(own) < math.inf:
            raise ValueError(
                f"The gradient of the loss in layer {name!r} is zero, NaN or infinite on the batch, so that no learning rate "
                "balances it: is a layer behind it initialized to zeros, or unused?"
            )
    return gradients


def _square(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(tensor.detach().double().square().sum()) for tensor in tensors.values())


def _balanced_rates(
    trial: nn.Module, args: tuple[Any, ...], gradients: dict[str, dict[str, Tensor]], last: str, change: float
) -> dict[str, float]:
    """Return learning rates under which all layers take as much off the loss and the features before ``last`` change by ``change``."""
    squares = {name: _square(own) for name, own in gradients.items()}
    before = _features(trial, args, {}, last)
    weights = {key: trial.get_parameter(key) for own in gradients.values() for key in own}

    def changed(decay: float) -> float:
        stepped = {
            key: weights[key] - decay / squares[name] * gradient
            for name, own in gradients.items()
            for key, gradient in own.items()
        }
        return float((_features(trial, args, stepped, last) - before).norm() / before.norm())

    lengths = [math.sqrt(squares[name] * _square(_parameters(trial, name))) for name in gradients]
    decay = _solve(changed, change, _FIRST_MOVE * min([length for length in lengths if length > 0], default=1.0))
    return {name: decay / square for name, square in squares.items()}


def _features(trial: nn.Module, args: tuple[Any, ...], weights: dict[str, Tensor], last: str) -> Tensor:
    """Return the inputs of a layer as one vector, in float64, with some weights of the network replaced."""
    inputs: list[Tensor] = []
    with torch.no_grad(), hooks() as handles:
        part = trial.get_submodule(last)
        handles.append(
            part.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].double().flatten()))
        )
        functional_call(trial, weights, args)
    if not inputs:
        raise ValueError(
            f"The last layer {last!r} is used by another module without a call, so its input is not known."
        )
    return torch.cat(inputs)


def _solve(changed: Callable[[float], float], change: float, start: float) -> float:
    """Return where a function that grows from 0, about as a power, is ``change``: a secant search on logarithms."""
    at, value, power = start, changed(start), 1.0
    for _ in range(_CORRECTIONS):
        if abs(value - change) <= _CLOSE * change:
            return at
        if not math.isfinite(value):
            factor = 0.1
        elif value == 0:  # below rounding
            factor = 100.0
        else:
            factor = min(max((change / value) ** (1 / power), 1e-3), 1e3)
        following = changed(at * factor)
        if 0 < value < math.inf and 0 < following < math.inf:
            power = min(max(math.log(following / value) / math.log(factor), 0.3), 3.0)
        at, value = at * factor, following
    raise ValueError(
        f"No step of balanced learning rates changes the features before the last layer by change={change}: the last one tried "
        f"changes them by {value:.3g}. Is there a layer before the last, and is change small enough?"
    )
