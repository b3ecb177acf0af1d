"""The command lines of align and merge, taken apart and checked before anything is loaded."""

import argparse
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lit_rebasin.alignment import DISTANCES, LOSS_COSTS, METHODS
from lit_rebasin.cli.checkpoints import SUFFIXES
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.files import check_target
from lit_rebasin.cli.network import build, imported
from lit_rebasin.cli.parser_errors import in_words
from lit_rebasin.cli.suggestions import did_you_mean

PICTURES = (".png", ".svg", ".pdf")

# Of the methods' own arguments, those that have an option of another name, are no word, or belong to one that is none.
_LARGEST_SEED = 2**63 - 1
_NOT_WORDS = {"method", "init", "seed", "evaluate", "schedule"}


@dataclass(frozen=True)
class Words:
    """The command line, taken apart.

    Attributes:
        options: The command's own options, and ``checkpoints``.
        model: Arguments of the network.
        method: Arguments of the method.
    """

    options: argparse.Namespace
    model: list[str]
    method: list[str]


def parse(command: str, words: Sequence[str], parser: argparse.ArgumentParser) -> Words:
    """Take a command line apart, with a parser of the command's own options to which the shared ones are added."""
    parser.add_argument("--model")
    parser.add_argument("--input", action="append", default=[])
    parser.add_argument("--data")
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--method")
    parser.add_argument("--cost")
    parser.add_argument("--init")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output")
    parser.add_argument("--figure")
    parser.add_argument("--overwrite", action="store_true")
    own, model, method = _divide(words)
    try:
        options, others = parser.parse_known_args(own)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if not 0 <= options.seed <= _LARGEST_SEED:
        raise UsageError(f"seed must be from 0 to {_LARGEST_SEED}, got {options.seed}")
    for name, value in vars(options).items():
        if value == "":
            raise UsageError(f"--{name} needs a value")
    options.checkpoints = [word for word in others if not word.startswith("-")]
    unknown = [word for word in others if word.startswith("-") and word != "--help"]
    if unknown:
        option = unknown[0].partition("=")[0]
        known = [f"--{name}" for name in vars(options)]
        meant = did_you_mean(option, known) or f"; see lit-rebasin {command} --help"
        raise UsageError(f"{command} has no option {option}{meant}")
    if options.model is None:
        raise UsageError(f"{command} needs the import path of a network, such as --model torchvision.models.resnet18")
    if "--help" in others:  # of the network's arguments: it prints them, and ends the process
        build(command, options.model, imported(options.model), ["--help"], {})
    if options.batch_size < 1 or options.points < 3:
        raise UsageError("--batch_size must be at least 1, and --points at least 3")
    return Words(options, model, method)


def _divide(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Take out the arguments of the network and of the method, with their values."""
    parts: dict[str, list[str]] = {"": [], "--model.": [], "--options.": []}
    rest = iter(words)
    for word in rest:
        kind = next(prefix for prefix in ("--model.", "--options.", "") if word.startswith(prefix))
        parts[kind].append(word)
        if kind and "=" not in word:
            parts[kind].extend([value for value in [next(rest, None)] if value is not None])
    return parts[""], parts["--model."], parts["--options."]


def check_files(options: argparse.Namespace) -> None:
    """Refuse files that could not be written, before any work is done; ``options.picture`` is ``--figure``, or a file beside the output."""
    if options.output is not None:
        check_target("--output", options.output, SUFFIXES, options.overwrite)
    if options.figure is not None and options.data is None:
        raise UsageError("--figure draws the loss along the path, which needs --data FILE.npz with x and y")
    if options.figure is not None:
        check_target("--figure", options.figure, PICTURES, options.overwrite)
    options.picture = options.figure or str(Path(options.output or "path").with_suffix(".png"))


def check_method(options: argparse.Namespace, known: Collection[str]) -> None:
    """Raise a `UsageError` for a method that there is not."""
    if options.method not in known:
        raise UsageError(f"--method must be one of {', '.join(known)}, got {options.method}")


def pair_options(words: Words) -> dict[str, Any]:
    """Return the method's arguments; a `UsageError` for a method, start, cost or argument that is unknown, useless or lacks data."""
    options = words.options
    options.method = options.method or "weights"
    check_method(options, METHODS)
    costs = [*DISTANCES, *LOSS_COSTS]
    if options.init is not None and options.init not in METHODS:
        raise UsageError(f"--init must be one of {', '.join(METHODS)}, got {options.init}")
    if options.cost is not None and options.cost not in costs:
        raise UsageError(f"--cost must be one of {', '.join(costs)}, got {options.cost}")
    if options.cost is not None and METHODS[options.method][1] != "labels":
        raise UsageError(f"--cost is for sinkhorn and straight-through; {options.method} has one of its own")
    check_data(options, labelled=options.data is not None)
    return method_options(METHODS[options.method][0], options.method, words.method)


def method_options(function: Callable[..., Any] | None, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a method's function that are given as ``--options.NAME VALUE``.

    Raises:
        UsageError: If the function has no such argument, or it is of another type.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    known: list[str] = []
    if function is not None:
        parameters = inspect.signature(function).parameters.values()
        skip = {
            p.name
            for p in parameters
            if p.kind is not p.KEYWORD_ONLY or p.name in _NOT_WORDS or p.name.startswith("residual")
        }
        known = parser.add_function_arguments(function, "options", skip=set(skip), fail_untyped=False)
    for word in words:
        if word.startswith("--") and word.removeprefix("--").partition("=")[0] not in known:
            listed = ", ".join(f"--{option}" for option in known) or "none"
            raise UsageError(f"method {name} has no option {word.partition('=')[0]}; it has {listed}")
    try:
        given = parser.instantiate(parser.parse_args(list(words), defaults=False))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UsageError(in_words(error, parser)) from None
    return dict(vars(given.get("options", Namespace())))


def check_data(options: argparse.Namespace, labelled: bool) -> None:
    """Raise a `UsageError` if the method, or its start, needs data that there is not."""
    needs = METHODS[options.method][1]
    starts = METHODS[options.init][1] if options.init else ""
    for option, method, kind in (("method", options.method, needs), ("init", options.init, starts)):
        if kind == "inputs" and options.data is None:
            raise UsageError(f"{option} {method} needs data: give --data FILE.npz with the array x")
    cost = options.cost or ("midpoint" if options.data else "l2")
    if needs == "labels" and cost in LOSS_COSTS and not labelled:
        raise UsageError(
            f"the {cost} cost of {options.method} needs labels: give --data FILE.npz with the arrays x and y, or --cost l2"
        )
