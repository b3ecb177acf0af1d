"""What a mistyped word was meant to be; imports nothing slow."""

from collections.abc import Iterable
from difflib import get_close_matches


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return which of some words is most like one, if any is."""
    plain = {name.lstrip("-"): name for name in known}
    return next((plain[name] for name in get_close_matches(word.lstrip("-"), plain, n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that names what was probably meant: options as they are, other names quoted; nothing for a guess."""
    found = closest(word, known)
    if found is None:
        return ""
    return f"; did you mean {found if found.startswith('-') else repr(found)}?"
