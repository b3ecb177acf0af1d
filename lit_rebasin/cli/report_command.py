"""One page of HTML about a run."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.event_files import event_files, event_folders
from lit_rebasin.cli.progress import working
from lit_rebasin.cli.report import write_text
from lit_rebasin.cli.report_page import report_page
from lit_rebasin.cli.run_folder import read_folder
from lit_rebasin.cli.suggestions import did_you_mean


def run_report(arguments: Sequence[str]) -> None:
    """Read the folder of a run, and write its page."""
    options = _options(arguments)
    folder = Path(options.run_dir)
    with working(f"Reading {_size_of(folder)} of event files"):
        run = read_folder(options.run_dir)
    output = Path(options.output or folder / "report.html")
    _check_output(output)
    with working("Drawing"):
        page = report_page(run)
    write_text(output, page)
    Console(soft_wrap=True, markup=False, highlight=False).print(f"Report: {output}")


def _size_of(folder: Path) -> str:
    """Return how much there is to read, of which a second takes some megabytes."""
    n_bytes = sum(file.stat().st_size for place in event_folders(folder) for file in event_files(place))
    return f"{n_bytes / 1e6:.1f} MB"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("run_dir", nargs="?")
    parser.add_argument("--output")
    try:
        options, others = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if others:
        raise UsageError(
            f"report takes one folder and --output FILE, and nothing else, but got {others[0]}{did_you_mean(others[0], ['--output'])}"
        )
    if not options.run_dir:
        raise UsageError("report needs the folder of a run, such as report runs/rotated_digits")
    return options


def _check_output(output: Path) -> None:
    """Raise a `UsageError` for a file that cannot be written, or is hardly meant; an earlier report is replaced."""
    if output.suffix not in (".html", ".htm"):
        raise UsageError(f"--output must be a .html or .htm file, got {output}")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK) or output.is_dir():
        raise UsageError(f"{output} cannot be written; pass --output FILE.html in a folder that is there")
