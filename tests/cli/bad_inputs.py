"""Every bad input that the command is tried on, and what makes one: each must end with one sentence, and change nothing.

A row says what prepares the working directory, what is called there, and what the sentence must say. The rows are in tables by theme, each in
a file of its own: configurations, checkpoints, checkpoints to go on from, data sets, folders of runs, and places to write to.
"""

import gzip
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from .networks import MODEL, SHAPE, drawn, save

TINY = [
    "--data.benchmark=rotated-digits",
    "--data.n_tasks=2",
    "--data.epochs_per_task=1",
    "--data.batch_size=200",
    "--data.replay_per_class=1",
    "--model.backbone=avalanche.models.SimpleMLP",
    "--model.backbone.input_size=64",
    "--model.backbone.hidden_size=8",
    "--trainer.accelerator=cpu",
]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
FIT = ["fit", *TINY, *QUIET, "--method=replay", "--output_dir=out"]
BENCHMARK = ["benchmark", *TINY, "--methods=average", "--seeds=0", "--output_dir=out"]
SWEEP = ["sweep", *TINY, "--method=average", "--vary", "merge.alpha=0.5", "--output_dir=out"]
ALIGN = ["align", "a.pt", "b.pt", *MODEL, *SHAPE, "--output", "m.pt"]
MERGE = ["merge", "a.pt", "b.pt", *MODEL, *SHAPE, "--output", "m.pt"]
INSPECT = ["inspect", "aligned_by_test.mlp", "--input", "2,6"]

# Of the runs that are damaged: a fit, and a benchmark that was stopped.
LAST = "out/fit/replay/seed_0/checkpoints/last.ckpt"
CUT = "out/average/seed_0"


@dataclass(frozen=True)
class Place:
    """Where a bad input is prepared.

    Attributes:
        folder: The working directory.
        runs: Runs of all kinds, not to be changed.
        patch: Undone after the row.
    """

    folder: Path
    runs: Path
    patch: pytest.MonkeyPatch


Prepare = Callable[[Place], object]


@dataclass(frozen=True)
class BadInput:
    """A row of the table.

    Attributes:
        name: What is bad.
        prepare: Makes it.
        words: Of the command.
        says: What the sentence must match.
        code: The exit code: 2 for wrong words and files, 1 where the system fails.
    """

    name: str
    prepare: Prepare
    words: Sequence[str]
    says: str
    code: int = 2


def nothing(place):
    """Leave the working directory empty."""


def all_of(*prepares: Prepare) -> Prepare:
    """Do one after the other."""

    def prepare(place):
        for one in prepares:
            one(place)

    return prepare


def text(name: str, content: str | bytes = "hello\n") -> Prepare:
    """Write a file, in the place of what is there."""

    def prepare(place):
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def truncated(name: str, share: float = 0.6) -> Prepare:
    """Cut a file off."""

    def prepare(place):
        path = place.folder / name
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return prepare


def flipped(name: str, share: float = 0.5) -> Prepare:
    """Change four bytes of a file."""

    def prepare(place):
        path = place.folder / name
        content = bytearray(path.read_bytes())
        for at in range(int(share * len(content)), int(share * len(content)) + 4):
            content[at] ^= 0x55
        path.write_bytes(content)

    return prepare


def removed(name: str) -> Prepare:
    """Take a file away."""
    return lambda place: (place.folder / name).unlink()


def directory(name: str) -> Prepare:
    """Make a folder, in the place of what is there."""

    def prepare(place):
        (place.folder / name).unlink(missing_ok=True)
        (place.folder / name).mkdir(parents=True)

    return prepare


def begun(kind: str) -> Prepare:
    """Have a run in the output folder."""
    return lambda place: shutil.copytree(place.runs / kind, place.folder / "out")


class Planted:
    """What makes the folder ``ran`` as it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def planted(name: str) -> Prepare:
    """Write a pickle that would run code, as ``torch.save`` writes it, or plain for another suffix than those of checkpoints."""

    def prepare(place):
        content = {"state_dict": {"0.weight": torch.ones(2)}, "epoch": Planted()}
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".pt", ".ckpt"):
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))

    return prepare


def networks(place):
    """Two networks that can be aligned."""
    save(drawn(0).state_dict(), place.folder / "a.pt")
    save(drawn(1).state_dict(), place.folder / "b.pt")


def changed(name: str, change: Callable[[dict], object]) -> Prepare:
    """Change what a checkpoint holds."""

    def prepare(place):
        content = torch.load(place.folder / name, weights_only=True)
        change(content)
        torch.save(content, place.folder / name)

    return prepare


def arrays(name: str, **content: np.ndarray) -> Prepare:
    """Write an ``.npz``."""
    return lambda place: np.savez(place.folder / name, **content)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """Return an array of bytes as MNIST's files hold it."""
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def packed(content: bytes) -> bytes:
    """Return what a ``.gz`` of it holds, the same each time."""
    return gzip.compress(content, mtime=0)


def failing(name: str, error: Exception) -> Prepare:
    """Let a function of the system fail."""

    def fail(*_: object, **__: object):
        raise error

    return lambda place: place.patch.setattr(name, fail)
