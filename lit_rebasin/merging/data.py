"""Run a network over batches of data, and watch it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode for a while; each of its parts is then back in its own mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def hooks() -> Iterator[list[Any]]:
    """Give a list for the handles of hooks, which are removed at the end."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Make a ValueError of what goes wrong in a user's function: what could not be done, and the error that it gave."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def check_module(name: str, module: object) -> None:
    """Raise a TypeError unless an argument is a network."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {kind(module)}.")


def labelled(batches: Iterable[Any], module: nn.Module, argument: str = "dataloader") -> Iterator[tuple[Any, Any]]:
    """Yield input and target of every batch, on the module's device.

    Raises:
        TypeError: If a batch is not a tuple or list of an input and a target.
        ValueError: If there are no batches.
    """
    empty = True
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise TypeError(f"Every batch of {argument} must begin with an input and a target, got {kind(batch)}.")
        empty = False
        yield to_device(batch[0], module), to_device(batch[1], module)
    if empty:
        raise ValueError(
            f"{argument} gave no batches: it is empty, or can be read only once and has been (make a list of it)."
        )


def to_device(value: Any, module: nn.Module) -> Any:
    """Return a value with all of its tensors on the device of a module's weights."""
    weight = next(module.parameters(), None)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(weight.device), value) if weight is not None else value


def arguments_of(inputs: Any) -> tuple[Any, ...]:
    """Return the arguments of a forward pass that the inputs of a batch stand for: several in a tuple or list, or one."""
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def kind(value: Any) -> str:
    """Return what a value is, in words for an error."""
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
