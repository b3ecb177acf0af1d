"""A stream of two tasks in two processes, a script: ``python -m tests.callbacks.two_processes FOLDER MONITORS``."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import RebasinMerge

from .monitored import MONITORS, Plain, X, Y


class Validated(Plain):
    def validation_step(self, batch, batch_idx):
        pass


def main(folder, watched):
    """Train each task in a fit; every process writes its weights and what its monitors have measured."""
    monitors = [kind() for kind in MONITORS] if watched == "monitors" else []
    module, merge = Validated(), RebasinMerge(alpha=0.5)
    for task in range(2):
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            callbacks=[*monitors, merge],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        loaders = [DataLoader(TensorDataset(x + task, Y), batch_size=10) for x in (X, X.flip(0))]
        trainer.fit(module, *loaders)
    torch.save(module.state_dict(), folder / f"weights_{trainer.global_rank}.pt")
    histories = {type(monitor).__name__: monitor.history for monitor in monitors}
    (folder / f"histories_{trainer.global_rank}.json").write_text(json.dumps(histories))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
