"""What a run leaves behind: tables, results and pictures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_rebasin.merging.whole_files import write_whole
from lit_rebasin.metrics import (
    accuracy_matrices_figure,
    accuracy_matrix_figure,
    accuracy_over_tasks_figure,
    after_task,
    average_accuracy,
    forgetting,
)

COLUMNS = {
    "accuracy": "avg accuracy %",
    "forgetting": "forgetting %",
    "backward_transfer": "backward transfer %",
    "seconds": "seconds",
}


# What a benchmark writes beside the folders of its runs; what the others are made of comes last.
FILES = ("accuracy_matrix.png", "accuracy_over_tasks.png", "results.md", "results.json")


def results_table(results: dict[str, Any]) -> Table:
    """Return the table of a benchmark: mean and standard deviation over the seeds."""
    n_seeds = len(results["protocol"]["seeds"])
    table = Table("method", title=f"{stream_name(results)}, {n_seeds} seed{'s' * (n_seeds > 1)}")
    for header in COLUMNS.values():
        table.add_column(header, justify="right")
    for row in _rows(results):
        table.add_row(*row)
    return table


def seeds_of(results: Mapping[str, Any], method: str) -> list[Any]:
    """Return the seeds that a method has finished."""
    protocol = results["protocol"]
    return [seed for seed in protocol["seeds"] if f"{method} seed {seed}" not in protocol["missing"]]


def refusals(results: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every merge that was refused."""
    return [
        f"{method} seed {seed}: the merge after task {entry['task']} was refused: {entry['refused']}; the {entry['kept']} model was kept."
        for method, found in results["methods"].items()
        for seed, refused in zip(seeds_of(results, method), found.get("refused", []), strict=False)
        for entry in refused
    ]


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json`` and ``results.md``, each complete or not at all."""
    write_text(folder / "results.json", json.dumps(results, indent=1))
    write_table(folder, results)


def write_table(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.md``, complete or not at all."""
    header = ["method", *COLUMNS.values()]
    lines = [header, ["---"] + ["---:"] * len(COLUMNS), *_rows(results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    protocol = results["protocol"]
    missing = f"Not finished: {', '.join(protocol['missing'])}.\n\n" if protocol["missing"] else ""
    n_threads = protocol["threads"]
    about = (
        f"{stream_name(results)}; mean and standard deviation over seeds {', '.join(map(str, protocol['seeds']))}.\n\n{missing}"
        f"Made by `{protocol['command']}` with {', '.join(f'{name} {number}' for name, number in protocol['versions'].items())}, "
        f"{n_threads} thread{'s' * (n_threads > 1)}."
    )
    undone = "".join(f"\n{sentence}\n" for sentence in refusals(results))
    write_text(folder / "results.md", f"{about}\n\n{table}\n{undone}")


def write_pictures(folder: Path, results: dict[str, Any]) -> None:
    """Write the two pictures, each complete or not at all."""
    matrices = {name: as_matrices(found["accuracy_matrix"]) for name, found in results["methods"].items()}
    means = {name: torch.stack(found).mean(0) for name, found in matrices.items()}
    write_figure(folder / "accuracy_matrix.png", accuracy_matrices_figure(means))
    write_figure(folder / "accuracy_over_tasks.png", accuracy_over_tasks_figure(matrices))


def as_matrices(written: Sequence[Sequence[Sequence[float | None]]]) -> list[Tensor]:
    """Return accuracy matrices as they were before they were written: NaN for null."""
    return [
        torch.tensor([[nan if a is None else a for a in row] for row in matrix], dtype=torch.float64)
        for matrix in written
    ]


def print_accuracy(method: str, matrix: Tensor, n_tasks: int, folder: Path) -> bool:
    """Print what a fit has learned and kept of each task, and draw the accuracy matrix.

    Args:
        method: Its name.
        matrix: What the monitor has measured.
        n_tasks: Number of tasks that were to be trained.
        folder: Where the picture goes.

    Returns:
        Whether every task was trained and measured.
    """
    measured = [task for task in range(min(n_tasks, len(matrix))) if not matrix[task, task].isnan()]
    table = Table("task", title=f"{method}: accuracy %")
    for header in ("when learned", "at the end", "forgotten", "average so far"):
        table.add_column(header, justify="right")
    for task in measured:
        learned, kept = float(matrix[task, task]), float(matrix[measured[-1], task])
        average = average_accuracy(after_task(matrix, task))
        table.add_row(str(task), *[f"{100 * value:.1f}" for value in (learned, kept, learned - kept, average)])
    console = Console(soft_wrap=True)
    is_complete = len(measured) == n_tasks
    if measured:
        console.print(table)
    if is_complete:
        square = matrix[:n_tasks, :n_tasks]
        console.print(f"average accuracy {average_accuracy(square):.3f}, forgetting {forgetting(square):.3f}")
        write_figure(folder / "accuracy_matrix.png", accuracy_matrix_figure(square))
    else:
        console.print(f"The stream ended early, or was not validated: {len(measured)} of {n_tasks} tasks are measured.")
    console.print(f"Logs and checkpoints: {folder}")
    return is_complete


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_figure(path: Path, figure: Figure) -> None:
    """Write a picture under a temporary name, then rename it."""
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def stream_name(results: Mapping[str, Any]) -> str:
    """Return what was learned, and how long it is."""
    n_tasks = results["n_tasks"]
    return f"{results['benchmark']}, {n_tasks} task{'s' * (n_tasks > 1)}"


def _rows(results: dict[str, Any]) -> list[list[str]]:
    return [[method, *row_cells(found)] for method, found in results["methods"].items()]


def row_cells(found: Mapping[str, Any], columns: Iterable[str] = COLUMNS) -> list[str]:
    """Return what a method's row of the table says."""
    return [cell(found[key], 1 if key == "seconds" else 100) for key in columns]


def cell(values: list[float | None], scale: float) -> str:
    """Return mean and standard deviation; a dash for what was not measured, such as the forgetting of joint training."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    spread = f" ± {scale * stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{scale * mean(numbers):.1f}{spread}"
