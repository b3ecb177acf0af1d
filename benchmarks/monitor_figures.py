"""The figures of the pages on monitors.

From a run on rotated digits in which every task begins with fresh weights, and from two networks that learn the first task. Takes a minute:

python benchmarks/monitor_figures.py
"""

import argparse
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from avalanche.models import SimpleMLP
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from lit_rebasin import (
    ConnectivityMonitor,
    ContinualClassifier,
    ContinualDataModule,
    FeatureLearningMonitor,
    GeodesicMonitor,
    RebasinMerge,
    SharpnessMonitor,
)

TASKS, EPOCHS = 5, 10


def run(folder, monitors, tasks, seed):
    """Train with some monitors, and return the module."""
    pl.seed_everything(seed, verbose=False)
    data = ContinualDataModule("rotated-digits", n_tasks=tasks, epochs_per_task=EPOCHS, replay_per_class=5)
    module = ContinualClassifier(
        SimpleMLP(num_classes=10, input_size=64, hidden_size=128, hidden_layers=4, drop_rate=0)
    )
    trainer = pl.Trainer(
        max_epochs=tasks * EPOCHS,
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=EPOCHS,
        accelerator="cpu",
        callbacks=[*monitors, RebasinMerge(alpha=0.5, start="fresh")],
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module


def sharpness_figure(history):
    """Draw the largest eigenvalue and the trace over the epochs, with the tasks marked."""
    figure = Figure(figsize=(6.4, 3), layout="constrained")
    for axes, key, color in zip(figure.subplots(1, 2), ("eigenvalue", "trace"), ("#0072B2", "#D55E00"), strict=True):
        epochs = [entry["epoch"] + 1 for entry in history]
        axes.plot(epochs, [entry[f"sharpness/{key}"] for entry in history], color=color, marker="o", markersize=2.5)
        for task in range(1, TASKS):
            axes.axvline(task * EPOCHS + 0.5, color="0.8", linewidth=1, zorder=0)
        axes.set(xlabel="epoch", title={"eigenvalue": "largest eigenvalue", "trace": "trace"}[key], yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    parser.add_argument("--logs", default="runs/monitor_figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    monitors = [GeodesicMonitor(), SharpnessMonitor(), FeatureLearningMonitor()]
    run(options.logs, monitors, TASKS, seed=0)
    twin = ConnectivityMonitor(reference=run(options.logs, [], 1, seed=1))
    run(options.logs, [twin], 1, seed=2)
    figures = {tag: draw() for monitor in (*monitors, twin) for tag, draw in monitor._figures().items()}
    figures["sharpness"] = sharpness_figure(monitors[1].history)
    for tag, figure in figures.items():
        figure.savefig(options.output / f"{tag.replace('/', '_')}.png", dpi=110)
    print({key: round(value, 3) for key, value in twin.history[-1].items()})


if __name__ == "__main__":
    main()
