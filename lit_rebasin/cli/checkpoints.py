"""Checkpoints on the command line: opened, loaded into a network, and written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.merging.checkpoint_file import (
    SAFETENSORS,
    Checkpoint,
    CheckpointError,
    matching_weights,
    read_checkpoint,
)
from lit_rebasin.merging.whole_files import write_whole

SUFFIXES = (SAFETENSORS, ".pt", ".pth", ".ckpt")


def open_checkpoint(file: str) -> Checkpoint:
    """Read a file that the command line names; a `UsageError` if it is no checkpoint."""
    with _wrong_usage():
        return read_checkpoint(file)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Any]:
    """Load weights into a network, under whatever prefix its names are in the file.

    Returns:
        The weights as the file has them, by the network's names.

    Raises:
        UsageError: If a name or a shape does not fit; the network is then what it was.
    """
    holder, name = f"checkpoint {checkpoint.file}", type(model).__name__
    with _wrong_usage():
        weights = matching_weights(model.state_dict(), checkpoint.weights, holder, name)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"{holder} does not hold the weights of {name}: {error}") from None
    return weights


@contextmanager
def _wrong_usage() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise UsageError(str(error)) from None


def write_checkpoint(path: Path, weights: Mapping[str, Any]) -> None:
    """Write weights in the format of the suffix, whole or not at all: safetensors, or a plain state dict that ``torch.load`` reads.

    Raises:
        ValueError: If the state dict holds something other than tensors, which safetensors cannot take.
    """
    if path.suffix != SAFETENSORS:
        write_whole(path, lambda temporary: torch.save(dict(weights), temporary))
        return
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name!r} is a {type(tensor).__name__}, and safetensors holds tensors only; write a .pt file"
            )
    # The format knows no tensors that share memory: tied weights are written twice.
    own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    write_whole(path, lambda temporary: _save_safetensors(own, temporary))


def _save_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(weights, path)
    except safetensors.SafetensorError as error:  # which is no OSError
        raise OSError(str(error)) from None
