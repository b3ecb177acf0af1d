"""Entry of the command: answers for help and errors; the work is imported only when there is some."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lit_rebasin import __version__
from lit_rebasin.cli.errors import UsageError

HELP = f"""lit-rebasin {__version__}: continual learning by re-basin

usage: lit-rebasin fit --config FILE.yaml [--method NAME] [--KEY VALUE ...]
       lit-rebasin benchmark --config FILE.yaml [--methods A,B] [--seeds 0,1,2] [--data_dir DIR] [--output_dir DIR] [--KEY VALUE ...]
       lit-rebasin inspect MODEL --input SHAPE [--model.NAME VALUE ...] [--json] [--figure FILE]

fit        trains one method over the stream, with TensorBoard logs and checkpoints
benchmark  runs several methods over several seeds; prints a table, writes results.json, results.md and pictures
inspect    prints which neurons, channels and heads of a network may be permuted together, what is fixed and why

methods: finetune, replay, average (replay and merging without alignment), rebasin (replay, alignment and merging)

Any key of the YAML file can be overridden, as in --data.n_tasks 10 or --merge.alpha 0.7.
lit-rebasin fit --help and lit-rebasin benchmark --help explain the keys of most use, --help_all lists every one;
lit-rebasin inspect --help explains what it reads.
"""

KEYS = """
 --config FILE               the YAML file; both commands read the same one
 --print_config              print the configuration in full, defaults too, and stop
 --help_all                  list every key with its type and default

 --output_dir DIR            where results, logs and checkpoints go (runs)
 --data_dir DIR              folder of the data sets (data), or the .npz of the benchmark arrays
 --threads N                 CPU threads; a small network is fastest with 1

 --data.benchmark NAME       rotated-digits, rotated-mnist, permuted-mnist, split-mnist, rotated-fashion-mnist, split-cifar10,
                             split-cifar100 or arrays (rotated-digits)
 --data.scenario NAME        domain, class or task; the benchmark's own by default
 --data.n_tasks N            number of tasks; the benchmark's own by default
 --data.epochs_per_task N    epochs spent on each task (5)
 --data.batch_size N         new examples in a batch (64)
 --data.replay_per_class K   examples kept of each class of each task (0)
 --data.validation_fraction F  validate on this share of the training data, held back, not on the test data (0)
 --data.download true        fetch a data set that is missing

 --model.backbone PATH       import path of the network; its arguments as --model.backbone.NAME VALUE
 --model.n_features N        width of the backbone's output, if it ends in features and not in logits
 --model.optimizer PATH      import path of the optimizer (torch.optim.AdamW); its arguments as --model.optimizer.NAME VALUE

 --merge.alpha A             weight of the previous model in [0, 1], or line-search (0.8)
 --merge.method NAME         weights, sinkhorn or identity (weights)
 --merge.cost NAME           what sinkhorn minimises: incremental, midpoint, random-point or l2 (incremental)

 --trainer.KEY VALUE         any argument of Lightning's Trainer
"""

COMMAND_HELP = {
    "fit": f"""usage: lit-rebasin fit --config FILE.yaml [--method NAME] [--KEY VALUE ...]

Train one method over the stream, with TensorBoard logs and checkpoints. Defaults are in parentheses.

 --method NAME               finetune, replay, average or rebasin (rebasin)
 --seed_everything N         seed of everything drawn (0)
 --ckpt_path FILE            checkpoint from which to go on, or last for the latest of the same run
{KEYS}""",
    "benchmark": f"""usage: lit-rebasin benchmark --config FILE.yaml [--methods A,B] [--seeds 0,1,2] [--KEY VALUE ...]

Run several methods over several seeds; print a table, write results.json, results.md and pictures. Defaults are in parentheses.

 --methods A,B               any of finetune, replay, average, rebasin (finetune,replay,rebasin)
 --seeds A,B                 one run a method and seed (0,1,2)
 --overwrite                 replace results that are in output_dir already
{KEYS}""",
    "inspect": """usage: lit-rebasin inspect MODEL --input SHAPE [--model.NAME VALUE ...] [--json] [--figure FILE]

