"""The page of HTML that shows a run."""

from collections.abc import Mapping, Sequence
from math import nan

import torch
from torch import Tensor

from lit_rebasin.cli.merge_sections import merge_section
from lit_rebasin.cli.monitor_sections import monitor_sections
from lit_rebasin.cli.page_parts import document, note, picture, slugs, table, text
from lit_rebasin.cli.report import COLUMNS, row_cells
from lit_rebasin.cli.run_folder import Learned, RunFolder
from lit_rebasin.metrics import accuracy_matrices_figure, accuracy_over_tasks_figure


def report_page(run: RunFolder) -> str:
    """Return the whole page."""
    parts = [
        f'<header><h1>{text(run.title)}</h1>\n<p class="about">{text(run.about)}</p></header>',
        note(_missing(run)),
        _results(run.methods),
        _accuracies(run.methods),
        _merges(run.methods),
        _monitors(run.methods),
        _provenance(run),
    ]
    return document(run.title, "\n".join(part for part in parts if part))


def _missing(run: RunFolder) -> list[str]:
    """Say what the folder does not have."""
    sentences = [f"Not finished: {', '.join(run.missing)}."] if run.missing else []
    sentences += run.damages
    unlogged = [name for learned in run.methods.values() for name in learned.unlogged]
    if not any(learned.logs for learned in run.methods.values()):
        sentences.append("No run has event files here, so nothing is known of the merges.")
    elif unlogged:
        sentences.append(f"No event files, so nothing is known of the merges: {', '.join(unlogged)}.")
    for name, learned in run.methods.items():
        sizes = sorted({len(matrix) for matrix in learned.matrices})
        if len(sizes) > 1:
            sentences.append(
                f"The runs of {name} have measured {' or '.join(map(str, sizes))} tasks; the longest counts."
            )
        if not learned.matrices:
            sentences.append(f"No accuracies of {name}: ContinualMonitor logs them.")
    if not run.commands:
        sentences.append("No command: `lit-rebasin benchmark` and `lit-rebasin fit` write it down.")
    return sentences


def _results(methods: Mapping[str, Learned]) -> str:
    columns = [name for name in COLUMNS if any(learned.numbers[name] for learned in methods.values())]
    if not columns:
        return ""
    rows = [[name, *row_cells(learned.numbers, columns)] for name, learned in methods.items()]
    seeds = max(len(learned.matrices) for learned in methods.values())
    caption = "Mean ± standard deviation over seeds." if seeds > 1 else "One seed."
    header = ["method", *(COLUMNS[name] for name in columns)]
    return f'<section id="results"><h2>Results</h2>\n{table(header, rows, caption)}</section>'


def _accuracies(methods: Mapping[str, Learned]) -> str:
    matrices = {name: _same_size(learned.matrices) for name, learned in methods.items() if learned.matrices}
    if not matrices:
        return ""
    means = {name: torch.stack(found).mean(0) for name, found in matrices.items()}
    several = max(map(len, matrices.values())) > 1
    ends = "; ".join(f"{name} {cell}" for name, cell in _ends(methods).items())
    over_tasks = picture(
        "accuracy-over-tasks",
        accuracy_over_tasks_figure({_label(name): found for name, found in matrices.items()}),
        f"Average accuracy over the tasks learned so far, by method. At the end, in per cent: {ends}.",
        f"Average accuracy on the tasks learned so far{': the mean over seeds, the range as a band' * several}.",
    )
    heat_maps = picture(
        "accuracy-matrix",
        accuracy_matrices_figure({_label(name): mean for name, mean in means.items()}, 2 if len(means) == 4 else 3),
        f"Heat maps of the accuracy on every task after every task, by method: {', '.join(means)}.",
        f"Accuracy on every task (column) after every task (row){', the mean over seeds' * several}.",
    )
    return f'<section id="accuracy"><h2>Accuracy</h2>\n{over_tasks}\n{heat_maps}</section>'


def _ends(methods: Mapping[str, Learned]) -> dict[str, str]:
    return {name: row_cells(found.numbers, ["accuracy"])[0] for name, found in methods.items() if found.matrices}


def _label(name: str) -> str:
    """Return a name such that a figure takes no part of it for a formula."""
    return name.replace("$", r"\$")


def _same_size(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices of the size of the largest, with NaN for the tasks that a run does not have."""
    n = max(map(len, matrices))
    padded = [torch.full((n, n), nan, dtype=matrix.dtype) for matrix in matrices]
    for whole, matrix in zip(padded, matrices, strict=True):
        whole[: len(matrix), : len(matrix)] = matrix
    return padded


def _merges(methods: Mapping[str, Learned]) -> str:
    ids = slugs(methods)
    merging = {
        name: found.logs for name, found in methods.items() if any(log.alphas or log.refused for log in found.logs)
    }
    sections = [merge_section(name, ids[name], logs) for name, logs in merging.items()]
    without = [name for name, found in methods.items() if found.logs and name not in merging]
    if without:
        sections.append(f"<p>No merges, for they do without RebasinMerge: {text(', '.join(without))}.</p>")
    if not sections:
        sections = ["<p>Nothing is logged of any merge.</p>"]
    return '<section id="merges"><h2>Merges</h2>\n{}</section>'.format("\n".join(sections))


def _monitors(methods: Mapping[str, Learned]) -> str:
    shown = monitor_sections({name: found.logs for name, found in methods.items()})
    return f'<section id="monitors"><h2>Monitors</h2>\n{shown}</section>' if shown else ""


def _provenance(run: RunFolder) -> str:
    """Return how the run was made."""
    parts = ['<section id="made"><h2>How it was made</h2>']
    parts += [f'<pre class="wrapped command">{text(command)}</pre>' for command in run.commands]
    if run.versions:
        versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
        parts.append(f'<p id="versions">{text(versions)}</p>')
    for name, configuration in run.configurations.items():
        parts.append(
            f'<details class="configuration"><summary>Configuration of {text(name)}</summary>\n<pre>{text(configuration)}</pre></details>'
        )
    if not run.configurations:
        parts.append("<p>No configuration was found beside the event files.</p>")
    return "\n".join([*parts, "</section>"])
