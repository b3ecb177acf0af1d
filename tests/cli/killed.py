"""Runs that are killed, a script: ``python -m tests.cli.killed JOBS.json`` with a list of ``{"words", "share", "when", "sabotage", "log"}``.

The work is imported once; each job is a process of its own, which is killed after a share of the time that the first job took, when its folder
holds a file of a pattern, or by itself as it writes a file. The exit code is printed, or minus the signal, a line a job.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import lit_rebasin.cli.benchmark
import lit_rebasin.cli.fit  # noqa: F401 - imported once for all jobs
from lit_rebasin.cli import main

ORPHANS = 99


def suicide(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def sabotaged(kind, suffix, count):
    """Let the process kill itself as it writes a file of a suffix for the n-th time: half-way, or before it is renamed."""
    calls = [0]
    owner, name = (torch, "save") if kind == "half" else (os, "replace")
    real = getattr(owner, name)

    def write(*args, **kwargs):
        target = str(args[1])
        if target.removesuffix(".tmp").endswith(suffix):
            calls[0] += 1
            if calls[0] == count:
                if kind == "half":
                    real(*args, **kwargs)
                    path = Path(target)
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                suicide()
        return real(*args, **kwargs)

    setattr(owner, name, write)


def child(job):
    """Run the command in a session of its own, its output set aside."""
    os.setsid()
    out = os.open(job.get("log", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if job.get("sabotage"):
        sabotaged(*job["sabotage"])
    os._exit(main(job["words"]))


def has_orphans(session):
    """Return whether a process of a session outlives the one that began it, as a worker would that waits for work: for ever."""
    until = time.monotonic() + 60
    while any(of_session(path, session) for path in Path("/proc").glob("[0-9]*/stat")):
        if time.monotonic() > until:
            return True
        time.sleep(0.05)
    return False


def of_session(path, session):
    try:
        state, _, _, found = path.read_text().rpartition(")")[2].split()[:4]
    except OSError:  # it has just ended
        return False
    return int(found) == session and state != "Z"


def holds(folder=None, pattern=None):
    return folder is not None and any(Path(folder).glob(pattern))


def run(job, whole):
    """Return the exit code, or minus the signal that ended the process."""
    pid = os.fork()
    if not pid:
        child(job)
    until = time.monotonic() + job["share"] * whole if "share" in job else float("inf")
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return ORPHANS if has_orphans(pid) else os.waitstatus_to_exitcode(status)
        if time.monotonic() > until or holds(*job.get("when", ())):
            os.kill(pid, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.002)


if __name__ == "__main__":
    torch.set_num_threads(1)
    whole = None
    for job in json.loads(Path(sys.argv[1]).read_text()):
        began = time.monotonic()
        print(run(job, whole), flush=True)
        whole = whole or time.monotonic() - began
