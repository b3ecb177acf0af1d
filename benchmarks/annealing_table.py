"""The tables and the picture of annealing.py."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

ANNEALED = {"annealed": -1 / 2, "debiased annealed": -2 / 3}
TARGETS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
# Figures of Chizat (arXiv 2408.11620) at T = 1000, beta_0 = 10.
PUBLISHED = {
    "random 75 x 75": {"annealed": 1.1e-3, "debiased annealed": 2.3e-4},
    "geometric 300 x 300": {"annealed": 3.6e-3, "debiased annealed": 7.5e-4},
}
# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {"annealed": "#D55E00", "debiased annealed": "#0072B2", "converged": "#000000"}
MARKERS = {"annealed": "s", "debiased annealed": "o", "converged": "*"}
NAMES = {"converged": "converged, with Newton steps"}

INTRODUCTION = """# Time and transport gap of annealed Sinkhorn

How far the transport cost of a plan is above the smallest (`ot.emd2`), once the plan has been rounded to the exact
masses by `round_to_polytope`; float64, even masses of total 1, costs of range 1. Random costs are uniform, geometric
ones squared distances of uniform points in the unit square. Gaps are means and seconds medians over {seeds} seeds, of
the median of three turns; the seconds are those of the solve alone.

* **annealed**, **debiased annealed**: `annealed_sinkhorn(steps=T)`, `beta_t = 10 (1 + t)^kappa` with `kappa` 1/2 and
  2/3.
* **fixed**: T plain iterations at one temperature, `sinkhorn(regularization=1 / beta, max_iterations=T, tolerance=0)`.
* **converged**: `sinkhorn(regularization=1 / beta)`, to its default tolerance, with Newton steps where they are faster.
"""

FASTEST = """## Which is the fastest when

Seconds of the fastest setting measured of each family whose mean gap is at most the one on the left; in bold the
fastest of all. For "fixed" it is the best of the temperatures tried, which a user would not know.
"""

COST = """### What an iteration costs

Milliseconds an iteration, at the largest T. An annealed iteration has a kernel of its own, the exponential of a whole
matrix; one at a fixed temperature is two products of a matrix with a vector. Counted in iterations the annealed ones
can be ahead without their being so in seconds.
"""

PUBLISHED_TEXT = """## Beside the published figures

