"""Arrays of numbers from a user's ``.npz``."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np


def read_npz(path: str, wanted: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Read arrays by name; no code in the file is ever run.

    Args:
        path: Of the file.
        wanted: Names of arrays; those that the file lacks are left out.

    Returns:
        The arrays, of numbers as this machine and torch hold them, and the names of all that the file has.

    Raises:
        ValueError: If it cannot be read, or an array is none of numbers.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name; save it with numpy.savez")
        with archive:
            return {name: _numbers(archive, name) for name in archive.files if name in wanted}, archive.files
    except Exception as error:  # whatever the bytes of a file of another kind lead to
        about = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} is not a readable .npz of numbers: {about}") from None


def _numbers(archive: np.lib.npyio.NpzFile, name: str) -> Any:
    try:
        array = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(f"{name} is an array of Python objects; save it as one array of numbers") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
