"""The network that another is compared with, however it is given."""

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lit_rebasin.merging.checkpoint_file import CheckpointError, matching_weights, read_checkpoint
from lit_rebasin.merging.path import weights_of

Reference = nn.Module | Mapping[str, Tensor] | str | PathLike[str]


def held_weights(reference: Reference) -> dict[str, Any]:
    """Return copies of the tensors of a network on the CPU: of a module, a state dict, or a checkpoint's file.

    Raises:
        CheckpointError: If a file is none that can be read without running code.
        TypeError: If it is something else.
    """
    if isinstance(reference, (str, PathLike)):
        given: Mapping[str, Any] = read_checkpoint(fspath(reference)).weights
    elif isinstance(reference, nn.Module):
        given = {**reference.state_dict(), **weights_of(reference)}
    elif isinstance(reference, Mapping):
        given = reference
    else:
        raise TypeError(
            f"reference must be a module, its state dict or the path of a checkpoint, got a {type(reference).__name__}."
        )
    return {name: v.detach().cpu().clone() if isinstance(v, Tensor) else v for name, v in given.items()}


def as_weights_of(module: "pl.LightningModule", held: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what is held by the names of a module's parameters and buffers; buffers that no state dict has are the module's.

    Names may lack a prefix that all of the module's have, or have one that the module's lack.

    Raises:
        CheckpointError: If a name or a shape does not fit, or a weight is NaN.
    """
    name = type(module).__name__
    own = module.state_dict()
    try:
        found = matching_weights(own, held, "reference", name)
    except CheckpointError:
        prefix = _common_prefix(own)
        inner = {key.removeprefix(prefix): value for key, value in own.items()}
        if not prefix or next(iter(inner)) not in held:
            raise
        found = {prefix + key: value for key, value in matching_weights(inner, held, "reference", name).items()}
    weights = {key: found.get(key, tensor).to(tensor.dtype) for key, tensor in weights_of(module).items()}
    for key, tensor in weights.items():
        if tensor.isnan().any():
            raise CheckpointError(f"reference holds NaN in {key!r}: nothing is connected with it")
    return weights


def _common_prefix(names: Mapping[str, Any]) -> str:
    """Return what stands before all names, up to a dot."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(f"{level[0]}.")
    return "".join(common)
