"""The checkpoint that a run goes on from, checked before anything is written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lit_rebasin.callbacks import ContinualMonitor, ModeConnectivity, RandomStates, RebasinMerge
from lit_rebasin.cli.build import Run
from lit_rebasin.cli.errors import UsageError, refusing
from lit_rebasin.merging.checkpoint_file import CheckpointError, read_torch

_NEEDED = (
    RebasinMerge,
    ModeConnectivity,
    RandomStates,
    ContinualMonitor,
)  # without their states a run goes on as another one


@refusing()
def check_checkpoint(run: Run, path: Path) -> None:
    """Refuse a file that is no checkpoint, or one of another run.

    Raises:
        UsageError: If it cannot be read, lacks what going on needs, holds a NaN or is of another stream.
    """
    if not path.exists():
        raise UsageError(f"there is no checkpoint {path}")
    try:
        held = read_torch(str(path))
    except CheckpointError as error:
        what = str(error).partition(";")[0]  # what follows is advice for weights alone
        raise UsageError(f"{what}; go on from a whole checkpoint of the same run, or begin anew") from None
    try:
        run.record.load_state_dict(held["callbacks"][run.record.state_key])
        run.data.load_state_dict(held[type(run.data).__qualname__])
        _check_weights(run.model.state_dict(), held["state_dict"])
        _check_optimizers(run, held["optimizer_states"])
        callbacks: list[Callback] = run.trainer.callbacks  # type: ignore[attr-defined]
        needed = [one for one in callbacks if isinstance(one, _NEEDED)]
        _ = held["loops"]["fit_loop"], [held["callbacks"][one.state_key] for one in needed]
    except _UnfitError as error:
        raise UsageError(f"checkpoint {path} is of another run: {error}; go on with what it was begun with") from None
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UsageError(
            f"checkpoint {path} is not a checkpoint of `lit-rebasin`, or one of another version, for it lacks {error}; begin the run anew"
        ) from None


@contextmanager
def restoring(run: Run, path: str | Path | None) -> Iterator[None]:
    """Say of an error that comes before the training goes on that the checkpoint is damaged.

    Raises:
        UsageError: For an error with no sentence of its own.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if path is None or run.record.began:
            raise
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"checkpoint {path} is damaged, or of another version ({what}); begin the run anew") from error


class _UnfitError(Exception):
    """Says what of a checkpoint does not fit a run."""


def _check_weights(own: Mapping[str, Tensor], held: Mapping[str, Any]) -> None:
    for name, tensor in own.items():
        found = held[name]
        if found.shape != tensor.shape:
            raise _UnfitError(f"{name!r} has shape {tuple(found.shape)} in it and {tuple(tensor.shape)} in the network")
        if found.dtype.is_floating_point != tensor.dtype.is_floating_point or found.is_complex():
            raise _UnfitError(f"{name!r} is of {found.dtype} in it and of {tensor.dtype} in the network")
        if found.is_floating_point() and not found.isfinite().all():
            raise _UnfitError(f"{name!r} holds a NaN or an infinity")


def _check_optimizers(run: Run, states: list[Any]) -> None:
    optimizer = run.model.optimizer(run.model.parameters())  # type: ignore[operator]
    ours, theirs = optimizer.defaults.keys(), states[0]["param_groups"][0].keys() - {"params", "initial_lr"}
    if ours - theirs and theirs - ours:  # one side alone may be another version of torch
        raise _UnfitError(
            f"its optimizer has {', '.join(sorted(theirs - ours))}, which {type(optimizer).__name__} has not"
        )
