"""The part of linear_mode_connectivity.py on CIFAR-100: what merges of convolutional networks keep, with and without their own statistics."""

import json
import tempfile
from pathlib import Path
from statistics import mean, median

import torch
from cifar_networks import CLASSES, EPOCHS, NETWORKS, SIDE, pictures, trained
from connectivity_methods import PEERS, by_process, network
from matplotlib import pyplot as plt
from torch import nn

from lit_rebasin import LinearPath, loss_barrier, reestimate_batch_norm, repair, reset_batch_norm

PAIRS = {"VGG-11 with BatchNorm": ((0, 1), (2, 3)), "ResNet-20, width 4x": ((0, 1),), "VGG-11": ((0, 1),)}
METHODS = (
    "identity",
    "weights",
    "frank-wolfe",
    "covariance",
    "activations",
    "activations, cosine",
    "sinkhorn, midpoint, from activations",
)
THEIRS = ("snimu's rebasin, weights",)
POINTS, SHOWN, BATCH = 5, 2500, 250


def own_statistics(network, path, batches):
    """Return, by name, what corrects a merge on the path."""
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return {
            "data-free": lambda merged, alpha: reset_batch_norm(merged, path, alpha, merged, batches[0][:2]),
            "re-estimated": lambda merged, alpha: reestimated(merged, batches),
        }
    return {
        "RESCALE": lambda merged, alpha: repair(merged, path, alpha, merged, batches, mean=False),
        "REPAIR": lambda merged, alpha: repair(merged, path, alpha, merged, batches),
    }


def reestimated(merged, batches):
    merged.train()
    reestimate_batch_norm(merged, merged, batches)
    merged.eval()


