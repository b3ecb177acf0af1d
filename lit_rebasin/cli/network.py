"""A network named on the command line: imported, made, and traced on an example input."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import isclass
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.parser_errors import in_words
from lit_rebasin.symmetry import PermutationSpec, check_invariance, permutation_spec

# Advice of the Python functions for which the commands have no words.
_FROM_AXES = " A spec can be written by hand with PermutationSpec.from_axes."
_UNCHECKED = ", or pass check=False to permutation_spec"


def imported(path: str) -> Any:
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
    about = next(iter(str(error).splitlines()), "")  # torch adds where in its own code it was raised
    return f"{type(error).__name__}: {about}" if about else type(error).__name__


def build(command: str, path: str, target: Any, words: Sequence[str], saved: Mapping[str, Any]) -> nn.Module:
    """Return the network, made with the arguments that begin with ``--model.``.

    Args:
        command: Name of the command, for its help.
        path: Import path of ``target``.
        target: What `imported` found.
        words: The arguments on the command line, which win over those saved.
        saved: Arguments that a LightningModule saved in its checkpoint. They are another class's, and left, unless ``target`` has all of them.
    """
    parser = ArgumentParser(prog=f"lit-rebasin {command} {path}", exit_on_error=False, allow_abbrev=False)
    names: list[str] = []
    if isclass(target):
        names = parser.add_class_arguments(target, "model", instantiate=False, fail_untyped=False)
    elif not isinstance(target, nn.Module):
        names = parser.add_function_arguments(target, "model", fail_untyped=False)
    if {f"model.{name}" for name in saved} <= set(names):
        words = [*(f"--model.{name}={_as_word(value)}" for name, value in saved.items()), *words]
    torch.manual_seed(0)
    try:
        given = parser.parse_args(list(words), defaults=False)  # the defaults that it reads off a function can be wrong
    except (argparse.ArgumentError, TypeError) as error:
        raise UsageError(in_words(error, parser)) from None
    try:
        made = vars(parser.instantiate(given).get("model", Namespace()))
        model = target if isinstance(target, nn.Module) else target(**made)
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise UsageError(f"{path} cannot be made: {_words(error)}") from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"{path} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Example:
    """Inputs of one forward pass, by position and by name, and where they came from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str = "the shape, type and name in --input"


def example_input(command: str, texts: Sequence[str]) -> Example:
    """Return the inputs that ``--input`` describes; integers are 0 and 1, which every vocabulary has."""
    if not texts:
        raise UsageError(f"{command} needs the shape of an example input, such as --input 1,3,224,224")
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
        try:
            value = torch.randn(shape).to(dtype) if continuous else torch.randint(2, shape).to(dtype)
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"--input {text} cannot be made: {_words(error)}") from None
        if match[1]:
            kwargs[match[1]] = value
        else:
            args.append(value)
    return Example(tuple(args), kwargs)


@dataclass(frozen=True)
class Traced:
    """The symmetries of a network, and how they were checked.

    Attributes:
        spec: The symmetries.
        invariance_error: Largest relative difference of an output under random permutations, or None if it could not be compared.
        unchecked: Why it could not be compared.
        seconds: Of finding the spec, and of the check.
    """

    spec: PermutationSpec
    invariance_error: float | None
    unchecked: str | None
    seconds: dict[str, float]


def trace(path: str, model: nn.Module, example: Example) -> Traced:
    """Find and check the symmetries of a network; the error says so if it does not run on the example at all."""
    if not list(model.parameters()):
        raise ValueError(f"{path} has no parameters")
    with _explained(path, model, example):
        start = perf_counter()
        spec = permutation_spec(model, *example.args, check=False, **example.kwargs)
        traced = perf_counter()
        error: float | None = None
        unchecked = None
        try:
            error = check_invariance(model, spec, *example.args, **example.kwargs)
        except ValueError as reason:  # such as a network that draws random numbers; a wrong spec is a RuntimeError
            unchecked = str(reason).replace(_UNCHECKED, "")
        return Traced(spec, error, unchecked, {"spec": traced - start, "check": perf_counter() - traced})


@contextmanager
def _explained(path: str, model: nn.Module, example: Example) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        if runs(model, example):
            raise
        why = str(error).removesuffix(_FROM_AXES).removesuffix(".")
        raise ValueError(f"{why}. {path} does not run on this input: check {example.origin}") from None


def runs(model: nn.Module, example: Example) -> bool:
    """Return whether a network takes these inputs at all."""
    try:
        with torch.no_grad():
            model.eval()(*example.args, **example.kwargs)
    except (Exception, SystemExit):  # whatever the user's code does
        return False
    return True
