"""Leave a module as it was found."""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_OWN = ("_parameters", "_buffers", "_modules")  # what makes a module, and nothing that it notes down


@contextmanager
def attributes_kept(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Put the attributes of modules, such as training modes, hooks and what they cache of their weights, back to what they were.

    Args:
        parts: The modules themselves; those inside them only if they are listed too, as in ``model.modules()``.
    """
    before = [(vars(part), {name: (value, _content(value)) for name, value in vars(part).items()}) for part in parts]
    try:
        yield
    finally:
        for attributes, kept in before:
            for name in set(attributes) - set(kept):
                del attributes[name]
            for name, (value, content) in kept.items():
                attributes[name] = value
                _refill(value, content)


@contextmanager
def contents_kept(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what tensors and arrays among the attributes of modules hold, and what is in containers within containers.

    It copies all of them, which `attributes_kept` does not; weights and buffers are left alone.

    Args:
        parts: The modules themselves; those inside them only if they are listed too.
    """
    parts = list(parts)
    seen = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    waiting = [value for part in parts for name, value in vars(part).items() if name not in _OWN]
    kept = []
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (dict, list, tuple, set, deque)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
        kept.append((value, _content(value) if not isinstance(value, Tensor | np.ndarray) else _numbers(value)))
    try:
        yield
    finally:
        for value, content in kept:
            _refill(value, content)


def use_batch_statistics(network: nn.Module) -> None:
    """Put the BatchNorm layers that keep running statistics in training mode, all else as it is: a merge has no statistics of its own yet."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train(module.track_running_stats)


def _content(value: Any) -> Any:
    """Return what an attribute holds, if a call may change it in place."""
    if isinstance(value, _GENERATORS):
        return _state(value)
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, set, deque)) else None


def _state(generator: Any) -> Any:
    """Return where a source of random numbers is."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _go_back(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _numbers(value: Tensor | np.ndarray) -> Any:
    """Return a copy of numbers, and of tensors the count of what was written to them."""
    if isinstance(value, np.ndarray):
        return value.copy()
    return None if value.is_inference() else (value.detach().clone(), value._version)


def _refill(value: Any, content: Any) -> None:
    if content is None:
        return
    if isinstance(value, _GENERATORS):
        _go_back(value, content)
    elif isinstance(value, np.ndarray):
        value[...] = content
    elif isinstance(value, Tensor):
        numbers, version = content
        if value._version != version:
            with torch.no_grad():
                value.copy_(numbers)
    else:
        value.clear()
        (value.extend if isinstance(value, (list, deque)) else value.update)(content)
