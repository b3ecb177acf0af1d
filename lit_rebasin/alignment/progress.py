"""A sign of life for searches that take long."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import inf
from time import perf_counter
from typing import TypeVar

from rich.console import Console
from rich.errors import LiveError
from rich.progress import Progress

Item = TypeVar("Item")
# Seconds that pass in silence.
_PATIENCE = 5.0


def shown(
    items: Iterable[Item], label: str, total: int | None = None, console: Console | None = None
) -> Iterator[Item]:
    """Yield items, and show on a terminal how far it is once they have taken five seconds.

    Args:
        items: What to go through.
        label: What is being done.
        total: How many items there are, if that is known.
        console: Where to show it. Default: standard error, if it is a terminal.
    """
    console = console or Console(stderr=True)
    due = perf_counter() + _PATIENCE if console.is_terminal else inf
    progress = Progress(console=console, transient=True)
    task = progress.add_task(label, total=total)
    try:
        for done, item in enumerate(items):
            if perf_counter() > due:
                due = inf
                with suppress(LiveError):  # a search around this one shows its bar already
                    progress.start()
            progress.update(task, completed=done)
            yield item
    finally:
        if progress.live.is_started:
            progress.stop()