Gap at T = 1000, and the slope of the logarithm of the gap over that of T, from T = {first} to {last}. The published
ones are read off the figures of Chizat (arXiv 2408.11620), of other draws of such costs; in theory the slopes are -1/2
and -2/3. They are rates for measures with a density. Of n points, the gap falls faster once the temperature is small
beside the differences between the few best permutations, which is sooner for few points and for random costs.
"""


def write_table(found, path):
    protocol = found["protocol"]
    versions = ", ".join(f"{package} {number}" for package, number in protocol["versions"].items())
    lines = [
        INTRODUCTION.format(seeds=protocol["seeds"]),
        f"Made by `{protocol['command']}` with {versions}, {protocol['threads']} thread, {protocol['cpu']}.\n",
        f"![gap over iterations and over seconds]({path.with_suffix('.png').name})\n",
        FASTEST,
    ]
    for name, families in found["costs"].items():
        lines += [f"### {name[0].upper() + name[1:]}\n", *_fastest(families)]
    lines += [COST, *_cost(found["costs"])]
    some = next(iter(found["costs"].values()))["annealed"]
    steps = [setting.removeprefix("T = ") for setting in some]
    lines += [PUBLISHED_TEXT.format(first=steps[0], last=steps[-1]), *_published(found["costs"])]
    lines += ["## All figures\n"]
    for name, families in found["costs"].items():
        lines += [f"### {name[0].upper() + name[1:]}: gap (milliseconds) by T\n", *_all(families)]
    lines += ["### Converged\n", *_converged(found)]
    path.write_text("\n".join(lines).rstrip() + "\n")


def _table(head, rows):
    return [
        f"| {' | '.join(head)} |",
        "|---|" + "---:|" * (len(head) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _fastest(families):
    groups = {"annealed": [], "debiased annealed": [], "fixed": [], "converged": []}
    for family, settings in families.items():
        group = "fixed" if family.startswith("fixed") else family
        beta = family.removeprefix("fixed, ") + ", " if group == "fixed" else ""
        groups[group] += [(run["seconds"], beta + setting, run["gap"]) for setting, run in settings.items()]
    rows = []
    for target in TARGETS:
        best = {name: min((run for run in runs if run[2] <= target), default=None) for name, runs in groups.items()}
        if not any(best.values()):
            continue
        winner = min(run[0] for run in best.values() if run)
        cells = []
        for run in best.values():
            text = "not reached" if run is None else f"{run[0]:.4f} ({run[1]})"
            cells.append(f"**{text}**" if run and run[0] == winner else text)
        rows.append([f"{target:.0e}", *cells])
    return _table(["gap", *groups], rows)


def _cost(costs):
    rows = []
    for name, families in costs.items():
        last = {family: list(settings.values())[-1] for family, settings in families.items() if family != "converged"}
        rows.append([name, *(f"{1000 * run['seconds'] / run['iterations']:.2g}" for run in last.values())])
    return _table(["cost", *last], rows)


def _slope(settings):
    steps = [int(setting.removeprefix("T = ")) for setting in settings]
    return np.polyfit(np.log(steps), np.log([run["gap"] for run in settings.values()]), 1)[0]


def _published(costs):
    rows = []
    for name, families in costs.items():
        for family, theory in ANNEALED.items():
            last = list(families[family].values())[-1]
            figures = [PUBLISHED[name][family], last["gap"], last["largest_gap"]]
            rows.append([f"{name}, {family}", *(f"{one:.1e}" for one in figures)])
            rows[-1] += [f"{theory:.2f}", f"{_slope(families[family]):.2f}"]
    return _table(["cost", "published", "ours, mean", "ours, largest", "slope in theory", "ours"], rows)


def _all(families):
    every = {family: settings for family, settings in families.items() if family != "converged"}
    head = [setting.removeprefix("T = ") for setting in every["annealed"]]
    rows = [
        [family, *(f"{run['gap']:.1e} ({1000 * run['seconds']:.3g})" for run in settings.values())]
        for family, settings in every.items()
    ]
    return _table(["", *head], rows)


def _converged(found):
    seeds = found["protocol"]["seeds"]
    rows = [
        [
            f"{name}, {setting}",
            f"{run['gap']:.1e}",
            f"{1000 * run['seconds']:.3g}",
            f"{run['iterations']:g}",
            f"{run['converged']} of {seeds}",
        ]
        for name, families in found["costs"].items()
        for setting, run in families["converged"].items()
    ]
    return _table(["", "gap", "milliseconds", "iterations", "converged"], rows)


def write_picture(found, path):
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.6), sharey="col", layout="constrained")
    for column, (name, families) in enumerate(found["costs"].items()):
        over_steps, over_seconds = axes[:, column]
        for family, settings in families.items():
            runs = list(settings.values())
            gaps, seconds = [run["gap"] for run in runs], [run["seconds"] for run in runs]
            steps = [run["iterations"] for run in runs]
            style = _style(family)
            over_seconds.loglog(seconds, gaps, **style)
            if family != "converged":
                over_steps.loglog(steps, gaps, **style)
            if family.startswith("fixed"):
                beta = family.removeprefix("fixed, beta = ")
                _note(over_steps, rf"$\beta={beta}$", steps[-1], gaps[-1], (5, -3), "#606060")
                _note(over_seconds, rf"$\beta={beta}$", seconds[-1], gaps[-1], (-2, 6), "#606060", ha="center")
            if family in ANNEALED:
                guide = 0.8 * gaps[-1] * (np.array(steps) / steps[-1]) ** ANNEALED[family]
                over_steps.loglog(steps, guide, ":", color=COLOURS[family], lw=1.2)
        for setting, run in families["converged"].items():
            power = rf"$\beta=10^{{{round(np.log10(float(setting.removeprefix('beta = '))))}}}$"
            _note(over_seconds, power, run["seconds"], run["gap"], (-5, -15), "black", ha="center")
        over_steps.set(title=name, xlabel="iterations T")
        over_seconds.set(xlabel="seconds")
        for axis in (over_steps, over_seconds):
            axis.set_ylabel("transport gap after rounding")
            axis.grid(alpha=0.25)
            low, high = axis.get_xlim()
            axis.set_xlim(low, high * 2)
        over_steps.set_ylim(bottom=over_steps.get_ylim()[0] / 2)
    figure.legend(handles=_handles(), loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(family):
    if family.startswith("fixed"):
        return {"color": "#9A9A9A", "lw": 1.1, "marker": ".", "ms": 4, "zorder": 1}
    line = "" if family == "converged" else "-"
    size = 13 if family == "converged" else 5
    return {"color": COLOURS[family], "lw": 2, "ls": line, "marker": MARKERS[family], "ms": size, "zorder": 3}


def _note(axis, text, x, y, offset, colour, ha="left"):
    axis.annotate(text, (x, y), offset, textcoords="offset points", fontsize=8.5, color=colour, ha=ha)


def _handles():
    handles = [Line2D([], [], label=NAMES.get(family, family), **_style(family)) for family in COLOURS]
    handles.insert(2, Line2D([], [], label="fixed temperature", **_style("fixed")))
    guides = zip(ANNEALED, ("slope -1/2", "slope -2/3"), strict=True)
    return handles + [Line2D([], [], color=COLOURS[f], ls=":", lw=1.2, label=label) for f, label in guides]
