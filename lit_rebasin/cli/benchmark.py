"""Several methods over several seeds on one stream."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lit_rebasin.cli.app import (
    ContinualCLI,
    hush,
    is_first_process,
    set_threads,
)
from lit_rebasin.cli.checks import check_benchmark
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.former import Former
from lit_rebasin.cli.methods import LEARNING, METHODS
from lit_rebasin.cli.output_folder import output_folder
from lit_rebasin.cli.report import refusals, results_table, write_pictures, write_results, write_table
from lit_rebasin.cli.results import Outcome, Setting, make_results
from lit_rebasin.cli.results_file import read_results
from lit_rebasin.cli.resume import finished_runs, remove_checkpoints
from lit_rebasin.cli.runs import Report, run_here, run_side_by_side


def run_benchmark(arguments: Sequence[str]) -> None:
    """Run several methods over several seeds."""
    hush()
    benchmark(ContinualCLI("benchmark", arguments))


def benchmark(cli: ContinualCLI) -> dict[str, Any]:
    """Run every method with every seed, and print the table.

    Results are written after each run, so that those of finished runs outlive an interruption or an error in a later one.

    Returns:
        What ``results.json`` holds.
    """
    methods, seeds, configured = check_benchmark(cli)
    _say_what_is_not_heeded(cli, methods)
    set_threads(cli.config.threads)
    planned = [(method, seed) for method in methods for seed in seeds]
    with output_folder(cli.config.output_dir) as folder:
        results = _run_all(cli, configured, planned, seeds, folder)
    if not is_first_process():
        return results
    Console().print(results_table(results))
    for sentence in refusals(results):
        Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
    Console(soft_wrap=True).print(f"Results, pictures and TensorBoard logs: {folder}")
    return results


def _run_all(
    cli: ContinualCLI,
    configured: Mapping[str, ContinualCLI],
    planned: Sequence[tuple[str, int]],
    seeds: Sequence[int],
    folder: Path,
) -> dict[str, Any]:
    """Run what is planned and not finished, and write what is known after each."""
    found, setting = _begun(folder, cli, planned)
    results = make_results(cli, setting, seeds, planned, found) if setting is not None else {}
    waiting = [run for run in planned if run not in found]
    if found and is_first_process():  # a kill may have come between the last results and what follows them
        write_table(folder, read_results(folder / "results.json"))
        for run in found:
            remove_checkpoints(_place(folder, *run))
    try:
        with _progress() as progress:
            bar = progress.add_task("starting", total=len(planned), completed=len(found))

            def report(share: float, text: str) -> None:
                progress.update(bar, advance=share, description=text)

            for run, outcome, setting in _finished(cli, configured, waiting, folder, report):
                found[run] = outcome
                results = make_results(cli, setting, seeds, planned, found)
                if is_first_process():
                    write_results(folder, results)
                    remove_checkpoints(_place(folder, *run))
    except BaseException as error:
        if results:
            lacking = ", ".join(results["protocol"]["missing"])
            error.add_note(f"The finished runs are in {folder / 'results.json'}; missing: {lacking}; --resume goes on")
        raise
    finally:
        if results and is_first_process():
            write_pictures(folder, results)
    return results


def _begun(
    folder: Path, cli: ContinualCLI, planned: Sequence[tuple[str, int]]
) -> tuple[dict[tuple[str, int], Outcome], Setting | None]:
    """Return the finished runs of a benchmark that goes on; nothing for one that begins."""
    if cli.config.resume and cli.config.overwrite:
        raise UsageError("--resume goes on with what is in output_dir, --overwrite begins anew: choose one")
    if cli.config.resume:
        return finished_runs(folder, cli, planned)
    if (folder / "results.json").exists() and not cli.config.overwrite:
        raise UsageError(
            f"{folder} holds results already; choose another --output_dir, pass --resume to go on with runs that are missing there, or "
            "--overwrite to replace them"
        )
    return {}, None


def _place(folder: Path, method: str, seed: int) -> Path:
    return folder / method / f"seed_{seed}"


def _finished(
    cli: ContinualCLI,
    configured: Mapping[str, ContinualCLI],
    planned: Sequence[tuple[str, int]],
    folder: Path,
    report: Report,
) -> Iterator[tuple[tuple[str, int], Outcome, Setting]]:
    """Run methods with seeds, and yield what each comes to as soon as it is finished."""
    places = [_place(folder, method, seed) for method, seed in planned]
    former = None if cli.config.resume else Former.of(folder)
    if cli.config.processes == 1:
        for (method, seed), place in zip(planned, places, strict=True):
            yield (method, seed), *run_here(configured[method], method, seed, place, report, former)
        return
    for number, (k, found) in enumerate(run_side_by_side(cli, planned, places, cli.config.processes, former), start=1):
        report(1, f"{number} of {len(planned)} runs")
        yield planned[k], *found


def _say_what_is_not_heeded(cli: ContinualCLI, methods: Sequence[str]) -> None:
    """Name what is set for all methods and does not concern some of them."""
    usual = cli.parser.get_defaults()
    for key in LEARNING:
        without = [method for method in methods if key in METHODS[method].unheeded]
        if without and cli.config.get(key) != usual.get(key):
            _say(key, without)
    if cli.config.parallel_tasks > 1:
        _say("--parallel_tasks", [method for method in methods if METHODS[method].merge is None])


def _say(key: str, methods: Sequence[str]) -> None:
    if methods and is_first_process():
        Console(stderr=True, soft_wrap=True).print(f"{key} does not concern {', '.join(methods)}.")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True, quiet=not is_first_process())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
