"""The part of linear_mode_connectivity.py over learning rates: does the barrier follow the effective dimension of the weights?

Ferbach et al. (AISTATS 2024, section 6): the width at which two networks are connected grows with the dimension of their neurons' weights, so
training that concentrates the weights in few directions should lower the barrier.
"""

import json
from itertools import pairwise
from statistics import mean

import torch
from connectivity_methods import mlp
from connectivity_widths import fitted, images
from matplotlib import pyplot as plt
from scipy.stats import spearmanr
from torch import nn

from lit_rebasin import LinearPath, align, loss_barrier, permutation_spec, permute

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PAIRS = ((0, 1), (2, 3))
WIDTH, EPOCHS, BATCH, SHOWN = 512, 5, 50, 5000
# Below this test accuracy, in percent, a training has failed, and its barriers say nothing of connectivity.
FAILED = 80
PUBLISHED = ("weights, as published", "covariance, as published")
METHODS = {
    "not aligned": {"method": "identity"},
    "weights, as published": {"method": "weights", "normalize": False},
    "weights": {"method": "weights"},
    "covariance, as published": {"method": "covariance", "power": 1.0, "normalize": False},
    "covariance, power 1": {"method": "covariance", "power": 1.0},
    "covariance": {"method": "covariance"},
}


def trained(rate, seed, inputs, targets):
    torch.manual_seed(seed)
    model = mlp(WIDTH)
    return fitted(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), inputs, targets, EPOCHS, BATCH)


def dimensions(model, inputs):
    """Return `tr(S)^2 / tr(S^2)`, S the second moment of a layer's neurons, plain and in the metric of its inputs; means over hidden layers."""
    plain, weighted = [], []
    x = inputs
    with torch.no_grad():
        for layer, activation in pairwise(model):
            if isinstance(layer, nn.Linear):
                second = x.T @ x / len(x)
                values, vectors = torch.linalg.eigh(second.double())
                rows = layer.weight.double()
                for found, neurons in ((plain, rows), (weighted, rows @ vectors * values.clamp(min=0).sqrt())):
                    s = neurons.T @ neurons / len(neurons)
                    found.append(float(s.trace() ** 2 / s.square().sum()))
                x = activation(layer(x))
    return mean(plain), mean(weighted)


def run(options):
    train, test = images(options.data_dir, train=True), images(options.data_dir, train=False)
    data = [(train[0][:SHOWN], train[1][:SHOWN])]
    spec = permutation_spec(mlp(WIDTH), train[0][:2])
    kept = []
    for rate in RATES:
        for seeds in PAIRS:
            reference, model = (trained(rate, seed, *train) for seed in seeds)
            if not all(p.isfinite().all() for network in (reference, model) for p in network.parameters()):
                print(rate, seeds, "the training has diverged", flush=True)
                continue
            sizes = [dimensions(one, train[0][:SHOWN]) for one in (reference, model)]
            row = {"rate": rate, "plain": mean(one[0] for one in sizes), "weighted": mean(one[1] for one in sizes)}
            for name, arguments in METHODS.items():
                found = align(model, reference, spec=spec, data=data, **arguments)
                losses = loss_barrier(LinearPath(reference, permute(model, spec, found.permutations)), [test])
                row[name] = losses.barrier
            row["accuracy"] = 50 * float(losses.accuracies[0] + losses.accuracies[-1])
            row["loss"] = float(losses.losses[0] + losses.losses[-1]) / 2
            kept.append(row)
            print(rate, seeds, {key: round(value, 4) for key, value in row.items()}, flush=True)
    path = options.output / "linear_mode_connectivity_rates.md"
    path.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    write(kept, path)
    draw(kept, path.with_suffix(".png"))


