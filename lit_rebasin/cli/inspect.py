"""The permutation symmetries of one network, printed."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import isclass
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.symmetry import Axis, PermutationSpec, check_invariance, permutation_spec

# Axes that are named in a row of the table of what is fixed; --json names all.
_SHOWN = 4

# Where checkpoints keep their weights, and what parallel training puts before the name of each.
_WEIGHTS = ("state_dict", "model", "model_state_dict")
_WRAPPER = "module."

# Advice of the Python functions for which the command has no words.
_FROM_AXES = " A spec can be written by hand with PermutationSpec.from_axes."
_UNCHECKED = ", or pass check=False to permutation_spec"


@dataclass(frozen=True)
class Inspection:
    """What is known of a network.

    Attributes:
        model: Its import path.
        spec: Its symmetries.
        parameters: Number of parameter elements.
        coverage: Share of them on at least one movable axis.
        invariance_error: Largest relative difference of an output under random permutations, or None if it could not be compared.
        unchecked: Why it could not be compared.
        seconds: Of finding the spec, and of the check.
    """

    model: str
    spec: PermutationSpec
    parameters: int
    coverage: float
    invariance_error: float | None
    unchecked: str | None
    seconds: dict[str, float]

    def to_json(self) -> str:
        """Return everything as text; `PermutationSpec.from_json` reads it too."""
        figures = {key: value for key, value in vars(self).items() if key != "spec"}
        return json.dumps(figures | json.loads(self.spec.to_json()), indent=1)


def run_inspect(arguments: Sequence[str]) -> None:
    """Find, check and print the symmetries of a network."""
    options, words = _options(list(arguments))
    target = _imported(options.model)
    held = {} if options.checkpoint is None else _read(options.checkpoint)
    model = _build(options.model, target, [*_saved_arguments(held), *words])
    args, kwargs = _inputs(options.input)
    if options.checkpoint is not None:
        _load(model, held, options.checkpoint)
    found = _inspect(options.model, model, args, kwargs)
    if options.figure is not None:
        _draw(found, model, options.figure)
    if options.json:
        Console().out(found.to_json(), highlight=False)  # unlike print, it ends quietly when head closes the pipe
    else:
        _print(found)


def _options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own options, and the words that are left for the network's arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model")
    parser.add_argument("--input", action="append", default=[])
    parser.add_argument("--checkpoint")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure")
    named = ["--model"] if words and not words[0].startswith("-") else []
    try:
        options, others = parser.parse_known_args([*named, *words])
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if options.model is None:
        raise UsageError("inspect needs the import path of a network, such as inspect torchvision.models.resnet50")
    if options.figure is not None and Path(options.figure).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--figure must be a .png, .svg or .pdf file, got {options.figure}")
    return options, others


def _imported(path: str) -> Any:
    """Return a class, a function or a module instance by its import path; modules of the current folder are found as well."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    if path.startswith(".") or Path(path).name != path or Path(path).is_file():
        raise UsageError(f"give the import path of a network, such as mine.Net for Net in mine.py, not {path}")
    module, _, name = path.rpartition(".")
    found = _attribute(path, _module(path, module), name)
    if not isinstance(found, nn.Module) and not callable(found):
        raise UsageError(
            f"{path} is of type {type(found).__name__}, not a torch.nn.Module or a function that makes one"
        )
    return found


