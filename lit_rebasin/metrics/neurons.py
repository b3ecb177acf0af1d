"""The neurons of a layer as a cloud of points: how many dimensions they fill, and how far two networks' are from each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, log10

import torch
from torch import Tensor, nn

from lit_rebasin.alignment import check_same_architecture, check_weights
from lit_rebasin.merging.data import check_module
from lit_rebasin.metrics.tracks import WEIGHTED
from lit_rebasin.transport import energy_distance, wasserstein_distance
from lit_rebasin.transport.arguments import check_number, check_points, check_tensor

_WIDEST = 4096


@dataclass(frozen=True)
class NeuronDistance:
    """How far the neurons of a layer are from those of another network, both taken as clouds of equal masses.

    Attributes:
        wasserstein: Of order 2: the root mean square distance of the best pairing.
        energy: The energy distance, which costs less.
        paired: The root mean square distance in the order that the neurons have. Where the two networks were matched well it is as short as
            the best pairing's.
    """

    wasserstein: float
    energy: float
    paired: float


def layer_neurons(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the neurons of every linear layer and convolution: what comes in, and the bias.

    Args:
        module: Has the layers.
        weights: Its parameters by name, or those of another network of the architecture.

    Returns:
        By the name of a layer ``(neurons, inputs)``, or ``(neurons, inputs + 1)`` where it has a bias.

    Raises:
        TypeError: If the module is none, or the weights are no mapping of tensors.
        ValueError: If the weights of a layer have another shape than in the module.
    """
    check_module("module", module)
    check_weights("weights", weights)
    found = {}
    for name, layer in module.named_modules():
        weight, bias = (f"{name}.{own}".lstrip(".") for own in ("weight", "bias"))
        if isinstance(layer, WEIGHTED) and weight in weights:
            held = {weight: layer.weight} | ({bias: layer.bias} if layer.bias is not None and bias in weights else {})
            given = {part: weights[part].detach() for part in held}
            check_same_architecture(given, held, ("weights", "module"))
            found[name] = torch.cat([tensor.reshape(len(tensor), -1) for tensor in given.values()], dim=1)
    return found


def effective_dimension(points: Tensor) -> float:
    """Return ``tr(S)^2 / tr(S^2)`` of the covariance S of some points: how many directions they fill evenly.

    From 1, for points on a line, to the number of coordinates; 0 where all points are one, and NaN where a coordinate is NaN. Ferbach et al.
    (AISTATS 2024, section 6) predict that networks whose neurons fill few dimensions are joined at smaller widths.

    Args:
        points: ``(n, d)``, at least two.

    Raises:
        TypeError: If the points are no tensor of real numbers.
        ValueError: If there are not two of them, or they are not ``(n, d)``.
    """
    check_tensor("points", points)
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f"points must be (n, d) with at least two of them, got shape {tuple(points.shape)}.")
    scaled = points.detach().double()
    largest = scaled.abs().max() if scaled.numel() else torch.zeros(())
    if largest > 0:  # whose fourth power may not be representable
        scaled = scaled / largest
    centred = scaled - scaled.mean(0)
    # The trace of S^2 is that of the squared Gram matrix on the smaller side.
    gram = centred @ centred.T if len(points) < points.shape[1] else centred.T @ centred
    squares = float(gram.square().sum())
    return float(gram.diagonal().sum()) ** 2 / squares if squares != 0 else 0.0


def neuron_distances(
    module: nn.Module, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, NeuronDistance]:
    """Return how far the neurons of every layer of two networks are apart.

    Coordinates of a neuron are its incoming weights, so both networks must have the neurons of the layers below in one order: permute one of
    them first by an alignment. What comes in to the first layer has the same order in both.

    Args:
        module: Has the layers.
        weights: Parameters by name.
        reference: Those of the other network.

    Returns:
        By layer; those of more than 4,096 neurons, whose exact pairing would take minutes, are left out.

    Raises:
        TypeError: If the module is none, or one of the networks is no mapping of tensors.
        ValueError: If the two networks differ in names or shapes, a weight is NaN or infinite, or the module has no linear layer or convolution
            whose weights they have.
    """
    for argument, network in (("weights", weights), ("reference", reference)):
        check_weights(argument, network)
    check_same_architecture(weights, reference, ("network in weights", "reference"))
    theirs = layer_neurons(module, reference)
    ours = {name: points for name, points in layer_neurons(module, weights).items() if len(points) <= _WIDEST}
    if not theirs:
        raise ValueError(
            "No linear layer or convolution of the module has its weights among those given, by their names."
        )
    for argument, layers in (("weights", ours), ("reference", theirs)):
        for name, points in layers.items():
            check_points(f"{argument}: layer {name!r}", points)
    return {
        name: NeuronDistance(
            wasserstein_distance(points, theirs[name])[0],
            energy_distance(points, theirs[name]),
            float((points.double() - theirs[name].to(points.device).double()).square().sum(1).mean()) ** 0.5,
        )
        for name, points in ours.items()
    }


def width_bound(dimension: float, error: float) -> float:
    """Return the decimal logarithm of the width at which two layers of random neurons are expected to be connected within an error.

    ``(1 / error)^dimension``: the rate at which two samples of n neurons in this many dimensions approach each other in the Wasserstein
    distance (Ferbach et al., AISTATS 2024, theorem 5.2, for neurons drawn independently, an activation function that is 1-Lipschitz and 0 at
    0, and a convex loss; theorem 5.4 puts the dimension that the weights lie near in place of the number of inputs). The theorem has
    constants that it does not give, so this compares layers and networks; it is no number of neurons to order.

    Args:
        dimension: The number of inputs of the layer, or its :func:`effective_dimension`.
        error: What the outputs on the path may be off by, in the scale of the outputs; below 1.

    Raises:
        TypeError: If one of the two is no number.
        ValueError: If the error is not between 0 and 1, or the dimension is negative.
    """
    check_number("dimension", dimension)
    check_number("error", error)
    if not 0 < error < 1:
        raise ValueError(f"error must lie between 0 and 1, got {error}.")
    if not 0 <= dimension < inf:
        raise ValueError(f"dimension must be a number of at least 0, got {dimension}.")
    return dimension * log10(1 / error)
