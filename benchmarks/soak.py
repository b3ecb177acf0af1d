"""Does a long stream need more and more memory? 200 tiny tasks in one fit.

Trains a small network on 200 tasks of rotated digits, with replay, merges and checkpoints: once with a monitor and a TensorBoard
logger, once without. Reads the resident memory, what of the heap is in use (Linux with glibc) and the open files of the process
after every task, fits their slopes from the tenth task on and in the second half, and writes docs/results/soak.md. Lightning's
progress bar is off, as in `lit-rebasin benchmark`: it keeps a line for every loader of every validation, and there is one a task. Run:

    python benchmarks/soak.py
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
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

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "soak.md"
SETTLED = 10  # tasks after which memory should be flat
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


class Heap(ctypes.Structure):
    """What glibc's ``mallinfo2`` says, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def in_use():
    """Return the MiB of the heap that are in use, and not only kept for later."""
    said = ctypes.CDLL("libc.so.6").mallinfo2
    said.restype = Heap
    heap = said()
    return (heap.uordblks + heap.hblkhd) / 2**20


class Usage(pl.Callback):
    """Reads memory in MiB, what is in use of the heap, open files and what the run must hold for itself, after every task."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, module):
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        files = sum(1 for _ in Path("/proc/self/fd").iterdir())
        self.rows.append((resident, in_use(), files, self._held(trainer.datamodule)))

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


def slope(values, first):
    """Return how much a number grows a task, from a task on."""
    return float(np.polyfit(np.arange(first, len(values)), values[first:], 1)[0])


def rows_of(n_tasks, bare):
    """Return what a run in a process of its own has used."""
    command = [sys.executable, __file__, "--tasks", str(n_tasks), "--child", "bare" if bare else "watched"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def table(runs):
    lines = [
        "| | after 10 tasks | half-way | at the end | slope a task | in the second half |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for title, rows in runs.items():
        half = len(rows) // 2
        for name, values, digits in zip(
            ("memory, MiB", "heap in use, MiB", "open files", "kept examples, MiB"), rows.T, (0, 1, 0, 3), strict=True
        ):
            shown = " | ".join(f"{values[index]:.{digits}f}" for index in (SETTLED, half, -1))
            lines.append(f"| {title}: {name} | {shown} | {slope(values, SETTLED):.3f} | {slope(values, half):.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--child", choices=("bare", "watched"))
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        with tempfile.TemporaryDirectory() as folder:
            rows = run(options.tasks, Path(folder), options.child == "bare")
        print(json.dumps(rows.tolist()))
        return
    runs = {
        "with TensorBoard and a monitor": rows_of(options.tasks, bare=False),
        "without": rows_of(options.tasks, bare=True),
    }
    text = (
        "# A long stream\n\n"
        f"{options.tasks} tasks of rotated digits in one fit: replay, a merge and a checkpoint after each; resident memory of the process "
        "after a garbage collection. The accuracy matrix, the history and the replay grow with the tasks, as they must, and torch keeps the "
        "source of every graph that is traced (`torch.fx`, about 8 KiB a task here, 65 KiB for ResNet-18). The pictures for TensorBoard, "
        "which show all tasks so far, leave next to nothing in use, but the allocator keeps more and more pieces that are free.\n\n"
        f"Made by `python benchmarks/soak.py --tasks {options.tasks}`.\n\n{table(runs)}\n"
    )
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
