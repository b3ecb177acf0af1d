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
MERGES = {
    "no merge (replay only)": None,
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


class FreshStart(pl.Callback):
    """Give the network new initial weights at the start of every later task."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch % EPOCHS == 0 and trainer.current_epoch > 0:
            with torch.random.fork_rng():
                torch.manual_seed(1000 + trainer.current_epoch)
                for layer in pl_module.modules():
                    if isinstance(layer, nn.Linear):
                        layer.reset_parameters()


def run(options, fresh, seed):
    pl.seed_everything(seed, verbose=False)
    data = ContinualDataModule(
        "rotated-digits", n_tasks=N_TASKS, epochs_per_task=EPOCHS, batch_size=64, replay_per_class=1, seed=seed
    )
    model = ContinualClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    monitor = ContinualMonitor()
    merges = [] if options is None else [RebasinMerge(**{"alpha": ALPHA, "seed": seed, **options})]
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
        callbacks=[*([FreshStart()] if fresh else []), *merges, monitor],
    )
    trainer.fit(model, datamodule=data)
    moved = mean(entry["moved"] for entry in merges[0].history) if merges else 0.0
    return average_accuracy(monitor.matrix), forgetting(monitor.matrix), moved


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = [
        "| start of each task | merge | average accuracy % | forgetting % | neurons moved of 128 |",
        "|---|---|---:|---:|---:|",
    ]
    cases = [(fresh, name) for fresh in (False, True) for name in MERGES]
    for fresh, name in track(cases, "aligning", console=Console(stderr=True)):
        found = list(zip(*[run(MERGES[name], fresh, seed) for seed in SEEDS], strict=True))
        cells = [f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}" for values in found[:2]]
        lines.append(
            f"| {'fresh weights' if fresh else 'merged model'} | {name} | {cells[0]} | {cells[1]} | {mean(found[2]):.0f} |"
        )
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
