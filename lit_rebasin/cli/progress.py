"""What a terminal shows while a command works; nothing where there is no terminal."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class _Watched:
    """Batches that move a bar on each time that they have been read."""

    def __init__(self, batches: Iterable[Any], progress: Progress, bar: TaskID) -> None:
        self.batches, self.progress, self.bar = batches, progress, bar

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        self.progress.advance(self.bar)


@contextmanager
def reading(title: str, batches: Iterable[Any], passes: int) -> Iterator[Iterable[Any]]:
    """Show how many of the passes over some batches are done."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Watched(batches, progress, progress.add_task(title, total=passes))


@contextmanager
def working(title: str) -> Iterator[None]:
    """Show that something of unknown length is under way."""
    with Console(stderr=True).status(title):
        yield
