"""Processes that work for the command, and end with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

_PARENT = "LIT_REBASIN_PARENT"  # the number of the command that has begun another, for that one
_LOOKS = 0.5  # seconds between two looks at the parent


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Return a pool of fresh processes that end at once when an error comes out of the work with it.

    They also end when this process does, if it is killed and can tell them nothing.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():  # in the midst of what may take hours; each file that they write is whole
                process.kill()
            raise


class Commands:
    """Commands of this program in processes of their own, which end with this one."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._over = False

    def run(self, words: Sequence[str]) -> tuple[int, str]:
        """Run a command to its end; return its exit code and its error output."""
        begin = [sys.executable, "-m", "lit_rebasin"]
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*begin, *words], **options) as process:
            self._running.add(process)
            if self._over:
                process.kill()
            said = process.communicate()[1]
            self._running.discard(process)
            return process.returncode, said

    def kill(self) -> None:
        """End those that run, and those that are still to be."""
        self._over = True
        for process in tuple(self._running):
            process.kill()


@contextmanager
def ending_together() -> Iterator[None]:
    """Let commands that this one begins, as Lightning does for every device but one, end with it, also if it is killed."""
    parent = os.environ.get(_PARENT)
    if parent == str(os.getppid()):
        _end_with(os.getppid())
    os.environ[_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_PARENT]
        if parent is not None:
            os.environ[_PARENT] = parent


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # without a word: the parent, which has it too, says it all
    _end_with(parent)


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
