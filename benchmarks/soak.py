r"""Does a long stream need more and more memory? 200 tiny tasks in one fit.

Trains a small network on 200 tasks of rotated digits, with replay, merges and checkpoints, and with a monitor and a TensorBoard logger unless
--bare; reads the resident memory and the open files of the process after every task, and prints the slopes from the tenth task on. Run:

    python benchmarks/soak.py
    python benchmarks/soak.py --bare
"""

import argparse
import gc
import os
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lit_rebasin import (
    ContinualClassifier,
    ContinualDataModule,
    ContinualMonitor,
    FeatureLearningMonitor,
    RandomStates,
    RebasinMerge,
)

SETTLED = 10  # tasks after which memory should be flat
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


class Usage(pl.Callback):
    """Reads memory in MiB, open files and what the run must hold for itself, after every task."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, module):
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        self.rows.append((resident, sum(1 for _ in Path("/proc/self/fd").iterdir()), self._held(trainer.datamodule)))

    def _held(self, data):
        """Return the MiB of the kept examples, which grow with the tasks."""
        return sum(part.nbytes for kept in data._replay.values() for part in kept) / 2**20


def run(n_tasks, folder, bare):
    """Train the stream; return the rows of usage."""
    pl.seed_everything(0, verbose=False)
    usage = Usage()
    data = ContinualDataModule("rotated-digits", n_tasks=n_tasks, epochs_per_task=1, batch_size=256, replay_per_class=1)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    callbacks = [
        *([] if bare else [FeatureLearningMonitor()]),
        RebasinMerge(alpha=0.5),
        ContinualMonitor(),
        RandomStates(),
        usage,
    ]
    trainer = pl.Trainer(
        max_epochs=n_tasks,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[*callbacks, ModelCheckpoint(folder / "checkpoints", save_last=True)],
        logger=False if bare else TensorBoardLogger(folder),
        num_sanity_val_steps=0,
        accelerator="cpu",
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(ContinualClassifier(backbone), datamodule=data)
    return np.array(usage.rows)


def slope(values):
    """Return how much a number grows a task, from the tenth on."""
    tasks = np.arange(SETTLED, len(values))
    return float(np.polyfit(tasks, values[SETTLED:], 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--bare", action="store_true", help="without a logger and a monitor")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options.tasks, Path(folder), options.bare)
    memory, files, held = rows.T
    lines = [
        "| | after 10 tasks | at the end | slope a task |",
        "|---|---:|---:|---:|",
        f"| resident memory, MiB | {memory[SETTLED]:.0f} | {memory[-1]:.0f} | {slope(memory):.3f} |",
        f"| kept examples, MiB | {held[SETTLED]:.3f} | {held[-1]:.3f} | {slope(held):.4f} |",
        f"| open files | {files[SETTLED]:.0f} | {files[-1]:.0f} | {slope(files):.3f} |",
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
