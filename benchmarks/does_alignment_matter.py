"""Does the alignment help, or only the averaging?

Rotated digits, where each task starts from the merged model of the tasks before, or from fresh weights. Prints one table and writes it to
docs/results/alignment.md. Run: python benchmarks/does_alignment_matter.py
"""

import logging
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from lit_rebasin import ContinualClassifier, ContinualDataModule, ContinualMonitor, RebasinMerge
from lit_rebasin.metrics import average_accuracy, forgetting

SEEDS = (0, 1, 2)
STARTS = {"previous": "merged model", "fresh": "fresh weights"}
MERGES = {
    "no merge (replay only)": {"method": "identity", "alpha": 0.0, "statistics": "none"},
    "average": {"method": "identity"},
    "weight matching": {"method": "weights"},
    "weight matching, alpha by Fisher": {"method": "weights", "alpha": "fisher"},
    "weight matching, then REPAIR": {"method": "weights", "statistics": "repair"},
    "Frank-Wolfe": {"method": "frank-wolfe"},
    "covariance": {"method": "covariance"},
    "activations": {"method": "activations"},
    "straight-through, midpoint": {"method": "straight-through", "cost": "midpoint"},
    "Sinkhorn, midpoint": {"method": "sinkhorn", "cost": "midpoint"},
    "Sinkhorn, incremental cost": {"method": "sinkhorn", "options": {"residual_learning_rate": 0.0}},
    "Sinkhorn, incremental cost and residual": {"method": "sinkhorn"},
}
N_TASKS, EPOCHS, ALPHA = 20, 10, 0.5


def run(options, start, seed):
    pl.seed_everything(seed, verbose=False)
    data = ContinualDataModule(
        "rotated-digits", n_tasks=N_TASKS, epochs_per_task=EPOCHS, batch_size=64, replay_per_class=1, seed=seed
    )
    model = ContinualClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    merge, monitor = RebasinMerge(**{"alpha": ALPHA, "seed": seed, "start": start, **options}), ContinualMonitor()
    trainer = pl.Trainer(
        max_epochs=N_TASKS * EPOCHS,
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=EPOCHS,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[merge, monitor],
    )
    trainer.fit(model, datamodule=data)
    moved = mean(entry["moved"] for entry in merge.history)
    return average_accuracy(monitor.matrix), forgetting(monitor.matrix), moved


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = [
        "| start of each task | merge | average accuracy % | forgetting % | neurons moved of 128 |",
        "|---|---|---:|---:|---:|",
    ]
    cases = [(start, name) for start in STARTS for name in MERGES]
    for start, name in track(cases, "aligning", console=Console(stderr=True)):
        found = list(zip(*[run(MERGES[name], start, seed) for seed in SEEDS], strict=True))
        cells = [f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}" for values in found[:2]]
        lines.append(f"| {STARTS[start]} | {name} | {cells[0]} | {cells[1]} | {mean(found[2]):.0f} |")
    table = "\n".join(lines)
    print(table, file=sys.stdout)
    about = (
        "# Does the alignment help, or only the averaging?\n\n"
        f"Rotated digits, {N_TASKS} tasks, {EPOCHS} epochs a task, 1 example a class a task replayed, MLP 64-128-10, alpha {ALPHA}, mean and "
        f"standard deviation over seeds {', '.join(map(str, SEEDS))}. Made by `python benchmarks/does_alignment_matter.py`.\n\n"
    )
    Path(__file__).parents[1].joinpath("docs/results/alignment.md").write_text(about + table + "\n")


if __name__ == "__main__":
    main()
