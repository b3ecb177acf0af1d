"""What does a monitor cost? The share of an epoch of rotated_mnist.yaml that each spends, at its default interval.

Every monitor has a run of its own, of the network, stream, batches and merges of that file. By Lightning's own profiler: seconds in the hooks
of the monitor over the seconds of the training epochs without them, and without merges and validation, both of one run on one thread.

    python benchmarks/monitor_overhead.py --data_dir DIR
"""

import argparse
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from avalanche.models import SimpleMLP
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler

from lit_rebasin import (
    ConnectivityMonitor,
    ContinualClassifier,
    ContinualDataModule,
    ContinualMonitor,
    FeatureLearningMonitor,
    GeodesicMonitor,
    RandomShift,
    RebasinMerge,
    SharpnessMonitor,
)

MONITORS = [GeodesicMonitor, ConnectivityMonitor, SharpnessMonitor, FeatureLearningMonitor]
EPOCHS = 5


def run(kind, start, options):
    """Train with one monitor; return its seconds, those of the epochs without it, and how often it measured."""
    pl.seed_everything(0, verbose=False)
    data = ContinualDataModule(
        "rotated-mnist",
        data_dir=options.data_dir,
        n_tasks=20,
        epochs_per_task=EPOCHS,
        batch_size=500,
        replay_per_class=5,
        replay_transform=RandomShift(1),
    )
    network = SimpleMLP(num_classes=10, input_size=784, hidden_size=256, drop_rate=0)
    model = ContinualClassifier(network, optimizer=lambda p: torch.optim.AdamW(p, lr=0.003), distillation=2.0)
    monitor = kind()
    with TemporaryDirectory() as folder:
        profiler = SimpleProfiler(dirpath=folder, filename="profile")
        trainer = pl.Trainer(
            max_epochs=EPOCHS * options.tasks,
            reload_dataloaders_every_n_epochs=1,
            check_val_every_n_epoch=EPOCHS,
            accelerator="cpu",
            callbacks=[monitor, RebasinMerge(alpha=0.5, start=start), ContinualMonitor()],
            logger=TensorBoardLogger(folder),
            profiler=profiler,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, datamodule=data)
    spent = {name: sum(seconds) for name, seconds in profiler.recorded_durations.items()}
    own = sum(seconds for name, seconds in spent.items() if name.startswith(f"[Callback]{kind.__name__}"))
    # Merges, validation and new loaders come with each task, not with each epoch.
    others = ("[Callback]RebasinMerge", "[Callback]ContinualMonitor", "[_EvaluationLoop]", "[LightningDataModule]")
    besides = sum(seconds for name, seconds in spent.items() if name.startswith(others) or "validation" in name)
    return own, spent["run_training_epoch"] - own - besides, len(monitor.history)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--output", default="docs/results/monitor_overhead.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = [
        "# What monitors cost",
        "",
        f"`rotated_mnist.yaml`, its first {options.tasks} tasks of {EPOCHS} epochs, each monitor by itself at its default interval, with a",
        "TensorBoard log: seconds in its hooks over those of the training epochs without them, and without merges and validation, on one",
        "thread of a server CPU. Tasks begin at the previous network, or with fresh weights, where neurons move and `ConnectivityMonitor`",
        "draws a plane, too.",
        "",
        f"Made by `python benchmarks/monitor_overhead.py --data_dir DIR --tasks {options.tasks}` with torch {torch.__version__}.",
        "",
        "| monitor | start | measurements | seconds each | seconds an epoch | share of an epoch % |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for kind in MONITORS:
        for start in ("previous", "fresh"):
            own, rest, count = run(kind, start, options)
            epochs = EPOCHS * options.tasks
            lines.append(
                f"| `{kind.__name__}` | {start} | {count} | {own / count:.2f} | {rest / epochs:.1f} | {100 * own / rest:.1f} |"
            )
            print(lines[-1], flush=True)
    Path(options.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
