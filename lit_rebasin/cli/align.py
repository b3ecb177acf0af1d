"""One checkpoint carried towards another."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_rebasin.cli.checkpoints import write_checkpoint
from lit_rebasin.cli.command_line import check_files, pair_options, parse
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.matching import align_pair, prepare
from lit_rebasin.cli.path_report import (
    console,
    describe_alignment,
    distance_row,
    measured,
    number,
    path_rows,
    print_files,
    print_table,
    write_path_figure,
)
from lit_rebasin.merging import LinearPath, has_batch_norm


def run_align(arguments: Sequence[str]) -> None:
    """Align A to B, and print what it has brought."""
    words = parse("align", arguments, argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False))
    options = words.options
    if len(options.checkpoints) != 2:
        raise UsageError(f"align takes two checkpoints, A and the reference B, got {len(options.checkpoints)}")
    chosen = pair_options(words)
    check_files(options)
    setting = prepare("align", words)
    alignment, moved = align_pair(setting, options, chosen)
    model, reference = setting.networks
    rows = [
        distance_row(model, moved, reference),
        ("cost, at start and end", number(alignment.history[0]), number(alignment.cost)),
    ]
    written = []
    if options.output is not None:
        write_checkpoint(Path(options.output), setting.as_written(moved, 0))
        written.append(f"Aligned A: {options.output}")
    if setting.labelled is not None:
        paths = {"as they are": LinearPath(reference, model), "aligned": LinearPath(reference, moved)}
        curves = measured(setting.labelled, options.points, {label: (path, None) for label, path in paths.items()})
        rows += path_rows(curves.values())
        write_path_figure(options.picture, curves)
        written.append(f"The path: {options.picture}")
        if has_batch_norm(model):
            written.append(
                "Statistics of BatchNorm are averaged on this path; lit-rebasin merge gives a merge its own."
            )
    print_files(setting)  # after all is written, for a reader such as head may end the process here
    console().print(describe_alignment(alignment))
    print_table("from A to B", ("as they are", "aligned"), rows)
    for line in written:
        console().print(line)
