"""What the TensorBoard event files of a run hold of its accuracies, merges and monitors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rebasin.cli.event_records import DamageError, event_values

PATTERN = "*events.out.tfevents.*"

_Scalars = dict[str, dict[int, float]]  # by tag and step
_OF_TASKS = re.compile(r"accuracy/task_\d+|merge/alpha|path/(before|after)_task_\d+|displacement/.+", re.DOTALL)
_REFUSED = "merge/refused_because/text_summary"  # as TensorBoard calls the text merge/refused_because
_OF_MONITORS = re.compile(r"(geodesic|connectivity|connectivity_reference|sharpness|feature_learning)/.+", re.DOTALL)
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class RunLog:
    """What one run has logged.

    Attributes:
        accuracies: By task trained, and by task evaluated.
        alphas: By the task that was merged in.
        refused: Why there was no merge, by the task.
        before: The loss along the path without alignment, by that task and alpha in per cent.
        after: The same with it.
        displacement: The share of neurons moved, by that task and the name of the permutation group.
        monitored: Numbers of monitors, by tag and optimizer step.
        pictures: PNG files of monitors, by tag and step in the order of writing; of each tag the last alone, the others are empty.
        damages: What cannot be read, by file.
        name: Which of several runs this is, such as ``seed 3``.
    """

    accuracies: dict[int, dict[int, float]] = field(default_factory=dict)
    alphas: dict[int, float] = field(default_factory=dict)
    before: dict[int, dict[int, float]] = field(default_factory=dict)
    after: dict[int, dict[int, float]] = field(default_factory=dict)
    displacement: dict[int, dict[str, float]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    monitored: _Scalars = field(default_factory=dict)
    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)
    damages: dict[Path, str] = field(default_factory=dict)
    name: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of the run."""
        merges = (self.alphas, self.before, self.after, self.displacement, self.refused)
        return not any((self.accuracies, *merges, self.monitored, self.pictures))

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


@dataclass
class _Version:
    """What some versions of a run have logged, by tag and step."""

    of_tasks: _Scalars = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    monitored: _Scalars = field(default_factory=dict)
    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def add(self, later: "_Version") -> None:
        for tag, by_step in later.of_tasks.items():
            self.of_tasks.setdefault(tag, {}).update(by_step)
        self.refused.update(later.refused)
        for tag, by_step in later.monitored.items():
            for step, value in by_step.items():
                self.add_number(tag, step, value)
        for tag, pictures in later.pictures.items():
            for step, picture in pictures.items():
                self.add_picture(tag, step, picture)

    def add_number(self, tag: str, step: int, value: float) -> None:
        """Add a number of a monitor; one at the first step or before it begins the curve anew, as the Trainer of another task does."""
        by_step = self.monitored.setdefault(tag, {})
        if step <= next(iter(by_step), -1):
            by_step.clear()
        by_step[step] = value

    def add_picture(self, tag: str, step: int, picture: bytes) -> None:
        """Add the picture of a monitor in the place of those before."""
        by_step = self.pictures.setdefault(tag, {})
        if step <= next(iter(by_step), -1):
            by_step.clear()
        by_step.pop(step, None)
        by_step.update(dict.fromkeys(by_step, b""))
        by_step[step] = picture


def event_folders(folder: Path) -> list[Path]:
    """Return the folders under ``folder``, itself among them, that hold event files; versions in their order."""
    return sorted({file.parent for file in folder.rglob(PATTERN) if file.is_file()}, key=_order)


def event_files(folder: Path) -> list[Path]:
    """Return the event files that lie in ``folder`` itself, in their order."""
    return sorted(file for file in folder.glob(PATTERN) if file.is_file())


def read_log(folders: Iterable[Path]) -> RunLog:
    """Return what the versions of one run have logged, the later ones after the earlier.

    A version that goes on where another stopped adds to it, as a fit from a checkpoint or the fit of the next task does. One that begins where
    that began takes its place.
    """
    found = _Version()
    damages: dict[Path, str] = {}
    for folder in folders:
        version = _read_version(folder, damages)
        if _begins_anew(version, found):
            found = _Version()
        found.add(version)
    return _sorted_out(found, damages)


def _read_version(folder: Path, damages: dict[Path, str]) -> _Version:
    """Return what the callbacks have logged in one folder, and note which files are damaged."""
    version = _Version()
    for file in event_files(folder):
        try:
            for step, value in event_values(file):
                if step >= 0:
                    _take(version, step, value)
        except DamageError as error:
            damages[file] = str(error)
    return version


def _take(version: _Version, step: int, value: Any) -> None:
    """Add a summary value, if it is of a callback that a report shows."""
    tag, kind = value.tag, value.WhichOneof("value")
    if kind == "simple_value" and _OF_TASKS.fullmatch(tag):
        version.of_tasks.setdefault(tag, {})[step] = value.simple_value
    elif kind == "tensor" and tag == _REFUSED:
        version.refused[step] = b"".join(value.tensor.string_val).decode("utf-8", "replace")
    elif kind == "simple_value" and _OF_MONITORS.fullmatch(tag):
        version.add_number(tag, step, value.simple_value)
    elif kind == "image" and _OF_MONITORS.fullmatch(tag):
        picture = value.image.encoded_image_string
        if picture.startswith(_PNG) and len(picture) > 24:  # signature, chunk header, width and height
            version.add_picture(tag, step, picture)


def _begins_anew(version: _Version, found: _Version) -> bool:
    """Return whether a version begins where those found before it began: by its first task, or if one has none, by the steps of monitors."""
    first, first_found = _first_task(version), _first_task(found)
    if first is None or first_found is None:
        first, first_found = _first_step(version.monitored), _first_step(found.monitored)
    return first is not None and first_found is not None and first <= first_found


def _first_task(version: _Version) -> int | None:
    """Return the first task that was measured, or if none was, that before the first merge."""
    scalars = version.of_tasks
    measured = [step for tag, by_step in scalars.items() if tag.startswith("accuracy/") for step in by_step]
    merged = [task - 1 for task in (*scalars.get("merge/alpha", {}), *version.refused)]
    return min(measured or merged, default=None)


def _first_step(scalars: _Scalars) -> int | None:
    return min((step for by_step in scalars.values() for step in by_step), default=None)


def _sorted_out(found: _Version, damages: Mapping[Path, str]) -> RunLog:
    log = RunLog(monitored=found.monitored, pictures=found.pictures, damages=dict(damages))
    log.refused = dict(sorted(found.refused.items()))
    log.alphas = dict(sorted(found.of_tasks.get("merge/alpha", {}).items()))
    for tag, by_step in found.of_tasks.items():
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
