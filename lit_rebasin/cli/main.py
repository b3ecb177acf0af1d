"""Entry of the command: answers for help and errors; the work is imported only when there is some."""

import sys
from collections.abc import Sequence

from lit_rebasin import __version__

HELP = f"""lit-rebasin {__version__}: continual learning by re-basin

usage: lit-rebasin fit --config FILE.yaml [--method NAME] [--KEY VALUE ...]
       lit-rebasin benchmark --config FILE.yaml [--methods A,B] [--seeds 0,1,2] [--data_dir DIR] [--output_dir DIR] [--KEY VALUE ...]

fit        trains one method over the stream, with TensorBoard logs and checkpoints
benchmark  runs several methods over several seeds; prints a table, writes results.json, results.md and pictures

methods: finetune, replay, average (replay and merging without alignment), rebasin (replay, alignment and merging)

Any key of the YAML file can be overridden, as in --data.n_tasks 10 or --merge.alpha 0.7.
lit-rebasin fit --help and lit-rebasin benchmark --help list them all.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words after ``lit-rebasin``; those of the process by default.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for wrong usage, 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in ("fit", "benchmark"):
        return _fail(f"there is no command {words[0]!r}; use fit or benchmark", 2)
    from lit_rebasin.cli.app import UsageError, run_benchmark, run_fit

    try:
        (run_fit if words[0] == "fit" else run_benchmark)(words[1:])
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except SystemExit as ending:  # --help and --print_config end with 0; Lightning turns Ctrl-C into an exit with 1
        return 0 if not ending.code else _fail("interrupted", 130)
    except UsageError as error:
        return _fail(str(error), 2)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        return _fail(str(error), 1)
    except Exception as error:
        # Lightning's own complaints about a configuration; anything else is a fault of ours and keeps its traceback.
        if type(error).__name__ != "MisconfigurationException":
            raise
        return _fail(str(error), 1)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"lit-rebasin: error: {' '.join(message.split())}", file=sys.stderr)
    return code
