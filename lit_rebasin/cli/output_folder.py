"""The folder that a command writes to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_rebasin.cli.errors import UsageError


@contextmanager
def output_folder(path: str) -> Iterator[Path]:
    """Make the output folder, and see that it can be written to, before any work is done; see `gone_if_empty` for what an error leaves.

    Raises:
        UsageError: If nothing can be written there.
    """
    folder = Path(path)
    with gone_if_empty(folder):
        _try_to_write(folder, path)
        yield folder


@contextmanager
def gone_if_empty(*folders: Path) -> Iterator[None]:
    """Remove folders, and those above, that were made within and are empty when it ends in an error."""
    above = {one for folder in folders for one in (folder, *folder.parents)}
    made: list[Path] = []
    with suppress(OSError, ValueError):  # a name that can be none
        made = [one for one in above if not one.exists()]
    try:
        yield
    except BaseException:
        for one in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError, ValueError):
                one.rmdir()
        raise


def _try_to_write(folder: Path, path: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"  # other processes may look as well
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"output_dir {path} cannot be written to ({reason}); choose another") from None
