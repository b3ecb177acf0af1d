"""Checkpoints merged into one."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from lit_rebasin.cli.checkpoints import write_checkpoint
from lit_rebasin.cli.command_line import Words, check_files, pair_options, parse
from lit_rebasin.cli.correction import correction
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.examples import Examples
from lit_rebasin.cli.matching import Setting, align_pair, prepare
from lit_rebasin.cli.merge_many import merge_several
from lit_rebasin.cli.path_report import (
    console,
    describe_alignment,
    distance_row,
    measured,
    merge_rows,
    path_rows,
    print_files,
    print_table,
    write_path_figure,
)
from lit_rebasin.cli.progress import working
from lit_rebasin.merging import LinearPath, PathLosses, diagonal_fisher, fisher_alpha, line_search

Change = Callable[[nn.Module, float], object] | None
SEARCHES = ("line-search", "fisher")


def run_merge(arguments: Sequence[str]) -> None:
    """Bring checkpoints into one frame, merge them, and print what it has cost."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--alpha")
    parser.add_argument("--statistics")
    words = parse("merge", arguments, parser)
    options = words.options
    if len(options.checkpoints) < 2:
        raise UsageError(f"merge takes two checkpoints or more, got {len(options.checkpoints)}")
    if options.output is None:
        raise UsageError("merge needs the file to write, such as --output merged.safetensors")
    if len(options.checkpoints) == 2:
        _merge_pair(words)
    else:
        merge_several(words)


def _merge_pair(words: Words) -> None:
    options = words.options
    chosen = pair_options(words)
    fixed = _alpha(options.alpha)
    check_files(options)
    setting = prepare("merge", words)
    corrected = correction(options.statistics, setting)
    _check_search(fixed, setting.examples)
    alignment, moved = align_pair(setting, options, chosen, fixed if isinstance(fixed, float) else 0.5)
    model, reference = setting.networks
    naive, path = LinearPath(reference, model), LinearPath(reference, moved)
    change = corrected.along(path)
    paths: dict[str, tuple[LinearPath, Change]] = {"as they are": (naive, None), "aligned": (path, None)}
    if change is not None:
        paths[f"aligned, {corrected.name}"] = (path, change)
    curves = measured(setting.labelled, options.points, paths) if setting.labelled is not None else {}
    alpha = _chosen(fixed, path, list(curves.values()), setting, options.seed)
    merges = [_merged(one, alpha, statistics) for one, statistics in paths.values()]
    rows = [distance_row(model, moved, reference)]
    if setting.examples is not None and curves:
        rows += path_rows(curves.values()) + merge_rows(setting.examples, merges)
    write_checkpoint(Path(options.output), setting.as_written(merges[-1], 1))
    if curves:
        write_path_figure(options.picture, curves, alpha)
    print_files(setting)  # after all is written, for a reader such as head may end the process here
    console().print(describe_alignment(alignment))
    console().print(f"alpha, the weight of B: {alpha:.4g}{f', by {fixed}' if isinstance(fixed, str) else ''}")
    console().print(f"statistics: {corrected.name if 0 < alpha < 1 else 'none, for the merge is A or B'}")
    print_table("merge of A and B", list(paths) if curves else ["as they are", "aligned"], rows)
    console().print(f"The merge: {options.output}")
    if curves:
        console().print(f"The path: {options.picture}")


def _merged(path: LinearPath, alpha: float, change: Change) -> nn.Module:
    """Return a point of a path, corrected unless it is an end."""
    merged = path.module_at(alpha)
    if change is not None and 0 < alpha < 1:
        change(merged, alpha)
    return merged


def _alpha(text: str | None) -> float | str:
    """Return alpha as a number, or the name of a search for it."""
    if text in SEARCHES:
        return text
    try:
        alpha = float(text) if text is not None else 0.5
    except ValueError:
        alpha = float("nan")
    if not 0 <= alpha <= 1:
        raise UsageError(f"--alpha must be a number in [0, 1], {' or '.join(SEARCHES)}, got {text}")
    return alpha


def _check_search(alpha: float | str, examples: Examples | None) -> None:
    if alpha == "line-search" and (examples is None or not examples.labelled):
        raise UsageError("--alpha line-search needs data: give --data FILE.npz with the arrays x and y")
    if alpha == "fisher" and examples is None:
        raise UsageError("--alpha fisher needs data: give --data FILE.npz with the array x")


def _chosen(
    alpha: float | str,
    path: LinearPath,
    curves: Sequence[PathLosses],
    setting: Setting,
    seed: int,
) -> float:
    """Return alpha: the number, the lowest point of the path, or that of both Fisher informations."""
    if isinstance(alpha, float):
        return alpha
    if alpha == "line-search":
        return line_search(curves[-1])
    with working("Fisher information"):
        ends = (_fisher(network, setting, seed) for network in (setting.networks[1], path.network))
        return fisher_alpha(path, *ends)


def _fisher(network: nn.Module, setting: Setting, seed: int) -> dict[str, Tensor]:
    try:
        return diagonal_fisher(network, setting.inputs, seed=seed)
    except TypeError as error:
        raise UsageError(f"--alpha fisher cannot be had for {setting.path}: {error}") from None
