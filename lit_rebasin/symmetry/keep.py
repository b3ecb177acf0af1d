"""Leave a module as it was found."""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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


def use_batch_statistics(network: nn.Module) -> None:
    """Put the BatchNorm layers that keep running statistics in training mode, all else as it is: a merge has no statistics of its own yet."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train(module.track_running_stats)


def _content(value: Any) -> Any:
    """Return what an attribute holds, if a call may change it in place."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    return copy.copy(value) if type(value) in (dict, OrderedDict, defaultdict, list, set, deque) else None


def _refill(value: Any, content: Any) -> None:
    if content is None:
        return
    if isinstance(value, torch.Generator):
        value.set_state(content)
        return
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(content)
