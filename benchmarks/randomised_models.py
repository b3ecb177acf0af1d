"""Networks of torchvision in which no weight is zero, constant or small enough to hide a wrong permutation."""

import warnings

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

IMAGE_SIZES = {"inception_v3": 299}


def example_input(name, size=224, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def build(name, x):
    """Return a network with weights, biases, layer scales and statistics that tell all of its channels apart."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)
    for parameter in model.parameters():
        if bool((parameter == 0).all()):
            parameter.normal_(0, 0.1)
        elif bool((parameter == parameter.flatten()[0]).all()):  # a norm's weight, or a layer scale of 1e-6
            parameter.uniform_(0.5, 1.5)
    _set_statistics(model, x)
    return model


def _set_statistics(model, x):
    """Set BatchNorm's statistics from a batch, so that activations keep their scale, and then perturb them."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None
        layer.reset_running_stats()
        layer.train()
    if layers:
        model(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
        layer.running_mean += 0.2 * layer.running_var.sqrt() * torch.randn_like(layer.running_mean)
        layer.running_var *= torch.empty_like(layer.running_var).uniform_(0.5, 2)


def relative_difference(outputs, expected):
    return float((outputs - expected).abs().max() / expected.abs().max())


def with_batch_statistics(model: nn.Module, x):
    """Return the outputs in float64 with BatchNorm on the statistics of the batch, for methods that leave the running ones behind."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    return model(x.double())
