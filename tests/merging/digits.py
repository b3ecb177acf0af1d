"""Networks trained on scikit-learn's digits from different seeds, and aligned."""

from functools import cache
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn

from lit_rebasin import permutation_spec, permute, weight_matching

TRAINING = 1300


@cache
def digits():
    """Return training inputs and targets, and test inputs and targets; inputs are of (64,) in [0, 1], float64."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.tensor(data.data)[order] / 16, torch.tensor(data.target)[order]
    return inputs[:TRAINING], targets[:TRAINING], inputs[TRAINING:], targets[TRAINING:]


def mlp(depth, width):
    layers = []
    for a, b in pairwise((64, *[width] * depth, 10)):
        layers += [nn.Linear(a, b), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])


def convnet(norm=False):
    layers, channels = [nn.Unflatten(1, (1, 8, 8))], 1
    for width in (12, 16, 24):
        layers += [nn.Conv2d(channels, width, 3, padding=1)] + ([nn.BatchNorm2d(width)] if norm else []) + [nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(96, 10))


def trained(build, seed, epochs, weight_decay):
    torch.manual_seed(seed)
    model, (inputs, targets, _, _) = build(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=weight_decay)
    for _ in range(epochs):
        for index in torch.randperm(TRAINING).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[index].float()), targets[index]).backward()
            optimizer.step()
    return model.double().eval()


@cache
def aligned_pair(kind):
    """Return two trained networks, the second permuted onto the first by its weights. Not to be changed."""
    build, epochs, weight_decay = {
        "mlp": (lambda: mlp(3, 32), 10, 0.01),
        "deep mlp": (lambda: mlp(8, 128), 30, 0.5),
        "convnet": (convnet, 12, 0.01),
        "convnet with BatchNorm": (lambda: convnet(norm=True), 12, 0.01),
    }[kind]
    # Of the networks with BatchNorm a pair whose average needs statistics badly.
    seeds = (8, 9) if "BatchNorm" in kind else (0, 1)
    previous, new = (trained(build, seed, epochs, weight_decay) for seed in seeds)
    spec = permutation_spec(previous, digits()[0][:2])
    ours, theirs = ({name: p.detach() for name, p in model.named_parameters()} for model in (new, previous))
    return previous, permute(new, spec, weight_matching(ours, theirs, spec).permutations)


def accuracy(model):
    _, _, inputs, targets = digits()
    with torch.no_grad():
        return float((model(inputs).argmax(1) == targets).double().mean())
