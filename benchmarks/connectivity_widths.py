"""The part of linear_mode_connectivity.py on MNIST: barriers of every method, and by width."""

import json
import tempfile
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("agg")
import torch
from connectivity_methods import OURS, PEERS, by_process, network
from matplotlib import pyplot as plt
from torch.nn.functional import cross_entropy
from torchvision.datasets import MNIST

from lit_rebasin import LinearPath, loss_barrier

PAIRS = ((0, 1), (2, 3), (4, 5))
EPOCHS, BATCH, SHOWN = 5, 500, 10_000
OURS_HERE = [name for name in OURS if name != "sinkhorn, midpoint, from activations"]
# At the widths of the figure alone, only these.
FIGURE = ("identity", "weights", "covariance", "activations", "sinkhorn, midpoint")


def images(data_dir, train):
    kept = MNIST(data_dir, train=train)
    return ((kept.data.float() / 255 - 0.1307) / 0.3081).flatten(1), kept.targets


def trained(width, seed, inputs, targets):
    torch.manual_seed(seed)
    model = network(width)
    return fitted(model, torch.optim.AdamW(model.parameters(), lr=1e-3), inputs, targets, EPOCHS, BATCH)


def fitted(model, optimizer, inputs, targets, epochs, batch):
    """Train a network for some epochs of shuffled batches."""
    for _ in range(epochs):
        for order in torch.randperm(len(inputs)).split(batch):
            optimizer.zero_grad()
            cross_entropy(model(inputs[order]), targets[order]).backward()
            optimizer.step()
    return model.eval()


def measure(name, model, reference, width, train, test, peers):
    """Return barriers on the test images, CPU seconds and memory of one method on one pair."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.save({"network": width, "inputs": train[0][:SHOWN], "targets": train[1][:SHOWN]}, folder / "data.pt")
        torch.save(model.state_dict(), folder / "model.pt")
        torch.save(reference.state_dict(), folder / "reference.pt")
        found = by_process(name, folder, peers)
        moved = network(width)
        moved.load_state_dict(torch.load(folder / "moved.pt"))
    losses = loss_barrier(LinearPath(reference, moved), [test])
    with torch.no_grad():
        change = float((moved(test[0][:500]) - model(test[0][:500])).abs().max())
    return {
        "loss": losses.barrier,
        "accuracy": 100 * losses.accuracy_barrier,
        "area": losses.area,
        "change": change,
        **found,
    }


def table(kept, width):
    rows = [
        "| method | loss barrier | accuracy barrier, points | area | CPU s | MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, pairs in kept[str(width)].items():
        cells = [median(pair[key] for pair in pairs) for key in ("loss", "accuracy", "area", "seconds", "megabytes")]
        low, high = (pick(pair["loss"] for pair in pairs) for pick in (min, max))
        rows.append(
            f"| {name} | {cells[0]:.4f} [{low:.4f}, {high:.4f}] | {cells[1]:.2f} | {cells[2]:.4f} | {cells[3]:.2f} | {cells[4]:.0f} |"
        )
    return "\n".join(rows)


def write(kept, command, path):
    widths = [width for width, methods in kept.items() if len(methods) > len(FIGURE)]
    parts = [
        "# Barriers between independently trained networks",
        f"MNIST, 784-w-w-w-10 with ReLU, {EPOCHS} epochs AdamW 1e-3, batch {BATCH}; pairs of seeds {', '.join(map(str, PAIRS))}, the "
        "first the reference. Loss barrier on the 10,000 test images at 21 points: the largest excess over the straight line between the "
        "ends, points between them only, so negative where every merge beats the line. Medians over the pairs, of the loss [least, "
        f"largest] too. Methods that need data get {SHOWN:,} training images, those that need labels with labels (sinkhorn-rebasin nine "
        "tenths of them, as in its examples). CPU seconds of the whole call with one thread, tracing included; MB by which the process "
        "grew. Each method on each pair in a process of its own, in which a first export and a first optimizer step of a small network "
        "come before the clock starts, as torch loads much at either (1.8 and 1.4 s). No setting was chosen on these pairs: ours were "
        "chosen on pairs of the seeds 10 to 15 at widths 32, 64 and 128.",
        f"Made by `{command}`.",
    ]
    for width in widths:
        parts += [f"## Width {width}", table(kept, width)]
    parts += ["## By width", "![barrier by width](linear_mode_connectivity.png)"]
    path.write_text("\n\n".join(parts) + "\n")


def draw(kept, path):
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    widths = sorted(map(int, kept))
    for name in FIGURE:
        values = [median(pair["loss"] for pair in kept[str(width)][name]) for width in widths]
        label = "not aligned" if name == "identity" else name
        axes.plot(widths, values, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_yscale("symlog", linthresh=0.01)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("width of the hidden layers")
    axes.set_ylabel("test loss barrier, median of 3 pairs")
    axes.set_title("Linear connectivity of MNIST networks after alignment")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def run(options):
    train, test = images(options.data_dir, train=True), images(options.data_dir, train=False)
    path = options.output / "linear_mode_connectivity.md"
    kept = {}
    full, more = ([int(w) for w in words.split(",") if w] for words in (options.widths, options.figure_widths))
    for width in [*full, *more]:
        every = [*OURS_HERE, *(name for name in PEERS if PEERS[name][0] in options.peers)] if width in full else FIGURE
        kept[str(width)] = {name: [] for name in every}
        for seeds in PAIRS:
            reference, model = (trained(width, seed, *train) for seed in seeds)
            for name in every:
                found = measure(name, model, reference, width, train, test, options.peers)
                kept[str(width)][name].append(found)
                print(width, seeds, name, {key: round(value, 4) for key, value in found.items()}, flush=True)
            path.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    command = "python benchmarks/linear_mode_connectivity.py --parts widths --data_dir DIR"
    command += "".join(f" --peer {name}=FOLDER" for name in options.peers)
    write(kept, command, path)
    draw(kept, path.with_suffix(".png"))
