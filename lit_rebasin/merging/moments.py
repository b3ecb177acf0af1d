"""Means and standard deviations of the channels that a layer puts out."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# A range below this many roundings of the mean is one of a constant; half precision is too coarse to have more.
_ROUNDINGS, _FEW = 16, 4


class Moments:
    """Mean and variance over all rows that were added, in float64 (Chan et al., 1983)."""

    def __init__(self) -> None:
        self.rows = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())
        self.rounding = 0.0
        self.least: Tensor = torch.zeros(())
        self.most: Tensor = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add rows ``(n, channels)``."""
        if not len(rows):
            return
        precision = torch.finfo(rows.dtype).eps
        self.rounding = max(self.rounding, (_ROUNDINGS if precision < 1e-4 else _FEW) * precision)
        rows = rows.detach().double()
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.rows:
            total = self.rows + len(rows)
            step = mean - self.mean
            self.mean = self.mean + step * (len(rows) / total)
            self.squares = self.squares + squares + step.square() * (self.rows * len(rows) / total)
            self.rows = total
            self.least, self.most = torch.minimum(self.least, rows.amin(0)), torch.maximum(self.most, rows.amax(0))
        else:
            self.rows, self.mean, self.squares = len(rows), mean, squares
            self.least, self.most = rows.amin(0), rows.amax(0)

    @property
    def std(self) -> Tensor:
        """The standard deviation of every channel; exactly 0 for a channel that is constant but for rounding."""
        std = (self.squares / self.rows).sqrt()
        return torch.where(self.most - self.least > self.rounding * self.mean.abs(), std, torch.zeros_like(std))


class Sighting:
    """Remembers a tensor without keeping it, to tell later whether it comes along again, unchanged."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), _version(tensor)

    def is_still(self, value: Any) -> bool:
        """Return whether a value is the very tensor, not written to since, as an activation in place would."""
        return self._tensor() is value and value is not None and _version(value) == self._version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def channels_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolutional layers whose weights are their own, by name."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd)
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and all(owners[id(parameter)] == 1 for parameter in module.parameters(recurse=False))
    }


def channel_dim(layer: nn.Module) -> int:
    """Return which dimension of a layer's output holds the channels."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def rows_of(layer: nn.Module, output: Tensor) -> Tensor:
    """Return an output as ``(examples and positions, channels)``."""
    return output.movedim(channel_dim(layer), -1).flatten(0, -2) if output.ndim > 1 else output.unsqueeze(0)


def along_channels(layer: nn.Module, values: Tensor, output: Tensor) -> Tensor:
    """Return one value a channel in the shape and the dtype that broadcast against an output."""
    return values.to(output.dtype).view(-1, *[1] * (-1 - channel_dim(layer)))


def rows_of_weight(layer: Any, weight: Tensor) -> Tensor:
    """Return a layer's weight as ``(channels of the output, all that a channel weighs)``."""
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, kernel): the outputs of a group lie in its rows
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def fuse(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Write ``output -> scale * output + shift`` into a layer's weight, and its bias if it has one."""
    weight = layer.weight
    if isinstance(layer, _ConvTransposeNd):
        rows = weight.detach().double().unflatten(0, (layer.groups, -1))
        by_group = scale.view(layer.groups, 1, -1, *[1] * len(layer.kernel_size))
        scaled = (rows * by_group).flatten(0, 1)
    else:
        scaled = weight.detach().double() * scale.view(-1, *[1] * (weight.ndim - 1))
    weight.detach().copy_(scaled)
    if layer.bias is not None:
        layer.bias.detach().copy_(layer.bias.detach().double() * scale + shift)
