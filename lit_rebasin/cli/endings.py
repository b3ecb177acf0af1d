"""How the command ends: what it says, its exit code, and what signals make of it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_GOES_ON = {
    "fit": "; --ckpt_path last goes on",
    "benchmark": "; --resume goes on",
    "sweep": "; the same command goes on with the trials that are not finished",
}


def fail(message: str, code: int, error: BaseException | None = None) -> int:
    """Print a sentence on the error output, with what has been noted of the error, and return the exit code."""
    sentences = [" ".join(part.split()) for part in (message, *getattr(error, "__notes__", []))]
    print(f"lit-rebasin: error: {'. '.join(part.removesuffix('.') for part in sentences)}", file=sys.stderr, flush=True)
    return code


def ended_by_sigterm(command: str) -> int:
    """Print what SIGTERM has ended, and how to go on, and return the exit code."""
    return fail(f"ended by SIGTERM, as machines that are taken away send it{_GOES_ON.get(command, '')}", 143)


@contextmanager
def ending_on(number: signal.Signals, last: Callable[[], int]) -> Iterator[None]:
    """Let a signal end the process at once, with what ``last`` says and returns; those that it has begun see that and end."""
    with _handled_by(number, lambda *_: os._exit(last())):
        yield


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
