"""One checkpoint carried towards another."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_rebasin.cli.checkpoints import write_checkpoint
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.matching import align_pair, check_files, check_pair_method, parse, prepare
from lit_rebasin.cli.path_report import (
    console,
    describe_alignment,
    distance_row,
    number,
    path_rows,
    print_files,
    print_table,
    write_path_figure,
)
from lit_rebasin.merging import LinearPath, has_batch_norm, loss_barrier


def run_align(arguments: Sequence[str]) -> None:
    """Align A to B, and print what it has brought."""
    words = parse("align", arguments, argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False))
    options = words.options
    options.method = options.method or "weights"
    if len(options.checkpoints) != 2:
        raise UsageError(f"align takes two checkpoints, A and the reference B, got {len(options.checkpoints)}")
    check_pair_method(options)
    check_files(options)
    setting = prepare("align", words)
    alignment, moved = align_pair(setting, words)
    model, reference = setting.networks
    rows = [
        distance_row(model, moved, reference),
        (f"cost of {alignment.method}", number(alignment.history[0]), number(alignment.cost)),
    ]
    if setting.labelled is not None:
        before = loss_barrier(LinearPath(reference, model), setting.labelled, options.points)
        after = loss_barrier(LinearPath(reference, moved), setting.labelled, options.points)
        rows += path_rows(before, after)
    print_files(setting)
    console().print(describe_alignment(alignment))
    print_table("from A to B", ("as they are", "aligned"), rows)
    if options.output is not None:
        write_checkpoint(Path(options.output), setting.as_written(moved, 0))
        console().print(f"Aligned A: {options.output}")
    if setting.labelled is not None:
        if has_batch_norm(model):
            console().print(
                "BatchNorm's statistics are averaged along this path; lit-rebasin merge gives a merge its own."
            )
        write_path_figure(options.picture, {"as they are": before, "aligned": after})
        console().print(f"The path: {options.picture}")
