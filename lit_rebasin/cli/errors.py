"""What the command says when it is used wrongly."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """A wrong word on the command line or in the YAML file, or a file that it names and that cannot be used."""


@contextmanager
def refusing() -> Iterator[None]:
    """Take what others complain of for wrong words, as it is before a training begins.

    Raises:
        UsageError: For a ValueError, for a missing file with a sentence of its own, and for Lightning's complaints about a configuration.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError) and error.errno is None
        if isinstance(error, ValueError) or is_missing or type(error).__name__ == "MisconfigurationException":
            raise UsageError(str(error)) from error
        raise