def _module(path: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file does
        # A package that the file itself imports is missing in another way than the file.
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if missing or not module:
            raise _no_network(path, error if module else "it names no module") from None
        raise UsageError(f"importing {module} failed: {_words(error)}") from None


def _attribute(path: str, module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise _no_network(path, error) from None


def _no_network(path: str, why: object) -> UsageError:
    return UsageError(f"there is no network {path!r} ({why}); give an import path such as torchvision.models.resnet50")


def _words(error: BaseException) -> str:
    """Return an error with its kind, without which words such as 'width' of a KeyError say little."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _build(path: str, target: Any, words: list[str]) -> nn.Module:
    """Return the network, made with the arguments that begin with ``--model.``."""
    parser = ArgumentParser(prog=f"lit-rebasin inspect {path}", exit_on_error=False, allow_abbrev=False)
    if isclass(target):
        parser.add_class_arguments(target, "model", instantiate=False, fail_untyped=False)
    elif not isinstance(target, nn.Module):
        parser.add_function_arguments(target, "model", fail_untyped=False)
    torch.manual_seed(0)
    try:
        given = parser.parse_args(words, defaults=False)  # the defaults that it reads off a function can be wrong
    except (argparse.ArgumentError, TypeError) as error:
        raise UsageError(str(error)) from None
    try:
        made = vars(parser.instantiate(given).get("model", Namespace()))
        model = target if isinstance(target, nn.Module) else target(**made)
    except Exception as error:  # whatever the user's code does
        raise UsageError(f"{path} cannot be made: {_words(error)}") from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"{path} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def _read(file: str) -> dict[str, Any]:
    """Return what a checkpoint holds."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"checkpoint {file} cannot be read: {error.strerror}") from None
    except Exception:  # whatever the bytes of a file of another kind lead to
        raise UsageError(f"checkpoint {file} is no file of tensors that torch.load(weights_only=True) reads") from None
    if not isinstance(held, dict):
        raise UsageError(f"checkpoint {file} holds a {type(held).__name__}, not a state dict or a Lightning checkpoint")
    return held


def _saved_arguments(held: dict[str, Any]) -> list[str]:
    """Return the constructor arguments that a LightningModule saved in its checkpoint, as words of the command line."""
    words = []
    for name, value in held.get("hyper_parameters", {}).items():
        if value is None or isinstance(value, bool | int | float | str | list | dict):
            words.append(f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def _load(model: nn.Module, held: dict[str, Any], file: str) -> None:
    weights = next((held[key] for key in _WEIGHTS if isinstance(held.get(key), dict)), held)
    wrapped = all(str(name).startswith(_WRAPPER) for name in weights)  # saved by DistributedDataParallel
    if wrapped and not set(weights) & set(model.state_dict()):
        weights = {name.removeprefix(_WRAPPER): value for name, value in weights.items()}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"checkpoint {file} does not hold the weights of {type(model).__name__}: {error}") from None


def _inputs(texts: Sequence[str]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the example inputs by position and by name; integers are 0 and 1, which every vocabulary has."""
    if not texts:
        raise UsageError("inspect needs the shape of an example input, such as --input 1,3,224,224")
    args: list[Tensor] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:,\d+)*)(?::(\w+))?", text)
        dtype = getattr(torch, match[3] or "float32", None) if match else None
        if match is None or not isinstance(dtype, torch.dtype):
            raise UsageError(
                f"--input must be [NAME=]SHAPE[:DTYPE], such as 1,3,224,224 or ids=1,16:int64, got {text!r}"
            )
        shape = [int(size) for size in match[2].split(",")]
        if 0 in shape:
            raise UsageError(f"--input {text} is empty; every size must be at least 1")
        continuous = dtype.is_floating_point or dtype.is_complex
        value = torch.randn(shape).to(dtype) if continuous else torch.randint(2, shape).to(dtype)
        if match[1]:
            kwargs[match[1]] = value
        else:
            args.append(value)
    return args, kwargs


def _inspect(path: str, model: nn.Module, args: list[Tensor], kwargs: dict[str, Any]) -> Inspection:
    if not list(model.parameters()):
        raise ValueError(f"{path} has no parameters")
    try:
        return _found(path, model, args, kwargs)
    except Exception as error:
        if _runs(model, args, kwargs):
            raise
        why = str(error).removesuffix(_FROM_AXES).removesuffix(".")
        raise ValueError(
            f"{why}. {path} does not run on this input: check the shape, type and name in --input"
        ) from None


def _runs(model: nn.Module, args: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Return whether a network takes these inputs at all."""
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    except Exception:  # whatever the user's code does
        return False
    return True


def _found(path: str, model: nn.Module, args: list[Tensor], kwargs: dict[str, Any]) -> Inspection:
    start = perf_counter()
    spec = permutation_spec(model, *args, check=False, **kwargs)
    traced = perf_counter()
    error: float | None = None
    unchecked = None
    try:
        error = check_invariance(model, spec, *args, **kwargs)
    except ValueError as reason:  # such as a network that draws random numbers; a wrong spec is a RuntimeError
        unchecked = str(reason).replace(_UNCHECKED, "")
    seconds = {"spec": traced - start, "check": perf_counter() - traced}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Inspection(path, spec, parameters, spec.coverage(model), error, unchecked, seconds)


def _print(found: Inspection) -> None:
    console = Console(markup=False, highlight=False)
    groups = Table("", "group", title=found.model, show_lines=True)
    groups.add_column("size", justify="right")
    groups.add_column("moves", overflow="fold")
    for number, group in enumerate(found.spec.groups.values(), start=1):
        moves = ", ".join(describe(axis, group.size) for axis in group.axes)
        groups.add_row(str(number), group.name, str(group.size), moves)
    fixed = Table("fixed, because of", "axes", "such as")
    reasons: dict[str, list[str]] = {}
    for axis, reason in found.spec.fixed.items():
        reasons.setdefault(reason, []).append(axis)
    for reason, axes in reasons.items():
        fixed.add_row(reason, str(len(axes)), ", ".join(axes[:_SHOWN]))
    console.print(
        f"Coverage: {100 * found.coverage:.2f} % of {found.parameters:,} parameters lie on an axis that moves.",
        f"Found in {found.seconds['spec']:.2f} s.",
        soft_wrap=True,
    )
    if found.invariance_error is None:
        console.print(f"Not checked: {found.unchecked}", soft_wrap=True)
    else:
        console.print(
            f"Checked: random permutations change the output by {found.invariance_error:.1e} (relative).",
            f"{found.seconds['check']:.2f} s.",
            soft_wrap=True,
        )
    console.print(groups)
    console.print(fixed)


def describe(axis: Axis, size: int) -> str:
    """Return an axis in words: ``tensor[dim]``, and how the group lies along it where that is not the whole dimension one by one."""
    words = [str(axis)]
    if axis.before > 1 or axis.after > 1:
        words.append(f"as {axis.before} x {size} x {axis.after}")
    if axis.length is not None:
        words.append(f"from {axis.start}")
    if axis.step > 1:
        words.append(f"step {axis.step}")
    return " ".join(words)


def _draw(found: Inspection, model: nn.Module, file: str) -> None:
    from lit_rebasin.cli.symmetry_figure import symmetry_figure

    figure = symmetry_figure(found.spec, {name: tuple(p.shape) for name, p in model.named_parameters()})
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UsageError(f"--figure {file} cannot be written ({error.strerror}); choose another") from None
