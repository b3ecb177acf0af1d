r"""What does an alignment cost, in time and memory, as networks grow wider and deeper?

MLPs of 64 to 2048 neurons in three hidden layers, and of 2 to 32 hidden layers of 256: two random ones each, aligned by three
methods. Every measurement is a process of its own with one thread; its CPU seconds stand beside those of a training step of the
same network in the same process, its memory is what the alignment adds at its highest. Fits powers to the seconds, and writes
docs/results/alignment_cost.md and .png. Run:

    python benchmarks/alignment_cost.py
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

from lit_rebasin import align, permutation_spec

RESULTS = Path(__file__).parents[1] / "docs" / "results"
WIDTHS, DEPTHS = (64, 128, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)
METHODS = ("weights", "covariance", "sinkhorn")
WIDEST = {"covariance": 1024, "sinkhorn": 1024}  # wider ones take many minutes
BATCH, EXAMPLES = 128, 512


def mlp(width, depth):
    layers = [nn.Linear(784, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train_step(network, x):
    """Return the CPU seconds of a forward and a backward pass on a batch, the median of three."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        cross_entropy(network(x), torch.zeros(len(x), dtype=torch.long)).backward()
        seconds.append(time.process_time() - started)
        network.zero_grad(set_to_none=True)
    return median(seconds)


def memory(field):
    """Return a figure of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def measured(name, method):
    """Return what one alignment costs, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    (model, reference), x = [mlp(*map(int, name.split()[1:])).eval() for _ in range(2)], torch.randn(1, 784)
    step = train_step(model, torch.randn(BATCH, 784))
    started = time.process_time()
    spec = permutation_spec(reference, x)
    tracing = time.process_time() - started
    needs = {"data": [torch.randn(EXAMPLES, 784)]} if method == "covariance" else {}
    align(mlp(8, 2), mlp(8, 2), spec=permutation_spec(mlp(8, 2), torch.randn(1, 784)))  # loads what it needs
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far begins anew
    before, started = memory("VmRSS"), time.process_time()
    alignment = align(model, reference, method=method, spec=spec, **needs)
    return {
        "seconds": time.process_time() - started,
        "tracing": tracing,
        "step": step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": memory("VmHWM") - before,
        "sweeps": len(alignment.history),
        "neurons": sum(group.size for group in spec.groups.values()),
    }


def power(sizes, values):
    """Return the exponent of a power law, by least squares of the logarithms over the upper half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def cases():
    widths = [(f"mlp {width} 3", m) for m in METHODS for width in WIDTHS if width <= WIDEST.get(m, math.inf)]
    depths = [(f"mlp 256 {depth}", method) for method in METHODS for depth in DEPTHS]
    return list(dict.fromkeys([*widths, *depths]))


def collected(repeats):
    found = {}
    for name, method in cases():
        rows = []
        for _ in range(repeats):
            command = [sys.executable, __file__, "--case", name, "--method", method]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}, {method}: {done.stderr.strip()[-600:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        found[name, method] = {key: median(row[key] for row in rows) for key in rows[0]}
        print(name, method, found[name, method], flush=True)
    return found


def series(found, method, names):
    """Return sizes and figures of the cases of a sweep that were measured."""
    known = [(size, found[name, method]) for size, name in names.items() if (name, method) in found]
    return [size for size, _ in known], [row for _, row in known]


def picture(found, sweeps):
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2), sweeps.items(), strict=True):
        for method, color, marker in zip(METHODS, ("#0072b2", "#d55e00", "#009e73"), "os^", strict=True):
            sizes, rows = series(found, method, names)
            axes.plot(sizes, [row["seconds"] for row in rows], color=color, marker=marker, label=method)
        sizes, rows = series(found, METHODS[0], names)
        axes.plot(
            sizes, [row["step"] for row in rows], color="0.6", linestyle="--", label=f"one training step of {BATCH}"
        )
        axes.set(xscale="log", yscale="log", xlabel=title, ylabel="CPU seconds")
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "alignment_cost.png", dpi=150)


def table(found, sweeps):
    lines = [
        "| network | method | parameters | CPU seconds | in training steps | sweeps | MiB | bytes a parameter |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, method), row in found.items():
        lines.append(
            f"| {name} | {method} | {row['parameters'] / 1e6:.2f} M | {row['seconds']:.2f} | {row['seconds'] / row['step']:.1f} | "
            f"{row['sweeps']:.0f} | {row['bytes'] / 2**20:.0f} | {row['bytes'] / row['parameters']:.1f} |"
        )
    lines += ["", "| method | seconds grow with | exponent | of a training step |", "|---|---|---:|---:|"]
    for title, names in sweeps.items():
        for method in METHODS:
            sizes, rows = series(found, method, names)
            powers = [power(sizes, [row[key] for row in rows]) for key in ("seconds", "step")]
            lines.append(f"| {method} | {title} | {powers[0]:.2f} | {powers[1]:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case")
    parser.add_argument("--method")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(options.case, options.method)))
        return
    found = collected(options.repeats)
    sweeps = {
        "width, of three hidden layers": {width: f"mlp {width} 3" for width in WIDTHS},
        "hidden layers, of width 256": {depth: f"mlp 256 {depth}" for depth in DEPTHS},
    }
    picture(found, sweeps)
    text = (
        "# What an alignment costs\n\n"
        "Two random networks each: `mlp W D` has D hidden layers of W neurons on 784 inputs. "
        f"`covariance` reads {EXAMPLES} examples, `sinkhorn` takes 100 steps on the L2 cost. One thread, a process each, "
        f"medians of {options.repeats}. A training step is a forward and a backward pass of {BATCH} examples "
        "of them. Tracing of the symmetries is apart. "
        "Memory is what the alignment adds at its highest to the two networks. Exponents are fitted to the logarithms "
        "over the upper half of the sizes.\n\n"
        f"Made by `python benchmarks/alignment_cost.py --repeats {options.repeats}`.\n\n"
        f"{table(found, sweeps)}\n\n![seconds](alignment_cost.png)\n"
    )
    print(text)
    (RESULTS / "alignment_cost.md").write_text(text)


if __name__ == "__main__":
    main()
