"""Files that are complete or not there at all, whenever the process ends."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it.

    Raises:
        OSError: If that fails; what was there before is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)  # noqa: PTH105, which has no name for an atomic replace
        with suppress(OSError):  # there are file systems whose folders cannot be opened
            _flush(path.parent)
    except (OSError, RuntimeError) as error:  # the latter is torch's for a disk that is full
        reason = getattr(error, "strerror", None) or f"{error}; the disk may be full"
        raise OSError(f"{path} cannot be written ({reason})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