def write(kept, path):
    heads = ["learning rate", "test loss", "test accuracy %", "dim of weights", "dim in the metric", *METHODS]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    rates = list(dict.fromkeys(row["rate"] for row in kept))
    for rate in rates:
        of = [row for row in kept if row["rate"] == rate]
        keys = (("loss", 3), ("accuracy", 1), ("plain", 0), ("weighted", 2), *((name, 4) for name in METHODS))
        cells = [f"{mean(row[key] for row in of):.{digits}f}" for key, digits in keys]
        rows.append(f"| {rate:g} | " + " | ".join(cells) + " |")
    aligned = [name for name in METHODS if name != "not aligned"]
    sound = [row for row in kept if row["accuracy"] > FAILED]
    ranks = ["| method | rank correlation with dim of weights | with dim in the metric |", "|---|---:|---:|"]
    for name in aligned:
        found = [
            spearmanr([row[key] for row in sound], [row[name] for row in sound]).statistic
            for key in ("plain", "weighted")
        ]
        ranks.append(f"| {name} | {found[0]:.2f} | {found[1]:.2f} |")
    sound_rates = list(dict.fromkeys(row["rate"] for row in sound))
    lower = [rate for rate in sound_rates if _mean(kept, rate, PUBLISHED[1]) < _mean(kept, rate, PUBLISHED[0])]
    lost = [f"{rate:g}" for rate in RATES if rate not in sound_rates]
    listed = ", ".join(f"{rate:g}" for rate in lower)
    parts = [
        "# Barrier and effective dimension over learning rates",
        f"The experiment of Ferbach et al. (AISTATS 2024, section 6): MNIST, 784-{WIDTH}-{WIDTH}-{WIDTH}-10, SGD with momentum 0.9, batch "
        f"{BATCH}, {EPOCHS} epochs; pairs of seeds {', '.join(map(str, PAIRS))} (they: four runs; epochs, batch and momentum are not in our "
        "source). Test loss barrier at 21 points, means over the pairs; the effective dimension is `tr(S)^2 / tr(S^2)`, S the second moment of "
        "the neurons' incoming weights, or of those times the root of the second moment of the layer's inputs; mean over the hidden layers and "
        f"both networks. Methods that need inputs get {SHOWN:,} training images."
        + (
            f" At {', '.join(lost)} the training failed: pairs that diverged are left out, and accuracies below {FAILED} %."
            if lost
            else ""
        ),
        "Made by `python benchmarks/linear_mode_connectivity.py --parts rates --data_dir DIR`.",
        "**Their predictions.** (1) The barrier after matching rises with the effective dimension: concentrated weights need less width "
        "(theorem 5.4); less clear at the rate 0.1. (2) Covariance-weighted matching lies below weight matching as published, at every "
        "learning rate. The column `covariance, as published` is their cost but for this: it takes the covariance instead of the second "
        "moment, and each network's own instead of one for both.",
        "\n".join(rows),
        f"**Measured.** (2) holds at {len(lower)} of {len(sound_rates)} rates ({listed or 'none'}). (1), as Spearman's rank correlation "
        "over the rates and pairs:",
        "\n".join(ranks),
        "![barrier against effective dimension](linear_mode_connectivity_rates.png)",
    ]
    path.write_text("\n\n".join(parts) + "\n")


def _mean(kept, rate, key):
    return mean(row[key] for row in kept if row["rate"] == rate)


def draw(kept, path):
    kept = [row for row in kept if row["accuracy"] > FAILED]
    rates = list(dict.fromkeys(row["rate"] for row in kept))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name in METHODS:
        if name != "not aligned":
            axes[0].plot(rates, [_mean(kept, rate, name) for rate in rates], marker="o", label=name)
            for one, key in zip(axes[1:], ("plain", "weighted"), strict=True):
                one.scatter([row[key] for row in kept], [row[name] for row in kept], s=18, label=name)
    axes[0].set_xlabel("learning rate")
    axes[1].set_xlabel("effective dimension of the weights")
    axes[2].set_xlabel("effective dimension in the metric of the inputs")
    axes[0].set_xscale("log")
    for one in axes:
        one.set_yscale("symlog", linthresh=0.01)
        one.axhline(0, color="grey", linewidth=0.8)
        one.grid(alpha=0.3)
    axes[0].set_ylabel("test loss barrier")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
