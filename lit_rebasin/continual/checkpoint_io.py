"""Checkpoints of Lightning that are complete or not there at all."""

from os import fspath
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from typing_extensions import override

from lit_rebasin.merging.checkpoint_file import read_torch
from lit_rebasin.merging.whole_files import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints for Lightning that are never half-written, and never run code.

    Lightning writes a checkpoint elsewhere and moves it, which between two file systems is a copy: a process that is killed meanwhile leaves
    half of it. Here it is written beside its place, flushed to the disk, and renamed.

    Example::

        trainer = Trainer(plugins=[WholeCheckpointIO()])
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint whole; one with a remote path as Lightning does."""
        if "://" in fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint that holds tensors and plain types.

        Raises:
            CheckpointError: If it cannot be read so; the message names the file and what to do.
        """
        place = fspath(path)
        if "://" not in place:
            return read_torch(place)
        with get_filesystem(place).open(place, "rb") as file:
            return read_torch(place, file)
