"""Processes that work for the command, and end with it."""

import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

_LOOKS = 0.5  # seconds between two looks at the parent


def workers(count: int) -> ProcessPoolExecutor:
    """Return a pool of fresh processes that end when this one does, also if it is killed and can tell them nothing."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # without a word: the parent, which has it too, says it all
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """End this process when that with the number ``parent``, which has begun it, does."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
