"""The configuration behind both commands."""

import json
import logging
import shlex
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.metadata import version
from platform import python_version
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from typing_extensions import override

from lit_rebasin.callbacks import RebasinMerge
from lit_rebasin.cli.completeness import check_amounts, check_places
from lit_rebasin.cli.configuration_files import check_file, named_files
from lit_rebasin.cli.errors import UsageError, refusing
from lit_rebasin.cli.methods import METHODS
from lit_rebasin.cli.parser_errors import in_words
from lit_rebasin.continual import ContinualClassifier, ContinualDataModule

_MOST_THREADS = 1024  # more would run out of memory before anything is computed
PACKAGES = (
    "lit-rebasin",
    "torch",
    "lightning",
    "torchmetrics",
    "torchvision",
    "avalanche-lib",
    "pot",
    "numpy",
    "scipy",
)


def _as_written(value: Namespace) -> dict[str, Any]:
    """Return what looked like a class, which the parser has made a Namespace, less what an optimizer gets from its model."""
    written: dict[str, Any] = value.as_dict()
    if written.get("init_args", {}).get("params", 0) is None:
        del written["init_args"]["params"]
    return written


def _files_first(words: Sequence[str]) -> list[str]:
    """Return the words of a command with its configuration files in front, so that what is given by hand goes before what a file says."""
    files: list[str] = []
    others: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        named = word.startswith("--config=") or {"-c", "--config"} & {word, before}
        (files if named else others).append(word)
    return files + others


