"""Checkpoints of several formats: read, and their tensors found by the names of a network."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

SAFETENSORS = ".safetensors"

# Where checkpoints keep their weights.
_WEIGHTS = ("state_dict", "model", "model_state_dict")


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not one of the network."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        file: Its path.
        weights: Tensors by name, as they are called in the file.
        arguments: Constructor arguments that a LightningModule saved.
    """

    file: str
    weights: Mapping[str, Any]
    arguments: dict[str, Any]


def read_checkpoint(file: str) -> Checkpoint:
    """Read a state dict, a Lightning checkpoint or a safetensors file; no code in it is ever run.

    Raises:
        CheckpointError: If there is no such file, or it holds something else.
    """
    held = _read_safetensors(file) if Path(file).suffix == SAFETENSORS else read_torch(file)
    weights = next((held[key] for key in _WEIGHTS if isinstance(held.get(key), Mapping)), held)
    saved = held.get("hyper_parameters")
    arguments = saved.items() if isinstance(saved, Mapping) else ()
    simple = (bool, int, float, str, list, dict, type(None))
    return Checkpoint(
        file,
        weights,
        # LightningCLI notes here how it made the module, under a name with an underscore.
        {name: value for name, value in arguments if isinstance(value, simple) and not str(name).startswith("_")},
    )


def matching_weights(own: Mapping[str, Any], held: Mapping[str, Any], holder: str, network: str) -> dict[str, Any]:
    """Return weights by the names of a network, under the one prefix, such as ``model.``, with which they are held.

    Args:
        own: The network's state dict.
        held: Tensors by name.
        holder: What holds them, for errors.
        network: What the network is called in them.

    Raises:
        CheckpointError: If a name or a shape does not fit.
    """
    about = f"{holder} does not hold the weights of {network}"
    twins = _twins(own)
    names = {str(name): value for name, value in held.items()}
    prefix = _prefix(twins, list(names), holder, about)
    weights = {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
    for name in own:
        if name not in weights:
            weights[name] = next(weights[twin] for twin in twins[name] if twin in weights)
    for name, tensor in own.items():
        if isinstance(tensor, Tensor):
            check_fit(weights[name], tensor, f"{about}: {prefix + name!r}")
    return weights


def check_fit(found: Any, tensor: Tensor, what: str) -> None:
    """Raise a `CheckpointError` where a tensor cannot be copied, or its numbers would be others."""
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{what} is a {type(found).__name__} in it, and no tensor")
    if found.shape != tensor.shape:
        raise CheckpointError(f"{what} has shape {tuple(found.shape)} in it and {tuple(tensor.shape)} in the network")
    if found.layout != torch.strided or found.is_meta:
        kind = "holds no numbers" if found.is_meta else f"is {str(found.layout).removeprefix('torch.')}"
        raise CheckpointError(f"{what} {kind} in it; save it as a plain tensor")
    is_whole = tensor.is_floating_point() and not found.is_floating_point()  # a counter may have become floating point
    if is_whole or found.is_complex() != tensor.is_complex():
        raise CheckpointError(f"{what} is of {found.dtype} in it and of {tensor.dtype} in the network")


def _twins(own: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return, for every name, all names of the same tensor: of tied weights, a file may hold only one."""
    places: dict[Any, list[str]] = {}
    for name, value in own.items():
        is_placed = isinstance(value, Tensor) and value.numel() > 0
        places.setdefault((value.data_ptr(), value.shape) if is_placed else name, []).append(name)
    return {name: names for names in places.values() for name in names}


def _prefix(twins: Mapping[str, Sequence[str]], names: Sequence[str], holder: str, about: str) -> str:
    """Return what stands before every name of the network; what has another prefix belongs to other modules."""
    firsts = next(iter(twins.values()), [""])
    candidates = {
        name.removesuffix(first) for first in firsts for name in names if name == first or name.endswith(f".{first}")
    }
    fitting = []
    for prefix in sorted(candidates):
        held = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if held <= twins.keys() and all(held.intersection(alike) for alike in twins.values()):
            fitting.append(prefix)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"{holder} holds the network more than once, under {', '.join(map(repr, fitting))}; "
            "save the state dict of one of them"
        )
    prefix = min(candidates, key=len, default="")
    missing = next((name for name, alike in twins.items() if not {prefix + twin for twin in alike} & set(names)), None)
    unexpected = next((n for n in names if n.startswith(prefix) and n.removeprefix(prefix) not in twins), None)
    parts = [
        f"lacks {prefix + missing!r}" if missing else "",
        f"has {unexpected!r}, which the network lacks" if unexpected else "",
    ]
    raise CheckpointError(f"{about}: it {' and '.join(part for part in parts if part)}")


def _read_safetensors(file: str) -> dict[str, Any]:
    _check_is_file(file)
    try:
        return dict(safetensors.torch.load_file(file))
    except OSError as error:
        raise _unreadable(file, error) from None
    except safetensors.SafetensorError:
        raise CheckpointError(f"checkpoint {file} is no safetensors file") from None


def read_torch(file: str, opened: IO[bytes] | None = None) -> dict[str, Any]:
    """Return what a file holds that ``torch.save`` has written, if that is a mapping of tensors and plain types.

    Args:
        file: Its path.
        opened: The file itself, where the path is not of this machine.

    Raises:
        CheckpointError: If there is no such file, or it holds something else.
    """
    if opened is None:
        _check_is_file(file)
    try:
        _check_sums(file, opened)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that is refused in our own words
            held = torch.load(opened or file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise _unreadable(file, error) from None
    except Exception as error:  # whatever the bytes of a file of another kind lead to
        raise CheckpointError(f"checkpoint {file} {_refused(error)}") from None
    if not isinstance(held, dict):
        raise CheckpointError(
            f"checkpoint {file} holds a {type(held).__name__}, not a state dict or a Lightning checkpoint"
        )
    return held


def _check_is_file(file: str) -> None:
    """Refuse what is neither a file nor a folder, such as a pipe, from which a read might never come back."""
    place = Path(file)
    try:
        is_other = place.exists() and not place.is_file() and not place.is_dir()
    except OSError as error:  # in a folder that is closed
        raise _unreadable(file, error) from None
    if is_other:
        raise CheckpointError(f"checkpoint {file} cannot be read: it is no file")


def _check_sums(file: str, opened: IO[bytes] | None) -> None:
    """Refuse a file with bytes other than those that were written, which torch does not look at."""
    if not zipfile.is_zipfile(opened or file):
        damaged = None
    else:
        with zipfile.ZipFile(opened or file) as held:
            has_sums = any(entry.CRC for entry in held.infolist())  # torch can leave them out
            damaged = held.testzip() if has_sums else None
    if damaged is not None:
        raise CheckpointError(f"checkpoint {file} is damaged: what it holds of {damaged!r} is not what was written")
    if opened is not None:
        opened.seek(0)


def _refused(error: Exception) -> str:
    """Return in words why torch does not read a file."""
    is_pickle = isinstance(error, pickle.UnpicklingError)
    if is_pickle and (code := re.search(r"GLOBAL ([\w.]+)", str(error))):
        return (
            f"holds the Python object {code[1]}, which could run code and is never loaded; "
            "save the state dict alone, or as safetensors"
        )
    if is_pickle and "Unsupported operand 149" in str(
        error
    ):  # the frame of newer pickles, which torch.save does not write
        return "is a plain pickle, which could run code and is never loaded; save it with torch.save, or as safetensors"
    return "is no file of tensors that torch.load(weights_only=True) reads"


def _unreadable(file: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"checkpoint {file} cannot be read: {error.strerror or 'No such file or directory'}")
