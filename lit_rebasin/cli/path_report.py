"""What an alignment or a merge has brought: a table, and the path as a picture."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lit_rebasin.alignment import Alignment, l2_cost
from lit_rebasin.cli.examples import Examples, loss_and_accuracy
from lit_rebasin.cli.matching import Setting
from lit_rebasin.cli.progress import reading
from lit_rebasin.merging import LinearPath, PathLosses, loss_barrier
from lit_rebasin.merging.whole_files import write_whole
from lit_rebasin.metrics.figures import COLORS, MARKERS

_COLORS = (COLORS[1], COLORS[0], COLORS[2])

Row = tuple[str, ...]  # what it is, and its value in each column


def console() -> Console:
    """Return where results are printed; whole lines, for the terminal to wrap."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def print_table(title: str, headers: Sequence[str], rows: Sequence[Row]) -> None:
    """Print a row a quantity, and a column a stage; what a row has no value for stays empty."""
    table = Table("", title=title)
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_files(setting: Setting) -> None:
    """Print which checkpoint goes by which letter, and what is known of the symmetries."""
    for index, file in enumerate(setting.files):
        role = ", the reference" if len(setting.files) == 2 and index == 1 else ""
        console().print(f"{letter(index)}: {file}{role}")
    if setting.traced.unchecked is not None:
        console().print(f"The symmetries were not checked: {setting.traced.unchecked}")


def letter(index: int) -> str:
    """Return the name of a checkpoint in a table: A, B, C, or a number after Z."""
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def number(value: float) -> str:
    """Return a number in four digits."""
    return f"{value:.4g}"


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.1f}"


def describe_alignment(alignment: Alignment) -> str:
    """Return what was found, in words."""
    sizes = [len(permutation) for permutation in alignment.permutations.values()]
    end = "" if alignment.converged else "; it did not come to its end within its steps"
    return (
        f"{alignment.method}: {alignment.moved} of {sum(sizes)} neurons in {len(sizes)} group{'s' * (len(sizes) != 1)} "
        f"moved, in {alignment.seconds:.2f} s{end}."
    )


def distance_row(model: nn.Module, moved: nn.Module, reference: nn.Module) -> Row:
    """Return the mean squared difference of the parameters, before and after."""
    ours, ours_moved, theirs = (
        {name: p.detach() for name, p in network.named_parameters()} for network in (model, moved, reference)
    )
    return (
        "mean squared distance",
        number(float(l2_cost(ours, theirs))),
        number(float(l2_cost(ours_moved, theirs))),
    )


def measured(
    batches: Iterable[Any],
    points: int,
    paths: Mapping[str, tuple[LinearPath, Callable[[nn.Module, float], object] | None]],
) -> dict[str, PathLosses]:
    """Return the losses along paths, by what is said of them, each with the statistics that its points are given."""
    with reading("measuring the path", batches, points * len(paths)) as watched:
        return {
            label: loss_barrier(path, watched, points, statistics=statistics)
            for label, (path, statistics) in paths.items()
        }


def path_rows(losses: Iterable[PathLosses]) -> list[Row]:
    """Return the barriers of paths from B at their one end to A at the other, and what was measured at the ends."""
    paths = list(losses)
    rows: list[Row] = [
        ("loss barrier", *(number(path.barrier) for path in paths)),
        ("loss area", *(number(path.area) for path in paths)),
        ("loss of A", *(number(float(path.losses[0])) for path in paths)),
        ("loss of B", *(number(float(path.losses[-1])) for path in paths)),
    ]
    shares = [path.accuracies for path in paths if path.accuracies is not None]
    if len(shares) == len(paths):
        rows += [
            ("accuracy barrier %", *(percent(path.accuracy_barrier) for path in paths)),
            ("accuracy of A %", *(percent(float(share[0])) for share in shares)),
            ("accuracy of B %", *(percent(float(share[-1])) for share in shares)),
        ]
    return rows


def merge_rows(examples: Examples, merges: Iterable[nn.Module]) -> list[Row]:
    """Return loss and accuracy of merges."""
    found = [loss_and_accuracy(merge, examples) for merge in merges]
    return [
        ("loss of the merge", *(number(loss) for loss, _ in found)),
        ("accuracy of the merge %", *(percent(share) for _, share in found)),
    ]


def write_path_figure(file: str, curves: Mapping[str, PathLosses], merged_at: float | None = None) -> None:
    """Draw loss and accuracy along paths from A to B.

    Args:
        file: Where the picture goes; its suffix is the format.
        curves: Paths by what is said of them.
        merged_at: The alpha of a merge, which is marked.
    """
    losses = {label: (path.alphas, path.losses) for label, path in curves.items()}
    shares = {
        label: (path.alphas, 100 * path.accuracies) for label, path in curves.items() if path.accuracies is not None
    }
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, losses, merged_at)
    left.set(ylabel="loss")
    _draw(right, shares, merged_at)
    right.set(ylabel="accuracy %")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    path = Path(file)
    write_whole(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=150))


def _draw(axes: Axes, curves: Mapping[str, tuple[Tensor, Tensor]], merged_at: float | None) -> None:
    for index, (label, (alphas, values)) in enumerate(curves.items()):
        axes.plot(
            alphas.numpy(), values.numpy(), color=_COLORS[index], marker=MARKERS[index], markersize=3, label=label
        )
    if merged_at is not None:
        axes.axvline(merged_at, color="0.5", linewidth=1, linestyle=":", label=f"merged at {merged_at:.2f}")
    axes.set(xlabel="alpha, the weight of B (A at 0, B at 1)")
    axes.spines[["top", "right"]].set_visible(False)
