"""The checkpoint that a run goes on from, checked before anything is written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_rebasin.callbacks import ContinualMonitor, ModeConnectivity, RandomStates, RebasinMerge
from lit_rebasin.cli.build import Run
from lit_rebasin.cli.errors import UsageError, refusing
from lit_rebasin.merging.checkpoint_file import CheckpointError, check_fit, read_torch

_NEEDED = (
    RebasinMerge,
    ModeConnectivity,
    RandomStates,
    ContinualMonitor,
)  # without their states a run goes on as another one


@refusing()
def read_checkpoint(path: Path) -> Any:
    """Return what a checkpoint holds.

    Raises:
        UsageError: If it cannot be read.
    """
    if not path.exists():
        raise UsageError(f"there is no checkpoint {path}")
    try:
        return read_torch(str(path))
    except CheckpointError as error:
        what = str(error).partition(";")[0]  # what follows is advice for weights alone
        raise UsageError(f"{what}; go on from a whole checkpoint of the same run, or begin anew") from None


def configuration(run: Run, held: Any, path: Path) -> Mapping[str, Any]:
    """Return what the run of a checkpoint was begun with.

    Raises:
        UsageError: If it does not say.
    """
    with _expecting(path):
        config = held["callbacks"][run.record.state_key]["config"]
        if not isinstance(config, Mapping) or not _is_plain(config):
            raise TypeError("a configuration")
        return config


@refusing()
def check_checkpoint(run: Run, held: Any, path: Path) -> None:
    """Refuse what is no checkpoint, or one of another run.

    Raises:
        UsageError: If it lacks what going on needs, holds a NaN or is of another stream.
    """
    with _expecting(path):
        run.record.load_state_dict(held["callbacks"][run.record.state_key])
        run.data.load_state_dict(held[type(run.data).__qualname__])
        _check_weights(run.model.state_dict(), held["state_dict"])
        _check_optimizers(run, held["optimizer_states"])
        _check_kinds(run.trainer.fit_loop.state_dict(), held["loops"]["fit_loop"], "fit_loop")
        callbacks: list[Callback] = run.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, _NEEDED) or callback.state_key in held["callbacks"]:
                _check_state(callback, held["callbacks"][callback.state_key])


@contextmanager
def _expecting(path: Path) -> Iterator[None]:
    """Say of what is not found in a checkpoint that it is of another kind."""
    try:
        yield
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
        try:
            check_fit(found, tensor, repr(name))
        except CheckpointError as error:
            raise _UnfitError(error) from None
        if found.is_floating_point() and not found.isfinite().all():
            raise _UnfitError(f"{name!r} holds a NaN or an infinity")


def _check_state(callback: Callback, held: Mapping[str, Any]) -> None:
    """See that a callback's state is of the kinds that it writes itself; further it looks when it takes it over."""
    if not isinstance(callback, (*_NEEDED, ModelCheckpoint)):
        return
    _check_kinds(callback.state_dict(), held, type(callback).__name__)


def _check_kinds(own: Mapping[str, Any], held: Mapping[str, Any], owner: str) -> None:
    """See that what a state holds is of the kinds that it would have here; older versions may lack an entry."""
    for name in own.keys() & held.keys():
        value, found = own[name], held[name]
        if isinstance(value, bool | int | str | list | dict) and type(found) is not type(value):
            raise _UnfitError(f"{name} of {owner} is of type {type(found).__name__} in it, not {type(value).__name__}")
        if isinstance(value, dict):
            _check_kinds(value, found, owner)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, bool | int | float | str | None)


def _check_optimizers(run: Run, states: list[Any]) -> None:
    optimizer = run.model.optimizer(run.model.parameters())  # type: ignore[operator]
    ours, theirs = optimizer.defaults.keys(), states[0]["param_groups"][0].keys() - {"params", "initial_lr"}
    if ours - theirs and theirs - ours:  # one side alone may be another version of torch
        raise _UnfitError(
            f"its optimizer has {', '.join(sorted(theirs - ours))}, which {type(optimizer).__name__} has not"
        )