class ContinualCLI(LightningCLI):
    """Parse the one YAML file that both commands read; nothing is instantiated until a method and a seed are chosen."""

    def __init__(self, command: str, arguments: Sequence[str], beside: Sequence[str] = ()) -> None:
        self.command, self.arguments = command, _files_first(arguments)
        for file in named_files(self.arguments):
            check_file(file)
        try:
            super().__init__(
                ContinualClassifier,
                ContinualDataModule,
                args=self.arguments,
                run=False,
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs={
                    "prog": f"lit-rebasin {command}",
                    "description": "Continual learning by re-basin.",
                    "exit_on_error": False,
                    "allow_abbrev": False,
                },
            )
        except (ArgumentError, TypeError, OverflowError) as error:
            raise UsageError(in_words(error, self.parser, beside)) from None
        except ValueError as error:  # all that is done beside parsing is to seed
            raise UsageError(f"seed_everything: {error}") from None
        self.config.per_method = json.loads(json.dumps(self.config.per_method, default=_as_written))
        self._check_arguments()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a benchmark needs beyond trainer, model and data."""
        names = ", ".join(METHODS)
        parser.add_argument("--method", type=str, default="rebasin", help=f"What `fit` trains: {names}.")
        parser.add_argument(
            "--methods", type=list[str] | str, default=["finetune", "replay", "rebasin"], help="What `benchmark` runs."
        )
        parser.add_argument(
            "--seeds", type=list[int] | int | str, default=[0, 1, 2], help="Seeds of `benchmark`, as in 0,1,2."
        )
        parser.add_argument(
            "--data_dir", type=str | None, default=None, help="Folder of the data sets; the same as --data.data_dir."
        )
        parser.add_argument("--output_dir", type=str, default="runs", help="Where results, logs and checkpoints go.")
        parser.add_argument(
            "--overwrite", action="store_true", help="Let `benchmark` replace results that are in output_dir already."
        )
        parser.add_argument(
            "--resume", action="store_true", help="Let `benchmark` go on with the runs that were stopped in output_dir."
        )
        parser.add_argument(
            "--per_method",
            type=dict[str, dict[str, Any]],
            default={},
            help="What differs for a method of `benchmark`: keys of this file with their dots, and options of Avalanche's strategies.",
        )
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint from which `fit` goes on.")
        parser.add_argument(
            "--threads", type=int | None, default=None, help="CPU threads; a small network is fastest with 1."
        )
        parser.add_argument(
            "--parallel_tasks",
            type=int,
            default=1,
            help="Tasks that `benchmark` trains at a time, in processes of their own, where each begins afresh.",
        )
        parser.add_argument(
            "--processes",
            type=int,
            default=1,
            help="Methods and seeds that `benchmark` runs at a time, each in a process of its own.",
        )
        parser.add_class_arguments(RebasinMerge, "merge")
        parser.link_arguments("data.n_classes", "model.n_classes", apply_on="instantiate")
        parser.link_arguments("data.n_heads", "model.n_heads", apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, such that an optimizer of another class has its own defaults and not those of the one in its place."""
        super().parse_arguments(parser, args)
        chosen = self.config.model.optimizer.class_path
        if chosen != parser.get_defaults().model.optimizer.class_path:
            parser.set_defaults({"model.optimizer": {"class_path": chosen}})
            super().parse_arguments(parser, args)

    def for_method(self, method: str) -> "ContinualCLI":
        """Return the configuration of a method of `benchmark`: what ``per_method`` says of it is read like words of the command line."""
        own = self.config.per_method.get(method, {})
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in own.items()}
        words = [f"--{key}={text}" for key, text in texts.items() if "." in key]
        if not words:
            return self
        try:
            return ContinualCLI(self.command, [*self.arguments, *words])
        except (UsageError, ValueError) as error:
            raise UsageError(f"per_method of {method!r}: {error}") from None

    @refusing()
    def _check_arguments(self) -> None:
        """Say what classes refuse before any run, also one that does without them."""
        for name in ("method", "output_dir"):  # null is any type's to the parser
            if not self.config[name]:
                raise UsageError(f"{name} must be a text, got {'null' if self.config[name] is None else 'nothing'}")
        check_amounts(self.config.trainer)
        check_places(self.config.trainer)
        RebasinMerge(**self.config.merge.as_dict())
        names = ("weighting", "lr_decay", "lr_schedule", "distillation", "temperature", "mixup")
        loss = {name: self.config.model[name] for name in names}
        ContinualClassifier(nn.Identity(), **loss)
        transform = self.config.data.replay_transform
        if transform is not None:
            parser = LightningArgumentParser(exit_on_error=False)
            parser.add_argument("--replay_transform", type=nn.Module)
            try:
                parser.instantiate_classes(parser.parse_object({"replay_transform": transform}))
            except (ArgumentError, TypeError, ValueError) as error:
                raise UsageError(f"data.replay_transform: {in_words(error)}") from None

    def make(self, config: Namespace) -> Namespace:
        """Return a configuration with the objects that it describes.

        Raises:
            ValueError: In the words of the class that refuses its arguments.
            UsageError: If it makes nothing of them.
        """
        try:
            made: Namespace = self.parser.instantiate(config)
        except (ArgumentError, ValueError, RuntimeError) as error:
            raise ValueError(in_words(error)) from error
        except SystemExit as error:
            raise UsageError(
                f"what model, data, merge or a callback names has ended with SystemExit({error})"
            ) from error
        except (TypeError, OverflowError) as error:  # of a class that does not look at its arguments
            about = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(f"an argument of model, data, merge or a callback is of a wrong kind: {about}") from error
        except (LookupError, AttributeError, AssertionError, ArithmeticError) as error:  # of a user's class
            raise UsageError(
                f"what model, data, merge or a callback names cannot be made: {type(error).__name__}: {error}"
            ) from error
        return made

    def strategy_options(self, method: str) -> dict[str, Any]:
        """Return what ``per_method`` says of a method that is no key of the configuration."""
        return {key: value for key, value in self.config.per_method.get(method, {}).items() if "." not in key}

    def instantiate_classes(self) -> None:
        """Leave it to `build_run`, which does it once a method and seed."""


def package_versions() -> dict[str, str]:
    """Return the versions of Python and the packages that a result depends on."""
    return {"python": python_version(), **{name: version(name) for name in PACKAGES}}


def command_line() -> str:
    """Return the command that runs, such that a shell takes it."""
    return shlex.join(["lit-rebasin", *sys.argv[1:]])


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads, if it is given."""
    if threads is None:
        return
    if not 1 <= threads <= _MOST_THREADS:
        raise UsageError(f"threads must be from 1 to {_MOST_THREADS}, got {threads}")
    torch.set_num_threads(threads)


def is_first_process() -> bool:
    """Return whether this process is the one that writes, of those that train one model (DDP)."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def hush() -> None:
    """Silence what Lightning and its dependencies say about things that a benchmark does on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
