"""Does weight decay straighten the way of the data through a network, and is a residual one closer to optimal transport?

Gai and Zhang (arXiv 2102.09235) say so. A plain and a residual network of ten layers of one width, with and without weight decay, on MNIST and
on ten classes of CIFAR-100; prints a table, writes docs/results/geodesic.md and a figure:

    python benchmarks/geodesic.py --data_dir DIR --cifar FILE.npz
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
from cifar_networks import pictures
from connectivity_widths import images
from rich.progress import track as shown
from torch import nn
from torch.nn.functional import cross_entropy

from lit_rebasin.metrics import line_shape_scores, optimal_transport_score, recorded, tracks_figure, tracks_of

RESULTS = Path(__file__).parents[1] / "docs" / "results"
DEPTH, BATCH, RATE, SAMPLES, CLASSES = 10, 128, 0.02, 500, 10
SEEDS = (0, 1, 2)
DECAYS = (0.0, 5e-4, 5e-3)
WIDTHS = {"MNIST": 128, "CIFAR-100": 24}


class Layer(nn.Module):
    """A layer of one width, with or without the identity beside it."""

    def __init__(self, inner, residual):
        super().__init__()
        self.inner, self.residual = inner, residual

    def forward(self, x):
        return x + self.inner(x) if self.residual else self.inner(x)


def network(data, residual):
    """Return a network whose layers between the first and the last have one width."""
    width = WIDTHS[data]
    if data == "MNIST":
        layers = [Layer(nn.Sequential(nn.Linear(width, width), nn.ReLU()), residual) for _ in range(DEPTH)]
        model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), *layers, nn.Linear(width, CLASSES))
    else:
        convolution = lambda ins: nn.Conv2d(ins, width, 3, padding=1)  # noqa: E731
        layers = [Layer(nn.Sequential(convolution(width), nn.ReLU()), residual) for _ in range(DEPTH)]
        stem = [convolution(3), nn.ReLU(), nn.AvgPool2d(2)]
        model = nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)
    if residual:  # the branch scale under which depth does not blow up the features
        with torch.no_grad():
            for layer in layers:
                layer.inner[0].weight /= DEPTH**0.5
    return model


def trained(data, residual, decay, seed, inputs, targets, epochs):
    torch.manual_seed(seed)
    model = network(data, residual)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for order in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(inputs[order]), targets[order]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
    return model.eval()


def measured(model, inputs, targets):
    """Return the scores on test images, and the track."""
    with torch.no_grad():
        accuracy = float((model(inputs).argmax(1) == targets).float().mean())
        with recorded(model) as calls:
            model(inputs[:SAMPLES])
    names = [call.name for call in calls if isinstance(call.module, Layer)]
    track = [next(call.input for call in calls if call.name == names[0]).flatten(1)]
    track += tracks_of(calls, names)[names[0]]
    steps = torch.stack([(after - before).norm(dim=1).mean() for before, after in pairwise(track)])
    score, own = optimal_transport_score(track[0], track[-1])
    return {
        "accuracy": accuracy,
        "line_shape": float(line_shape_scores(track).mean()),
        "unevenness": float(steps.std() / steps.mean()),
        "transport": score,
        "matched": own,
    }, track


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with torchvision's MNIST")
    parser.add_argument("--cifar", help="file with the arrays of CIFAR-100")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = {"MNIST": [images(options.data_dir, train) for train in (True, False)]}
    if options.cifar:
        sets["CIFAR-100"] = [pictures(options.cifar, split) for split in ("train", "test")]
    plan = [(data, residual, decay) for data in sets for residual in (False, True) for decay in DECAYS]
    found, tracks = {}, {}
    for data, residual, decay in shown(plan, "networks"):
        for seed in SEEDS:
            train, test = sets[data]
            model = trained(data, residual, decay, seed, *train, options.epochs)
            numbers, track = measured(model, *test)
            found.setdefault(f"{data}, {'residual' if residual else 'plain'}, {decay:g}", []).append(numbers)
            if data == "MNIST" and seed == 0 and decay in (0.0, DECAYS[-1]):
                tracks[f"{'residual' if residual else 'plain'}, decay {decay:g}"] = track
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "geodesic.json").write_text(json.dumps({"epochs": options.epochs, "found": found}, indent=1))
    tracks_figure(tracks).savefig(options.output / "geodesic.png", dpi=110)
    page = "\n".join([*about(options.epochs), "", *table(found), "", *READING]) + "\n"
    (options.output / "geodesic.md").write_text(page)
    print(page)


READING = [
    "![tracks of test images through four of the networks on MNIST](geodesic.png)",
    "",
    "Sixty test images on their way through networks of seed 0 on MNIST, each in its two principal axes.",
    "",
    "[What the scores are, and what we read in this](../geodesic.md#what-weight-decay-and-shortcuts-do).",
]


def about(epochs):
    """Return what was done, in words."""
    seeds = ", ".join(map(str, SEEDS))
    return [
        "# Do networks move their data along geodesics?",
        "",
        f"Networks of {DEPTH} layers of one width between a first and a last one, plain (`relu(W x)`) and residual",
        f"(`x + relu(W x)`, initial weights divided by the root of {DEPTH}): {WIDTHS['MNIST']} units on MNIST, and convolutions of",
        f"{WIDTHS['CIFAR-100']} channels on the first ten classes of CIFAR-100 (an unofficial re-split; 8 x 8 after the first layer).",
        f"SGD with momentum 0.9, learning rate {RATE} falling to 0 along a cosine, gradients clipped at norm 1, batches of {BATCH},",
        f"{epochs} epochs, seeds {seeds}. Scores of {SAMPLES} test images, from what goes into the first of the layers to what",
        "comes out of the last; unevenness is the standard deviation of the mean length of a step over the layers, over its",
        "mean: 0 for a constant speed.",
        "",
        "Made by `python benchmarks/geodesic.py --data_dir DIR --cifar FILE.npz`.",
    ]


def table(found):
    """Return the rows of the table in Markdown."""
    lines = [
        "| data, network, weight decay | test accuracy % | line shape score | unevenness of steps | transport score | own image matched % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, runs in found.items():
        cells = [
            f"{scale * mean(run[key] for run in runs):.{digits}f} ± {scale * stdev(run[key] for run in runs):.{digits}f}"
            for key, scale, digits in (
                ("accuracy", 100, 1),
                ("line_shape", 1, 2),
                ("unevenness", 1, 2),
                ("transport", 1, 3),
                ("matched", 100, 0),
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
