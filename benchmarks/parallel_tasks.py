"""How much time by the clock do tasks from fresh weights save that are trained at the same time?

Runs `lit-rebasin benchmark --merge.start fresh` on Rotated MNIST with `--parallel_tasks` 1 and N in turn, on one thread a process, checks that
accuracies agree, prints a table and writes docs/results/parallel_tasks.md. Run it with nothing beside it:

    python benchmarks/parallel_tasks.py --data_dir DIR
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
METHOD = "rebasin"


def run(options, at_once, folder):
    """Return the accuracy matrix of one run, and its seconds by the clock from first task to last merge."""
    subprocess.run(
        [
            *(sys.executable, "-m", "lit_rebasin", "benchmark"),
            *("--config", ROOT / "configs" / "rotated_mnist.yaml", "--methods", METHOD, "--seeds", "0"),
            *("--data_dir", options.data_dir, "--output_dir", folder, "--threads", "1"),
            *("--data.n_tasks", str(options.n_tasks), "--data.epochs_per_task", str(options.epochs)),
            *("--per_method.rebasin", json.dumps({"model.optimizer.lr": 0.003})),
            *("--merge.start", "fresh", "--parallel_tasks", str(at_once)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    numbers = json.loads((Path(folder) / "results.json").read_text())["methods"][METHOD]
    return numbers["accuracy_matrix"][0], numbers["seconds"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--n_tasks", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    matrices, seconds = [], {1: [], options.processes: []}
    for _ in range(options.turns):
        for at_once, found in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                matrix, spent = run(options, at_once, folder)
            matrices.append(matrix)
            found.append(spent)
            print(f"{at_once} at a time: {spent:.0f} s", flush=True)
    base = median(seconds[1])
    first, *others = (torch.tensor(matrix) for matrix in matrices)
    same = all((matrix - first).abs().max() < 1e-6 for matrix in others)  # an image more or less is 1e-4
    lines = ["| tasks at a time | seconds | of those in turn |", "|---:|---:|---:|"]
    lines += [f"| {at_once} | {median(found):.0f} | {median(found) / base:.2f} |" for at_once, found in seconds.items()]
    text = (
        "# Tasks trained at the same time\n\n"
        f"{options.n_tasks} tasks of Rotated MNIST as in `configs/rotated_mnist.yaml`, each from fresh weights, without "
        "distillation, trained in turn or in processes of their own and merged in order meanwhile; the start of the processes, "
        f"merges and evaluation included. One thread a process on {os.cpu_count()} cores, medians of {options.turns} turns, seconds by the "
        "clock.\n\n"
        f"Made by `python benchmarks/parallel_tasks.py --data_dir DIR --processes {options.processes} --n_tasks {options.n_tasks}`.\n\n"
        + "\n".join(lines)
        + f"\n\nThe accuracies of all tasks after every task are {'the same to the last image' if same else 'NOT the same'} in all runs.\n"
    )
    print(text)
    (RESULTS / "parallel_tasks.md").write_text(text)


if __name__ == "__main__":
    main()
