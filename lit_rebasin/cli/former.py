"""What a benchmark that begins anew takes the place of."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lit_rebasin.cli.report import FILES


@dataclass(frozen=True)
class Former:
    """Results and checkpoints of a former benchmark, which go as soon as the training of a new one begins.

    Attributes:
        written: The files, and when each was written, in nanoseconds, which tells it from one of the new benchmark.
    """

    written: Mapping[Path, int]

    @classmethod
    def of(cls, folder: Path) -> "Former":
        """Return what a folder holds of one."""
        found = [*folder.glob("*/seed_*/checkpoints/*.ckpt"), *(folder / name for name in FILES)]
        return cls({path: path.stat().st_mtime_ns for path in found if path.is_file()})

    def remove(self) -> None:
        """Remove what no run has removed before."""
        for path, written in self.written.items():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime_ns == written:
                    path.unlink()
