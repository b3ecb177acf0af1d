"""The permutation symmetries of one network, printed."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from lit_rebasin.cli.checkpoints import load_weights, open_checkpoint
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.files import check_target
from lit_rebasin.cli.network import build, example_input, imported, trace
from lit_rebasin.merging.whole_files import write_whole
from lit_rebasin.symmetry import Axis, PermutationSpec

# Axes that are named in a row of the table of what is fixed; --json names all.
_SHOWN = 4


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
    target = imported(options.model)
    held = None if options.checkpoint is None else open_checkpoint(options.checkpoint)
    model = build("inspect", options.model, target, words, held.arguments if held else {})
    example = example_input("inspect", options.input)
    if held is not None:
        load_weights(model, held)
    traced = trace(options.model, model, example)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = Inspection(options.model, parameters=parameters, coverage=traced.spec.coverage(model), **vars(traced))
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
    if options.figure is not None:
        check_target("--figure", options.figure, (".png", ".svg", ".pdf"), overwrite=True)
    return options, others


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
    path = Path(file)
    write_whole(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=150))
