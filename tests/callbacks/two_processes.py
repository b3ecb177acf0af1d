"""Streams in one process or two, a script: ``python -m tests.callbacks.two_processes FOLDER CASE DEVICES``; see ``CASES``.

Every process writes its weights, and the histories of its callbacks.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lit_rebasin.callbacks.merge
from lit_rebasin import ContinualClassifier, ContinualDataModule, ContinualMonitor, RebasinMerge

from .monitored import MONITORS, Plain, X, Y


class Validated(Plain):
    def validation_step(self, batch, batch_idx):
        pass


class Given(pl.Callback):
    """Puts weights of its own in the place of those that were trained, before they are merged."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.is_last_batch:
            draw = torch.Generator().manual_seed(trainer.current_epoch)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) / len(parameter))


def trainer(folder, devices, *callbacks, **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def tasks(folder, devices, monitors=(), alpha="line-search"):
    """A fit for each of two tasks."""
    module, merge = Validated(), RebasinMerge(alpha)
    for task in range(2):
        loaders = [DataLoader(TensorDataset(x + task, Y), batch_size=10) for x in (X, X.flip(0))]
        fitted = trainer(folder, devices, *monitors, merge, max_epochs=2)
        fitted.fit(module, *loaders)
    return fitted, module, [*monitors, merge]


def monitored(folder, devices):
    return tasks(folder, devices, [kind() for kind in MONITORS])


def stream(folder, devices, *callbacks, **options):
    """One fit over a stream, with as many examples a step whatever the number of processes."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    data = ContinualDataModule(
        "rotated-digits", n_tasks=3, epochs_per_task=3, batch_size=96 // devices, replay_per_class=3
    )
    merge, monitor = RebasinMerge(alpha=0.5, start="fresh"), ContinualMonitor()
    options |= {"max_epochs": 9, "reload_dataloaders_every_n_epochs": 1, "check_val_every_n_epoch": 3}
    module, fitted = ContinualClassifier(backbone), trainer(folder, devices, *callbacks, merge, monitor, **options)
    fitted.fit(module, datamodule=data)
    return fitted, module, [merge, monitor]


def given(folder, devices):
    return stream(folder, devices, Given())


def fisher(folder, devices):
    return tasks(folder, devices, alpha="fisher")


def faulty(folder, devices):
    """The alignment ends in an error in the process that does it."""

    def find(*args, **kwargs):
        raise TypeError("a fault of the method")

    lit_rebasin.callbacks.merge.find = find
    return tasks(folder, devices)


def refused(folder, devices):
    """The alignment runs out of memory in the process that does it."""

    def find(*args, **kwargs):
        raise MemoryError

    lit_rebasin.callbacks.merge.find = find
    return tasks(folder, devices)


CASES = {one.__name__: one for one in (tasks, monitored, stream, given, refused, fisher, faulty)}


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return call


def main(folder, case, devices):
    calls = []
    lit_rebasin.callbacks.merge.find = counted(lit_rebasin.callbacks.merge.find, calls)
    fitted, module, callbacks = CASES[case](folder, devices)
    found = {"alignments": len(calls)} | {
        type(one).__name__: getattr(one, "history", None) or one.rows for one in callbacks
    }
    torch.save(module.state_dict(), folder / f"weights_{fitted.global_rank}.pt")
    (folder / f"found_{fitted.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