Find the permutation groups of a network, check them with random permutations, and print their sizes, the axes that each moves, what is
fixed and why, and the share of the parameters that can move.

 MODEL, or --model PATH      import path of a module's class, of a function that makes one or of a module, such as
                             torchvision.models.resnet50; files of the current folder are found too
 --model.NAME VALUE          an argument of that class or function
 --input SHAPE               shape of an example input, as in 1,3,224,224; several inputs: the option again; 1,16:int64 for another
                             type than float32 (integers are drawn from 0 and 1); NAME=1,16 for an input by name
 --checkpoint FILE           take the weights from this state dict or checkpoint, and the arguments that a LightningModule saved in it
 --json                      print everything as JSON, the spec in the form that PermutationSpec.from_json reads
 --figure FILE               draw which group moves which axis, to a .png, .svg or .pdf file
 --help_all                  list the arguments of MODEL
""",
}


# Both commands read one YAML file, so each parser knows these keys, but on the command line they would be ignored.
FOREIGN_OPTIONS = {
    "fit": {"--methods": "use --method", "--seeds": "use --seed_everything", "--overwrite": "it belongs to benchmark"},
    "benchmark": {"--method": "use --methods", "--seed_everything": "use --seeds", "--ckpt_path": "it belongs to fit"},
}


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
    if words[0] not in COMMAND_HELP:
        return _fail(f"there is no command {words[0]!r}; use {', '.join(COMMAND_HELP)}", 2)
    if {"-h", "--help"} & set(words):
        print(COMMAND_HELP[words[0]])
        return 0
    words = ["--help" if word == "--help_all" else word for word in words]
    here = str(Path.cwd())
    if here not in sys.path:  # last, so that a user's file shadows no package
        sys.path.append(here)
    try:
        _check_words(words[0], words[1:])
        with _exit_on_interrupt():
            if words[0] == "inspect":
                from lit_rebasin.cli.inspect import run_inspect as run
            elif words[0] == "fit":
                from lit_rebasin.cli.fit import run_fit as run
            else:
                from lit_rebasin.cli.benchmark import run_benchmark as run
        run(words[1:])
    except KeyboardInterrupt as error:
        return _fail("interrupted", 130, error)
    except SystemExit as ending:  # --help and --print_config end with 0; Lightning turns Ctrl-C into an exit with 1
        if words[0] == "inspect":  # its reader, such as head, has closed the pipe
            return int(ending.code or 0)
        return 0 if not ending.code else _fail("interrupted", 130, ending)
    except UsageError as error:
        return _fail(str(error), 2)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        return _fail(str(error), 1, error)
    except Exception as error:
        # Lightning's own complaints about a configuration; anything else is a fault of ours and keeps its traceback.
        if type(error).__name__ != "MisconfigurationException":
            raise
        return _fail(str(error), 1, error)
    return 0


def _check_words(command: str, words: Sequence[str]) -> None:
    """Refuse what needs no parser to be seen wrong, before the slow imports."""
    pairs = [(*word.split("=", 1), *words[i + 1 : i + 2], "")[:2] for i, word in enumerate(words)]
    for option, value in pairs:
        hint = FOREIGN_OPTIONS.get(command, {}).get(option.removesuffix("+"))
        if hint:
            raise UsageError(f"{command} has no option {option}; {hint}")
        if (
            option in ("-c", "--config")
            and Path(value).suffix in (".yaml", ".yml", ".json")
            and not Path(value).is_file()
        ):
            raise UsageError(f"there is no configuration file {value}")


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """End at once on Ctrl-C, which torch's native code would turn into an abort while it is imported."""

    def leave(*_: object) -> None:
        os._exit(_fail("interrupted", 130))

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    sentences = [" ".join(part.split()) for part in (message, *getattr(error, "__notes__", []))]
    print(f"lit-rebasin: error: {'. '.join(part.removesuffix('.') for part in sentences)}", file=sys.stderr, flush=True)
    return code
