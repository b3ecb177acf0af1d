"""The part of a report that shows the merges of one method."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan

import torch
from torch import Tensor

from lit_rebasin.cli.event_files import RunLog
from lit_rebasin.cli.page_parts import picture, text
from lit_rebasin.metrics import MergePaths, alpha_figure, displacement_figure, paths_figure


def merge_section(method: str, slug: str, logs: Sequence[RunLog]) -> str:
    """Return what its runs have logged of their merges, as HTML.

    Args:
        method: Its name.
        slug: What ids end in.
        logs: One a run.
    """
    merged = any(log.alphas for log in logs)
    remarks = [*(_remarks(logs) if merged else []), *_refusals(logs), *_lacking(logs)]
    said = "".join(f"<p>{text(remark)}</p>\n" for remark in remarks)
    return f"<h3>{text(method)}</h3>\n{said}{_pictures(method, slug, logs) if merged else ''}"


def _pictures(method: str, slug: str, logs: Sequence[RunLog]) -> str:
    paths, shares = paths_of(logs), mean_shares(logs)
    above = _paths_picture(method, slug, paths) if paths else ""
    side_by_side = [_displacement_picture(method, slug, shares)] if shares else []
    side_by_side.append(_alpha_picture(method, slug, logs))
    return f'{above}\n<div class="figures">\n{"".join(side_by_side)}</div>'


def _remarks(logs: Sequence[RunLog]) -> list[str]:
    """Say what would be looked for in vain in the pictures."""
    paths, shares = paths_of(logs), mean_shares(logs)
    remarks = [] if paths else ["The loss along the path is not in these logs, which an earlier version has written."]
    if all(alpha == 0 for log in logs for alpha in log.alphas.values()):
        remarks.append("Nothing is merged: alpha is 0 throughout, so the network stays as it was trained.")
    elif paths and not shares:
        remarks.append("No neuron is moved: the networks are merged as they are, without an alignment.")
    elif shares and not any(share for by_group in shares.values() for share in by_group.values()):
        remarks.append("The alignment leaves every neuron where it is.")
    return remarks


def _refusals(logs: Sequence[RunLog]) -> list[str]:
    """Name the merges that were refused, and why."""
    return [
        f"The merge after task {task}{f' of {log.name}' if log.name else ''} was refused: {reason}."
        for log in logs
        for task, reason in log.refused.items()
    ]


def _lacking(logs: Sequence[RunLog]) -> list[str]:
    """Name the tasks between those merged in that some run says nothing of."""
    last = max(_tasks(log.alphas for log in logs), default=0)
    known = [log.alphas.keys() | log.refused.keys() for log in logs]
    lacking = [task for task in range(1, last + 1) if any(task not in one for one in known)]
    tasks = ", ".join(map(str, lacking))
    return [f"Not every run has merged these tasks in: {tasks}. A merge may have been refused."] if lacking else []


def _paths_picture(method: str, slug: str, paths: Mapping[int, MergePaths]) -> str:
    return picture(
        f"paths-{slug}",
        paths_figure(paths),
        f"The loss along the linear path of every merge of {method}, as trained and aligned, for the tasks {_listed(paths)}.",
        "Loss on training batches between the new network (0) and the previous one (1), a panel a merge; a grey line at its alpha.",
    )


def _displacement_picture(method: str, slug: str, shares: Mapping[int, Mapping[str, float]]) -> str:
    groups = list(dict.fromkeys(name for by_group in shares.values() for name in by_group))
    return picture(
        f"displacement-{slug}",
        displacement_figure(shares),
        f"Heat map of the neurons that each merge of {method} moved, in the permutation groups {', '.join(groups)}.",
        "Neurons that the alignment moved, in per cent of the permutation group; of several seeds, the mean.",
    )


def _alpha_picture(method: str, slug: str, logs: Sequence[RunLog]) -> str:
    tasks = _tasks(log.alphas for log in logs)
    alphas = {task: torch.tensor([log.alphas.get(task, nan) for log in logs]) for task in tasks}
    means = "; ".join(f"task {task} {float(values.nanmean()):.2f}" for task, values in alphas.items())
    return picture(
        f"alpha-{slug}",
        alpha_figure({method: alphas}),
        f"Alpha of every merge of {method}: {means}.",
        "Alpha, the weight of the previous model, of every merge; of one a layer, the mean over the weights.",
    )


def paths_of(logs: Sequence[RunLog]) -> dict[int, MergePaths]:
    """Return the losses along the path of every merge, in all runs."""
    tasks = _tasks(log.after for log in logs)
    found = {}
    for task in tasks:
        steps = _tasks([log.before.get(task, {}) for log in logs] + [log.after.get(task, {}) for log in logs])
        found[task] = MergePaths(
            torch.tensor(steps, dtype=torch.float64) / 100,
            _losses([log.before.get(task, {}) for log in logs], steps),
            _losses([log.after.get(task, {}) for log in logs], steps),
            torch.tensor([log.alphas.get(task, nan) for log in logs]),
        )
    return found


def _losses(by_run: Sequence[Mapping[int, float]], steps: Sequence[int]) -> Tensor:
    return torch.tensor([[losses.get(step, nan) for step in steps] for losses in by_run], dtype=torch.float64)


def mean_shares(logs: Sequence[RunLog]) -> dict[int, dict[str, float]]:
    """Return the share of neurons moved, by task and group, as the mean over the runs that have it."""
    found: dict[int, dict[str, float]] = {}
    for task in _tasks(log.displacement for log in logs):
        groups = dict.fromkeys(name for log in logs for name in log.displacement.get(task, {}))
        for name in groups:
            shares = [log.displacement[task][name] for log in logs if name in log.displacement.get(task, {})]
            found.setdefault(task, {})[name] = sum(shares) / len(shares)
    return found


def _tasks(mappings: Iterable[Mapping[int, object]]) -> list[int]:
    return sorted({key for mapping in mappings for key in mapping})


def _listed(tasks: Iterable[int]) -> str:
    return ", ".join(map(str, tasks))
