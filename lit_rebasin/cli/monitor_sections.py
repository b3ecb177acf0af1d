"""The part of a report that shows what monitors have seen of the trainings."""

import struct
from collections.abc import Mapping, Sequence
from math import nan

import torch

from lit_rebasin.cli.event_files import RunLog
from lit_rebasin.cli.page_parts import picture, png_picture, slugs, text
from lit_rebasin.metrics import Curve, curves_figure

_Panels = dict[str, dict[str, Curve]]

# By the first part of a tag: who logs it, and what it is about.
_GROUPS = {
    "geodesic": (
        "GeodesicMonitor",
        "How straight the data moves through the layers (1 is a straight line), how near it comes to optimal transport (1 is optimal), and the "
        "share of the examples that the best pairing sends to their own image; by the first layer of the track.",
    ),
    "connectivity": (
        "ConnectivityMonitor",
        "The network against the one that the task began with: loss and accuracy on the line between them, as trained and aligned, and how far "
        "the neurons of their layers are apart.",
    ),
    "connectivity_reference": (
        "ConnectivityMonitor with a reference",
        "The network against the reference that was given: loss and accuracy on the line between them, as trained and aligned, and how far the "
        "neurons of their layers are apart.",
    ),
    "sharpness": (
        "SharpnessMonitor",
        "The largest eigenvalue of the Hessian of the loss, and its trace with the standard error of the estimate.",
    ),
    "feature_learning": (
        "FeatureLearningMonitor",
        "The first step of an epoch, by layer: the relative change of the features, the cosine of its angle to the negative gradient, and the "
        "root mean squares of the features and of that gradient.",
    ),
}
_TITLES = {
    "matched": "share matched with their own image",
    "moved": "neurons moved",
    "area": "mean excess of the loss",
    "barrier": "loss barrier",
    "wasserstein": "Wasserstein distance of neurons",
    "energy": "energy distance of neurons",
    "paired": "distance of paired neurons",
    "log10_width_bound": "log10 of the width bound",
    "eigenvalue": "largest eigenvalue",
    "trace_error": "standard error of the trace",
    "speed": "relative change of the features",
    "forward": "size of the features",
    "backward": "size of the gradient",
}


def monitor_sections(runs: Mapping[str, Sequence[RunLog]]) -> str:
    """Return what each monitor has logged of each method, as HTML; nothing, if there were none.

    Args:
        runs: By method, one log a run.
    """
    ids = slugs(runs)
    parts = []
    for group, (monitor, about) in _GROUPS.items():
        shown = [_method(group, name, ids[name], logs) for name, logs in runs.items()]
        if any(shown):
            parts.append("\n".join([f"<h3>{text(monitor)}</h3>\n<p>{text(about)}</p>", *filter(None, shown)]))
    return "\n".join(parts)


def _method(group: str, method: str, slug: str, logs: Sequence[RunLog]) -> str:
    """Return what one monitor has logged of one method."""
    panels, pictures = panels_of(group, logs), _pictures(group, method, slug, logs)
    if not panels and not pictures:
        return ""
    curves = _curves(group, method, slug, logs, panels) if panels else ""
    side_by_side = f'<div class="figures">\n{"".join(pictures)}</div>' if pictures else ""
    return f"<h4>{text(method)}</h4>\n{curves}\n{side_by_side}"


def _curves(group: str, method: str, slug: str, logs: Sequence[RunLog], panels: _Panels) -> str:
    tags = {tag for log in logs for tag in log.pictures}
    ends = sorted({step for log in logs for tag in tags for step in log.pictures.get(tag, {})})
    last = max(int(curve.steps[-1]) for curves in panels.values() for curve in curves.values())
    marks = [step for step in ends if step < last]
    n_runs = sum(any(tag.startswith(f"{group}/") for tag in log.monitored) for log in logs)
    spread = f" The mean over {n_runs} seeds, the range as a band." if n_runs > 1 else ""
    lines = " Grey lines: a task ends." if marks else ""
    return picture(
        f"curves-{group}-{slug}",
        curves_figure(panels, marks),
        f"Curves of {method} over the optimizer step: {', '.join(panels)}.",
        f"Over the optimizer step.{spread}{lines}",
    )


def panels_of(group: str, logs: Sequence[RunLog]) -> _Panels:
    """Return the curves of one monitor by the quantity, and by the layer or by whether the network was aligned, in the order of logging."""
    tags = dict.fromkeys(tag for log in logs for tag in log.monitored if tag.startswith(f"{group}/"))
    names = {tag.removeprefix(f"{group}/") for tag in tags}
    found: _Panels = {}
    for tag in tags:
        quantity, _, layer = tag.removeprefix(f"{group}/").partition("/")
        plain = quantity.removesuffix("_aligned")
        if not layer and f"{plain}_aligned" in names:
            layer = "as trained" if quantity == plain else "aligned"
            quantity = plain
        title = _TITLES.get(quantity, quantity.replace("_middle", " half-way").replace("_", " "))
        found.setdefault(title, {})[layer] = _curve([log.monitored[tag] for log in logs if tag in log.monitored])
    return found


def _curve(runs: Sequence[Mapping[int, float]]) -> Curve:
    steps = sorted({step for by_step in runs for step in by_step})
    values = [[by_step.get(step, nan) for step in steps] for by_step in runs]
    return Curve(torch.tensor(steps), torch.tensor(values, dtype=torch.float64))


def _pictures(group: str, method: str, slug: str, logs: Sequence[RunLog]) -> list[str]:
    """Return the last picture of each tag as it was logged, of the first run that has one."""
    tags = list(dict.fromkeys(tag for log in logs for tag in log.pictures if tag.startswith(f"{group}/")))
    ids = slugs(tags)
    return [_picture(tag, f"picture-{ids[tag]}-{slug}", method, logs) for tag in tags]


def _picture(tag: str, name: str, method: str, logs: Sequence[RunLog]) -> str:
    log = next(log for log in logs if tag in log.pictures)
    step, png = list(log.pictures[tag].items())[-1]
    having = sum(tag in log.pictures for log in logs)
    which = f" of {log.name}" if log.name and having > 1 else " of the first run" if having > 1 else ""
    return png_picture(
        name,
        png,
        _size(png),
        f"{tag} of {method} at optimizer step {step}, as the monitor drew it.",
        f"{tag} at step {step}{which}: the last that the monitor drew.",
    )


def _size(png: bytes) -> tuple[int, int]:
    """Return width and height, which a PNG file has in its first chunk."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height
