"""What the TensorBoard event files of a run hold of its merges and accuracies."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

import torch
from torch import Tensor

from lit_rebasin.cli.errors import UsageError

PATTERN = "*events.out.tfevents.*"

_Scalars = dict[str, dict[int, float]]  # by tag and step


@dataclass
class RunLog:
    """What `RebasinMerge` and `ContinualMonitor` have logged of one run.

    Attributes:
        accuracies: By task trained, and by task evaluated.
        alphas: By the task that was merged in.
        before: The loss along the path without alignment, by that task and alpha in per cent.
        after: The same with it.
        displacement: The share of neurons moved, by that task and the name of the permutation group.
    """

    accuracies: dict[int, dict[int, float]] = field(default_factory=dict)
    alphas: dict[int, float] = field(default_factory=dict)
    before: dict[int, dict[int, float]] = field(default_factory=dict)
    after: dict[int, dict[int, float]] = field(default_factory=dict)
    displacement: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def matrix(self) -> Tensor | None:
        """The accuracy matrix up to the last task that was measured, NaN where nothing is logged; ``None`` without any."""
        if not self.accuracies:
            return None
        n = max(self.accuracies) + 1
        matrix = torch.full((n, n), nan, dtype=torch.float64)
        for trained, row in self.accuracies.items():
            for evaluated, accuracy in row.items():
                if evaluated < n:
                    matrix[trained, evaluated] = accuracy
        return matrix


def event_folders(folder: Path) -> list[Path]:
    """Return the folders under ``folder``, itself among them, that hold event files; versions in their order."""
    return sorted({file.parent for file in folder.rglob(PATTERN) if file.is_file()}, key=_order)


def read_log(folders: Iterable[Path]) -> RunLog | None:
    """Return what the versions of one run have logged, the later ones after the earlier; ``None`` if that is nothing.

    A version that goes on where another stopped adds to it, as a fit from a checkpoint or the fit of the next task does. One that begins with
    the first task takes its place.

    Raises:
        UsageError: If an event file is damaged.
    """
    found: _Scalars = {}
    for folder in folders:
        scalars = _scalars(folder)
        if _begins(scalars):
            found = {}
        for tag, by_step in scalars.items():
            found.setdefault(tag, {}).update(by_step)
    return _sorted_out(found) if found else None


def _scalars(folder: Path) -> _Scalars:
    """Return all that the callbacks have logged in one folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of graphs and the like
    for file in sorted(folder.glob(PATTERN)):
        _check_intact(file)
    events = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 1}, purge_orphaned_data=False
    ).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if _TAGS.fullmatch(tag)]
    return {tag: {event.step: event.value for event in events.Scalars(tag) if event.step >= 0} for tag in tags}


def _check_intact(file: Path) -> None:
    """Raise a `UsageError` for a damaged file, of which TensorBoard's reader silently drops the rest; a file that was cut off is no error."""
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(file))
    try:
        while True:
            reader.GetNext()
    except OutOfRangeError:
        return
    except DataLossError as error:
        if "truncated" not in str(error):  # as the last record of a run that was stopped, or that still runs
            raise UsageError(f"the event file {file} is damaged; remove it, or run this again") from None


_TAGS = re.compile(r"accuracy/task_\d+|merge/alpha|path/(before|after)_task_\d+|displacement/.+", re.DOTALL)


def _begins(scalars: _Scalars) -> bool:
    """Return whether a version begins with the first task: it measures task 0, or merges task 1 and measures nothing."""
    measured = [step for tag, by_step in scalars.items() if tag.startswith("accuracy/") for step in by_step]
    if measured:
        return min(measured) == 0
    return min(scalars.get("merge/alpha", {}), default=2) <= 1


def _sorted_out(scalars: _Scalars) -> RunLog:
    log = RunLog(alphas=dict(sorted(scalars.get("merge/alpha", {}).items())))
    for tag, by_step in scalars.items():
        kind, _, name = tag.partition("/")
        if kind == "displacement":
            for task, share in by_step.items():
                log.displacement.setdefault(task, {})[name] = share
        elif kind == "path":
            paths = log.before if name.startswith("before") else log.after
            paths[_task(name)] = by_step
        elif kind == "accuracy":
            for trained, accuracy in by_step.items():
                log.accuracies.setdefault(trained, {})[_task(name)] = accuracy
    return log


def _task(name: str) -> int:
    return int(name.rpartition("_")[2])


def _order(folder: Path) -> tuple[str, int, str]:
    """Sort version_10 behind version_9."""
    number = re.fullmatch(r"version_(\d+)", folder.name)
    return str(folder.parent), int(number[1]) if number else -1, folder.name
