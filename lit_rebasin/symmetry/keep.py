"""Leave a module as it was found."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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


def _content(value: Any) -> Any:
    return copy.copy(value) if type(value) in (dict, OrderedDict, defaultdict, list, set) else None


def _refill(value: Any, content: Any) -> None:
    if content is None:
        return
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(content)
