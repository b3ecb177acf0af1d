"""Files that never take the place of others unasked."""

import os
from collections.abc import Sequence
from pathlib import Path

from lit_rebasin.cli.errors import UsageError


def check_target(option: str, file: str, suffixes: Sequence[str], overwrite: bool) -> None:
    """Raise a `UsageError`, before any work is done, if a file has a wrong suffix, cannot be written or is there already."""
    path = Path(file)
    if path.suffix not in suffixes:
        raise UsageError(f"{option} must be a {', '.join(suffixes[:-1])} or {suffixes[-1]} file, got {file}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UsageError(f"{option} {file} cannot be written; name a file in a folder that is there")
    if path.exists() and not overwrite:
        raise UsageError(f"{option} {file} is there already; choose another name, or pass --overwrite")
