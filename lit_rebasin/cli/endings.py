"""How the command ends: what it says, its exit code, and what signals make of it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_GOES_ON = {
    "fit": "; --ckpt_path last goes on",
    "benchmark": "; --resume goes on",
    "sweep": "; the same command goes on",
}


_AGAIN = 0.05  # seconds until a signal that was lost is sent once more


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends what is under way as Ctrl-C does."""


def fail(message: str, code: int, error: BaseException | None = None) -> int:
    """Print a sentence on the error output, with what has been noted of the error, and return the exit code."""
    sentences = [" ".join(part.split()) for part in (message, *getattr(error, "__notes__", []))]
    print(f"lit-rebasin: error: {'. '.join(part.removesuffix('.') for part in sentences)}", file=sys.stderr, flush=True)
    return code


def ended_by_sigterm(command: str, error: BaseException) -> int:
    """Print what has ended the command, and how to go on if the error does not say it, and return the exit code."""
    goes_on = "" if getattr(error, "__notes__", None) else _GOES_ON.get(command, "")
    return fail(f"ended by SIGTERM, as machines that are taken away send it{goes_on}", 143, error)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once, where native code, such as torch's as it is imported, would turn them into an abort."""
    interrupted = _handled_by(signal.SIGINT, lambda *_: os._exit(fail("interrupted", 130)))
    with interrupted, _handled_by(signal.SIGTERM, lambda *_: os._exit(fail("ended by SIGTERM", 143))):
        yield


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise a KeyboardInterrupt on Ctrl-C and a `TerminatedError` on SIGTERM, and end the process at once on a second one.

    Python swallows what is raised while it frees objects, in callbacks of weak references; the signal is then sent once more.
    """
    raised = {KeyboardInterrupt: signal.SIGINT, TerminatedError: signal.SIGTERM}
    heard: set[int] = set()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number in heard:
            os._exit(fail("interrupted", 130) if number == signal.SIGINT else fail("ended by SIGTERM", 143))
        heard.add(number)
        raise KeyboardInterrupt if number == signal.SIGINT else TerminatedError

    def swallowed(unraisable: Any) -> None:
        number = raised.get(unraisable.exc_type)
        if number is None:
            before(unraisable)
            return
        heard.discard(number)
        threading.Timer(_AGAIN, os.kill, (os.getpid(), number)).start()

    before, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        with _handled_by(signal.SIGINT, interrupt), _handled_by(signal.SIGTERM, interrupt):
            yield
    finally:
        sys.unraisablehook = before


@contextmanager
def sigterm_left_to_lightning() -> Iterator[None]:
    """Let a fit be ended by its Trainer, which tells its other processes and its callbacks."""
    with _handled_by(signal.SIGTERM, signal.SIG_DFL):
        yield


@contextmanager
def _handled_by(number: signal.Signals, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python sets no handlers
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
