"""Why a merge is undone."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch

from lit_rebasin.merging import NoFiniteLossError

# What errors of matching and merging say of networks whose weights or activations have grown beyond all bounds.
_NOT_FINITE = ("NaN", "infinity", "must be finite", "non-finite", "invalid numeric entries")
# What torch says where an allocation fails outside of CUDA, in a RuntimeError of no class of its own.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


class WorseMergeError(ValueError):
    """A merge with a far greater loss than both networks that it is made of."""


@dataclass(frozen=True)
class Refusal:
    """Why a merge was undone, and which network is there in its place."""

    reason: str
    kept: Literal["trained", "previous"]


def is_of_numbers(error: BaseException) -> bool:
    """Return whether an error says that there is NaN or infinity where there should be numbers, or a matrix that no solver takes."""
    told = isinstance(error, (ValueError, RuntimeError)) and any(words in str(error) for words in _NOT_FINITE)
    return told or isinstance(error, (NoFiniteLossError, torch.linalg.LinAlgError))


def reason_of(error: BaseException) -> str | None:
    """Return in words why a merge that ended with an error is to be undone; ``None`` for an error that is none of the merge's."""
    if isinstance(error, WorseMergeError) or is_of_numbers(error):
        return str(error).rstrip(".")
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if memory or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)):
        return f"out of memory: {next(iter(str(error).splitlines()), '') or type(error).__name__}".rstrip(".")
    return None


def check_loss(loss: float, previous: float, trained: float, margin: float) -> None:
    """Raise an error if the loss of a merge is not finite, or greater than both networks' by more than the margin.

    A network without a finite loss counts for nothing: a merge may not be far worse than the other one.
    """
    if not isfinite(loss):
        raise NoFiniteLossError("the loss of the merged model on training batches is NaN or infinite")
    ends = [end for end in (previous, trained) if isfinite(end)]
    if ends and loss > max(ends) + margin:
        raise WorseMergeError(
            f"its loss on training batches is {loss:.4g}, more than margin={margin:g} above that of the previous model, {previous:.4g}, and of "
            f"the trained one, {trained:.4g}"
        )
