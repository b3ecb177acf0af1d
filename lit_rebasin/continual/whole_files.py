"""Files that are complete or not there at all, whenever the process ends."""

import os
from collections.abc import Callable
from contextlib import suppress
from os import fspath
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lit_rebasin.merging.checkpoint_file import read_torch


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
        return read_torch(fspath(path))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)  # noqa: PTH105, which has no name for an atomic replace
        with suppress(OSError):  # there are file systems whose folders cannot be opened
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
