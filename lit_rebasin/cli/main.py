"""Entry of the command: answers for help and errors; the work is imported only when there is some."""

import errno
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lit_rebasin import __version__
from lit_rebasin.cli.endings import (
    TerminatedError,
    ended_by_sigterm,
    fail,
    interrupted_by_signals,
    leaving_at_once,
)
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.suggestions import did_you_mean
from lit_rebasin.cli.texts import COMMAND_HELP, HELP
from lit_rebasin.cli.workers import ending_together

# Both commands read one YAML file, so each parser knows these keys, but on the command line they would be ignored.
FOREIGN_OPTIONS = {
    "fit": {
        "--methods": "use --method",
        "--seeds": "use --seed_everything",
        "--overwrite": "it belongs to benchmark",
        "--resume": "use --ckpt_path last",
        "--parallel_tasks": "it belongs to benchmark",
        "--processes": "it belongs to benchmark",
    },
    "sweep": {
        "--resume": "the same command goes on by itself",
        "--overwrite": "choose another --output_dir to begin anew",
    },
    "benchmark": {"--method": "use --methods", "--seed_everything": "use --seeds", "--ckpt_path": "it belongs to fit"},
}
_SECTIONS = ("--trainer", "--model", "--data", "--merge")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words after ``lit-rebasin``; those of the process by default.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for wrong usage, 130 if interrupted, 143 if ended by SIGTERM.
    """
    try:
        with ending_together():
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it ends
        code = 1
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in COMMAND_HELP:
        meant = did_you_mean(words[0], COMMAND_HELP) or f"; use {', '.join(COMMAND_HELP)}"
        return fail(f"there is no command {words[0]!r}{meant}", 2)
    if {"-h", "--help"} & set(words):
        print(COMMAND_HELP[words[0]])
        return 0
    words = ["--help" if word == "--help_all" else word for word in words]
    here = str(Path.cwd())
    if here not in sys.path:  # last, so that a user's file shadows no package
        sys.path.append(here)
    try:
        _check_words(words[0], words[1:])
        with leaving_at_once():
            if words[0] == "inspect":
                from lit_rebasin.cli.inspect import run_inspect as run
            elif words[0] == "align":
                from lit_rebasin.cli.align import run_align as run
            elif words[0] == "merge":
                from lit_rebasin.cli.merge import run_merge as run
            elif words[0] == "sweep":
                from lit_rebasin.cli.sweep import run_sweep as run
            elif words[0] == "report":
                from lit_rebasin.cli.report_command import run_report as run
            elif words[0] == "fit":
                from lit_rebasin.cli.fit import run_fit as run
            else:
                from lit_rebasin.cli.benchmark import run_benchmark as run
        with _quiet_threads(), interrupted_by_signals():
            run(words[1:])
    except TerminatedError as error:
        return ended_by_sigterm(words[0], error)
    except KeyboardInterrupt as error:
        return fail("interrupted", 130, error)
    except SystemExit as ending:  # --help and --print_config end with 0; Lightning turns Ctrl-C into an exit with 1
        if isinstance(ending.__context__, BrokenPipeError):  # rich has ended the process
            return 1
        if words[0] in ("inspect", "align", "merge"):
            if "--help" in words:
                return int(ending.code or 0)
            return fail(f"code of the network's has ended the program with SystemExit({ending})", 1, ending)
        if type(ending).__name__ == "SIGTERMException":  # Lightning's, without a code
            return ended_by_sigterm(words[0], ending)
        return 0 if not ending.code else fail("interrupted", 130, ending)
    except UsageError as error:
        return fail(str(error), 2, error)
    except BrokenPipeError:
        raise
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        place = error.filename or ("the disk is full" if is_full else "a file cannot be written or read")
        return fail(f"{place}: {error.strerror}" if error.strerror else str(error), 1, error)
    except (ValueError, RuntimeError, MemoryError) as error:
        nameless = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        return fail(str(error) or nameless, 1, error)
    except Exception as error:
        # Lightning's own complaints about a configuration; anything else is a fault of ours and keeps its traceback.
        if type(error).__name__ != "MisconfigurationException":
            raise
        return fail(str(error), 1, error)
    return 0


def _check_words(command: str, words: Sequence[str]) -> None:
    """Refuse what needs no parser to be seen wrong, before the slow imports."""
    pairs = [(*word.split("=", 1), *words[i + 1 : i + 2], "")[:2] for i, word in enumerate(words)]
    for option, value in pairs:
        if f"{option}={value}" in words and value == "--":  # which argparse takes for no value, in a list
            raise UsageError(f"{option} needs a value, got --")
        hint = FOREIGN_OPTIONS.get(command, {}).get(option.removesuffix("+"))
        if hint:
            raise UsageError(f"{command} has no option {option}; {hint}")
        if command in ("fit", "benchmark", "sweep") and option in _SECTIONS and not value.lstrip().startswith("{"):
            raise UsageError(
                f"{option} is a section: give its keys, as in {option}.KEY=VALUE, or a file of all with --config"
            )
        if option in ("-c", "--config") and not Path(value).is_file():
            raise UsageError(f"there is no configuration file {value}" if value else f"{option} needs a file")


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Leave out the traceback of a thread that cannot write, such as TensorBoard's, which raises the error in the main one as well."""

    def say(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            before(arguments)

    before, threading.excepthook = threading.excepthook, say
    try:
        yield
    finally:
        threading.excepthook = before