def measure(name, model, reference, kind, seen, test, peers):
    """Return one row: what the alignment cost, and the barriers with each correction."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.save({"network": kind, "inputs": seen[0], "targets": seen[1]}, folder / "data.pt")
        torch.save(model.state_dict(), folder / "model.pt")
        torch.save(reference.state_dict(), folder / "reference.pt")
        found = by_process(name, folder, peers)
        moved = network(kind).eval()
        moved.load_state_dict(torch.load(folder / "moved.pt"))
    with torch.no_grad():
        found["change"] = float((moved(test[0][:BATCH]) - model(test[0][:BATCH])).abs().max())
    path = LinearPath(reference, moved)
    batches = list(seen[0].split(BATCH))
    data = list(zip(test[0].split(BATCH), test[1].split(BATCH), strict=True))
    for label, statistics in {"none": None, **own_statistics(model, path, batches)}.items():
        losses = loss_barrier(path, data, POINTS, statistics=statistics)
        found[label] = {
            "loss": losses.barrier,
            "accuracy": 100 * losses.accuracy_barrier,
            "midpoint": 100 * float(losses.accuracies[POINTS // 2]),
        }
    found["ends"] = [100 * float(losses.accuracies[k]) for k in (-1, 0)]
    return found


def kept_of(methods, name, label):
    """Return the accuracies at the midpoint over those of the networks as they were trained, which some peers change."""
    return [
        pair[label]["midpoint"] / mean(trained_pair["ends"])
        for pair, trained_pair in zip(methods[name], methods["identity"], strict=False)
    ]


def networks(kind, seeds, train, folder):
    """Yield trained networks, from the folder where they are there."""
    for seed in seeds:
        path = folder and folder / f"{kind.replace(' ', '_').replace(',', '')}_{seed}.pt"
        if path and path.exists():
            model = network(kind).eval()
            model.load_state_dict(torch.load(path))
        else:
            model = trained(kind, seed, *train)
            if path:
                torch.save(model.state_dict(), path)
        yield model


def table(methods):
    labels = [key for key, value in next(iter(methods.values()))[0].items() if isinstance(value, dict)]
    heads = [f"{what}, {label}" for label in labels for what in ("kept", "accuracy at 1/2", "loss barrier")]
    rows = ["| method | " + " | ".join(heads) + " | CPU s | MB |", "|---" + "|---:" * (len(heads) + 2) + "|"]
    for name, pairs in methods.items():
        cells = []
        for label in labels:
            kept = median(kept_of(methods, name, label))
            middle, loss = (median(pair[label][key] for pair in pairs) for key in ("midpoint", "loss"))
            cells += [f"**{kept:.3f}**" if kept >= 0.9 else f"{kept:.3f}", f"{middle:.1f}", f"{loss:.2f}"]
        cost = [
            f"{median(pair[key] for pair in pairs):.{digits}f}" for key, digits in (("seconds", 1), ("megabytes", 0))
        ]
        rows.append(f"| {name} | " + " | ".join([*cells, *cost]) + " |")
    return "\n".join(rows)


def changed(methods):
    """Return sentences on methods whose moved network does not compute what it did."""
    return [
        f"`{name}` changes what the network computes: moved, it has a test accuracy of {median(pair['ends'][1] for pair in pairs):.1f} % with "
        "its own statistics, so its barriers are not to be compared."
        for name, pairs in methods.items()
        if median(pair["change"] for pair in pairs) > 1e-2
    ]


def write(kept, command, path):
    parts = [
        "# Merges of convolutional networks, with and without statistics of their own",
        f"The first {CLASSES} classes of CIFAR-100 (an unofficial re-split: training and test pictures had been pooled, and were split "
        f"again), pictures "
        f"averaged to {SIDE} x {SIDE}, 5,000 to train on and 1,000 to test; {EPOCHS} epochs of SGD (`benchmarks/cifar_networks.py`). "
        f"Independent pairs, the "
        "first seed the reference. `kept` is the accuracy of the merge at alpha 1/2 over the mean of the two networks, on the test pictures; "
        "the loss barrier is "
        f"the largest excess at {POINTS - 2} points between the ends. Methods and statistics that need data get {SHOWN:,} training "
        f"pictures. CPU seconds of "
        "the whole call with one thread, tracing included; MB by which the process grew. Each method on each pair in a process of its own. "
        "Medians over "
        "the pairs. No setting was chosen on these pairs.",
        f"Made by `{command}`.",
    ]
    for kind, methods in kept.items():
        ends = [end for pair in methods["identity"] for end in pair["ends"]]
        accuracies = ", ".join(f"{end:.1f}" for end in ends)
        parts += [
            f"## {kind}",
            f"Pairs of seeds {PAIRS[kind]}; test accuracies of the ends, in order: {accuracies} %.",
            table(methods),
            *changed(methods),
        ]
    parts += ["## In a picture", "![accuracy kept](linear_mode_connectivity_cifar.png)"]
    path.write_text("\n\n".join(parts) + "\n")


def draw(kept, path):
    figure, axes = plt.subplots(
        1, len(kept), figsize=(6 * len(kept), 5), sharey=True, layout="constrained", squeeze=False
    )
    for one, (kind, methods) in zip(axes[0], kept.items(), strict=True):
        labels = [key for key, value in next(iter(methods.values()))[0].items() if isinstance(value, dict)]
        for k, label in enumerate(labels):
            values = [median(kept_of(methods, name, label)) for name in methods]
            places = [place + (k - (len(labels) - 1) / 2) * 0.25 for place in range(len(methods))]
            one.bar(places, values, 0.25, label="averaged statistics" if label == "none" else label)
        one.set_xticks(range(len(methods)), methods, rotation=35, ha="right")
        one.axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
        one.set_title(kind)
        one.legend(loc="upper left", fontsize=8, ncols=3)
    axes[0][0].set_ylabel("accuracy of the merge / of the networks")
    axes[0][0].set_ylim(0, 1.2)
    figure.savefig(path, dpi=110)


def run(options):
    train, test = (pictures(options.cifar, split) for split in ("train", "test"))
    # The file is in the order of the classes, and statistics of a batch need all of them.
    shown = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[:SHOWN]
    seen = tuple(part[shown] for part in train)
    path = options.output / "linear_mode_connectivity_cifar.md"
    record = path.with_suffix(".json")
    kept = json.loads(record.read_text()) if record.exists() else {}
    for kind in options.kinds.split(";"):
        every = [*METHODS, *(name for name in THEIRS if PEERS[name][0] in options.peers)]
        kept[kind] = {name: [] for name in every}
        for seeds in PAIRS[kind]:
            reference, model = networks(kind, seeds, train, options.networks)
            for name in every:
                found = measure(name, model, reference, kind, seen, test, options.peers)
                kept[kind][name].append(found)
                print(kind, seeds, name, found, flush=True)
            record.write_text(json.dumps(kept, indent=1) + "\n")
    command = "python benchmarks/linear_mode_connectivity.py --parts cifar --cifar FILE.npz"
    kept = {kind: kept[kind] for kind in NETWORKS if kind in kept}
    write(kept, command + "".join(f" --peer {name}=FOLDER" for name in options.peers), path)
    draw(kept, path.with_suffix(".png"))
