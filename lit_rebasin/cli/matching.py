"""What the commands align and merge share: their options, their networks, and the alignment of two."""

import argparse
import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from lit_rebasin.alignment import Alignment, align
from lit_rebasin.alignment.align import DISTANCES, LOSS_COSTS, METHODS
from lit_rebasin.cli.checkpoints import SUFFIXES, load_weights, read_checkpoint
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.examples import Examples, check_labels, read_examples
from lit_rebasin.cli.files import check_target
from lit_rebasin.cli.network import Example, Traced, build, example_input, imported, runs, trace
from lit_rebasin.cli.progress import working
from lit_rebasin.symmetry import permute

PICTURES = (".png", ".svg", ".pdf")

# Of the methods' own arguments, those that have an option of another name, are no word, or belong to one that is none.
_NOT_WORDS = {"method", "init", "seed", "evaluate", "schedule"}


@dataclass(frozen=True)
class Setting:
    """What is aligned or merged.

    Attributes:
        path: Import path of the architecture.
        files: The checkpoints.
        networks: One a checkpoint, in evaluation mode; in float64 if a checkpoint is, else as they are made.
        dtypes: Of each checkpoint's tensors, by the network's names.
        traced: Their symmetries.
        example: What they were traced on.
        examples: What ``--data`` holds.
    """

    path: str
    files: Sequence[str]
    networks: list[nn.Module]
    dtypes: list[dict[str, torch.dtype]]
    traced: Traced
    example: Example
    examples: Examples | None

    @property
    def inputs(self) -> list[Tensor]:
        """Batches of inputs."""
        return [batch[0] for batch in self.examples.batches] if self.examples is not None else []

    @property
    def labelled(self) -> list[tuple[Tensor, ...]] | None:
        """Batches of inputs and labels, if there are any."""
        return self.examples.batches if self.examples is not None and self.examples.labelled else None

    def as_written(self, network: nn.Module, index: int) -> dict[str, Any]:
        """Return the state dict of a network in the dtypes of a checkpoint."""
        dtypes = self.dtypes[index]
        return {
            name: value.detach().to(dtypes[name]) if isinstance(value, Tensor) else value
            for name, value in network.state_dict().items()
        }


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
    options.checkpoints = [word for word in others if not word.startswith("-")]
    unknown = [word for word in others if word.startswith("-") and word != "--help"]
    if unknown:
        raise UsageError(f"{command} has no option {unknown[0]}; see lit-rebasin {command} --help")
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


def prepare(command: str, words: Words) -> Setting:
    """Load every checkpoint into the architecture, read the data, and trace the symmetries of the last one."""
    options = words.options
    target = imported(options.model)
    checkpoints = [read_checkpoint(file) for file in options.checkpoints]
    built = build(command, options.model, target, words.model, checkpoints[0].arguments).eval()
    if any(_is_double(value) for checkpoint in checkpoints for value in checkpoint.weights.values()):
        built = built.double()
    networks, held = [], []
    for checkpoint in checkpoints:
        networks.append(copy.deepcopy(built))
        held.append(load_weights(networks[-1], checkpoint))
        _check_finite(networks[-1], checkpoint.file)
    dtype = next((p.dtype for p in built.parameters() if p.is_floating_point()), torch.float32)
    examples = read_examples(options.data, options.batch_size, dtype, options.seed) if options.data else None
    if options.figure is not None and examples is not None and not examples.labelled:
        raise UsageError(f"--figure draws the loss along the path, which needs the labels y in {examples.file}")
    if examples is not None and examples.labelled and len(networks) == 2:
        check_target("--figure", options.picture, PICTURES, options.overwrite)
    example = _example(command, options.input, examples, dtype)
    with working("tracing the network"):
        traced = trace(options.model, networks[-1], example)
    if examples is not None and not runs(networks[-1], _of(examples)):
        raise UsageError(f"{options.model} does not run on {_of(examples).origin}")
    if examples is not None and examples.labelled:
        check_labels(networks[-1], options.model, examples)
    dtypes = [{name: value.dtype for name, value in one.items() if isinstance(value, Tensor)} for one in held]
    return Setting(options.model, options.checkpoints, networks, dtypes, traced, example, examples)


def _is_double(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _check_finite(network: nn.Module, file: str) -> None:
    parameters = dict(network.named_parameters())
    for name, tensor in [*parameters.items(), *network.named_buffers()]:
        if tensor.isnan().any() or (name in parameters and tensor.isinf().any()):
            raise UsageError(f"tensor {name!r} of checkpoint {file} holds a NaN or an infinity")


def _example(command: str, texts: Sequence[str], examples: Examples | None, dtype: torch.dtype) -> Example:
    """Return what the network is traced on: ``--input``, or two examples of the data."""
    if texts:
        example = example_input(command, texts)
        args = tuple(value.to(dtype) if value.is_floating_point() else value for value in example.args)
        kwargs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in example.kwargs.items()}
        return Example(args, kwargs)
    if examples is None:
        raise UsageError(
            f"{command} needs the shape of an example input, such as --input 1,3,224,224, or --data FILE.npz"
        )
    return _of(examples)


def _of(examples: Examples) -> Example:
    """Return two examples of the data, which is enough to tell what can be longer."""
    inputs = examples.batches[0][0]
    return Example((inputs[:2],), {}, f"x of {examples.file}, here {tuple(inputs.shape)} of {inputs.dtype}")


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
    _check_data(options, labelled=options.data is not None)
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
        raise UsageError(str(error)) from None
    return vars(given.get("options", Namespace()))


def align_pair(
    setting: Setting, options: argparse.Namespace, chosen: dict[str, Any], alpha: float = 0.5
) -> tuple[Alignment, nn.Module]:
    """Return how the first network is carried towards the second, and the first one moved.

    Args:
        setting: The two networks.
        options: Of the command line.
        chosen: What `pair_options` returned.
        alpha: Weight of the reference in the incremental cost.
    """
    _check_data(options, labelled=setting.labelled is not None)
    model, reference = setting.networks
    with working(f"aligning: {options.method}"):
        alignment = align(
            model,
            reference,
            method=options.method,
            spec=setting.traced.spec,
            data=setting.examples.batches if setting.examples else None,
            cost=options.cost,
            init=options.init,
            alpha=alpha,
            seed=options.seed,
            **chosen,
        )
    return alignment, permute(model, setting.traced.spec, alignment.permutations)


def _check_data(options: argparse.Namespace, labelled: bool) -> None:
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
