"""Signals to commands that have begun other processes: one sentence, an exit code, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .words import CONFIG, ROOT, SMALL

LONG = ["--config", str(ROOT / CONFIG), *SMALL, "--data.epochs_per_task=20000", "--threads=1", "--output_dir=out"]
COMMANDS = {
    "processes": ["benchmark", *LONG, "--methods=average", "--seeds=0,1", "--processes=2"],
    "tasks": ["benchmark", *LONG, "--methods=average", "--seeds=0", "--merge.start=fresh", "--parallel_tasks=2"],
    "sweep": ["sweep", *LONG, "--method=average", "--seeds=0", "--vary=merge.alpha=0.1,0.2", "--processes=2"],
}
SAYS = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "ended by SIGTERM"),
}


# One model on two devices.
FIT = [
    *("fit", "--config", str(ROOT / CONFIG), *SMALL, "--data.epochs_per_task=20000", "--threads=1", "--output_dir=out"),
    *("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.enable_progress_bar=false"),
]


def take_interrupts():
    """Undo what a shell does to the work that it puts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def of_session(session):
    """Return the processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(its) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def commands_of(session):
    """Return those that are commands of ours, and not what these ask about the machine."""
    found = []
    for number in of_session(session):
        with suppress(OSError):  # it has just ended
            if b"lit_rebasin" in Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(number)
    return found


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    ("command", "number", "to_all"),
    [
        ("processes", signal.SIGTERM, False),
        pytest.param("processes", signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param("processes", signal.SIGINT, False, marks=pytest.mark.slow),
        ("tasks", signal.SIGTERM, False),
        ("tasks", signal.SIGINT, True),
        pytest.param("tasks", signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param("sweep", signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param("sweep", signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param("sweep", signal.SIGINT, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_processes_with_one_sentence(tmp_path, command, number, to_all):
    words = [sys.executable, "-W", "ignore", "-m", "lit_rebasin", *COMMANDS[command]]
    places = tmp_path / "temporary"
    places.mkdir()
    environment = {**os.environ, "TMPDIR": str(places)}
    options = {
        "cwd": tmp_path,
        "stderr": subprocess.PIPE,
        "stdout": subprocess.DEVNULL,
        "text": True,
        "env": environment,
    }
    with subprocess.Popen(words, start_new_session=True, preexec_fn=take_interrupts, **options) as process:
        try:
            # The command and the two that work for it.
            assert wait_for(lambda: len(of_session(process.pid)) >= 3 and list(tmp_path.rglob("config.yaml")))
            time.sleep(1)
            if to_all:  # as a terminal sends it
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            err = process.communicate(timeout=60)[1]
            code, says = SAYS[number]
            assert process.returncode == code
            assert "Traceback" not in err
            assert [line for line in err.splitlines() if f"lit-rebasin: error: {says}" in line] == err.splitlines()[-1:]
            assert wait_for(lambda: not of_session(process.pid), 30)
            # wandb, which Avalanche imports, has empty folders of its own in each process.
            assert not [place for place in places.iterdir() if "wandb" not in place.name]
        finally:
            for left in of_session(process.pid):
                os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("delay", [0.3, pytest.param(3, marks=pytest.mark.slow)])
def test_a_kill_ends_the_processes_of_all_devices(tmp_path, delay):
    words = [sys.executable, "-W", "ignore", "-m", "lit_rebasin", *FIT]
    options = {"cwd": tmp_path, "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(words, start_new_session=True, **options) as process:
        try:
            # Once they have met, the second one would see the end of the first in any case.
            assert wait_for(lambda: len(commands_of(process.pid)) >= 2)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            assert wait_for(lambda: not of_session(process.pid), 30)
        finally:
            for left in of_session(process.pid):
                os.kill(left, signal.SIGKILL)


LOSES = """
import gc, os, signal, sys, time, weakref
from lit_rebasin.cli import main
import lit_rebasin.cli.report_command as command

class Freed:
    pass

def run(words):
    freed = Freed()
    kept = weakref.ref(freed, lambda _: (os.kill(os.getpid(), {number}), time.sleep(0.01)))
    del freed  # its callback loses what the handler raises
    print("went on", flush=True)
    time.sleep(20)

command.run_report = run
sys.exit(main(["report", "x"]))
"""
TWICE = """
import os, sys, time
from lit_rebasin.cli import main
import lit_rebasin.cli.report_command as command

def run(words):
    try:
        os.kill(os.getpid(), {number})
        time.sleep(20)
    finally:
        os.kill(os.getpid(), {number})
        time.sleep(20)

command.run_report = run
sys.exit(main(["report", "x"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("code", "out"), [(LOSES, "went on\n"), (TWICE, "")], ids=["lost", "twice"])
def test_a_signal_that_python_loses_or_that_comes_twice_ends_the_command(number, code, out):
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code.format(number=int(number))], capture_output=True, text=True)
    assert time.monotonic() - begin < 15
    exit_code, says = SAYS[number]
    assert done.returncode == exit_code
    assert done.stdout == out
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lit-rebasin: error: {says}")
