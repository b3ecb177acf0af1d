"""The tables and the picture of sinkhorn.py."""

import matplotlib.pyplot as plt

INTRODUCTION = """# The Sinkhorn solve, forward and backward

One plan of an n x n problem and the gradient of the scores for a random gradient N(0, 1) of the plan, in float32 on
one thread of a CPU. The scores are `I + 0.1 N(0, 1)` ("init", how the published re-basin layers start) at temperature
1, with 20 iterations, unless said.
"""

TIME = """## Time

Median milliseconds of {iterations} iterations and the backward; in parentheses how many times ours that is, the
median over the turns. In a turn every method makes up to {calls} calls in a row (2048 / n), as a training step does for its permutation
groups, so that whatever else the machine does hits all alike; {turns} turns after a warm-up of two.
"""

SINGLE = """The same with one call a turn, between those of the others, so that each finds the caches full of another's:

"""

MEMORY = """## Memory

How far the process grows in one forward and backward, in MB, over what it held with its inputs there and its
libraries warm; in parentheses the same as a multiple of one n x n float32 matrix. The plan and the gradient that are
returned are two of these. Each in a process of its own. Up to n = 512 the figure is of the allocator more than of the
method.
"""

ACCURACY = """## Error of the gradient

Relative L2 error against float64, iterated to convergence. "randn" are scores N(0, 1); in parentheses the largest
error of a marginal of the plan (a row or column sum that should be one), which says how far from convergence the
solve was. The float64 reference is what an unrolled log-domain loop has in the limit, see
[sinkhorn_reference.py](../../benchmarks/sinkhorn_reference.py).
"""

GIVEN_ITS_PLAN = """### Of the backward alone

The same against the exact gradient, in float64, of the plan that each method came to, as the solution for the
marginals which that plan has. Of an implicit gradient this is the error of the backward; an unrolled loop's is the
derivative of the truncated iteration, another thing until both converge.
"""

GEOMLOSS = """* geomloss is not like for like: its iterations are the steps of an annealing of its own, and its gradients are built
  for the value of the transport, with detached potentials, so that the error of its plan's gradient is no defect of
  what it is for."""


def write_table(found, path):
    protocol = found["protocol"]
    versions = ", ".join(f"{package} {number}" for package, number in protocol["versions"].items())
    sizes = list(found["seconds"])
    turns = ", ".join(f"{found['seconds'][n]['lit-rebasin']['turns']} (n = {n})" for n in sizes)
    lines = [
        INTRODUCTION,
        f"Made by `{protocol['command']}` with {versions}, {protocol['threads']} thread, {protocol['cpu']}.\n",
        TIME.format(iterations=protocol["iterations"], turns=turns, calls=protocol["calls"]),
        *_by_size(found["seconds"], _time),
        SINGLE.rstrip() + "\n",
        *_by_size(found["single"], _time),
        f"![milliseconds by n]({path.with_suffix('.png').name})\n",
        MEMORY,
        *_by_size(found["memory"], _memory),
        ACCURACY,
    ]
    for temperature, cases in found["accuracy"].items():
        lines += [f"### Temperature {temperature}\n", *_references(cases, temperature), ""]
        lines += _by_case(cases, lambda cell: f"{_number(cell['error'])} ({_number(cell['marginal_error'])})")
    lines += [GIVEN_ITS_PLAN]
    for temperature, cases in found["accuracy"].items():
        lines += [f"Temperature {temperature}:\n"]
        lines += _by_case(cases, lambda cell: _number(cell.get("error_given_its_plan")))
    path.write_text("\n".join([*lines, "## Notes\n", *_notes(found)]).rstrip() + "\n")


def _table(head, rows):
    return [
        f"| {' | '.join(head)} |",
        "|---|" + "---:|" * (len(head) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _by_size(figures, show):
    names = next(iter(figures.values()))
    rows = [[name, *(show(n, cells[name]) for n, cells in figures.items())] for name in names]
    return _table(["method", *(f"n = {n}" for n in figures)], rows)


def _by_case(cases, show):
    methods = next(iter(cases.values()))["methods"]
    rows = []
    for name, counts in methods.items():
        for count in counts:
            cells = [case["methods"][name][count] for case in cases.values()]
            shown = ["fails" if "failure" in cell else show(cell) for cell in cells]
            rows.append([name, count, *shown])
    return _table(["method", "iterations", *(f"n = {case.replace(' ', ', ')}" for case in cases)], rows)


def _time(n, cell):
    return f"{_digits(cell['ms'])} ({cell['times_ours']:.1f}x)"


def _memory(n, cell):
    if "failure" in cell:
        return "fails"
    return f"{_digits(cell['bytes'] / 1e6)} ({cell['bytes'] / (4 * int(n) ** 2):.1f})"


def _digits(value):
    """Three significant digits, without a power of ten."""
    return f"{float(f'{value:.3g}'):g}"


def _number(value):
    return "not finite" if value is None else f"{value:.1e}"


def _references(cases, temperature):
    known = [case["reference"] for case in cases.values()]
    residual = max(one["residual"] for one in known)
    text = f"The marginals of the reference are right to {residual:.0e}. It agrees with a least-squares solve of the optimality conditions to "
    text += f"{max(one['least_squares_differs_by'] for one in known):.0e}"
    if all(one["autograd_differs_by"] is not None for one in known):
        text += f" and with autograd through the float64 loop to {max(one['autograd_differs_by'] for one in known):.0e}"
    text += ". "
    if float(temperature) < 1:
        named = [(f"n = {case.replace(' ', ', ')}", one) for case, one in zip(cases.keys(), known, strict=True)]
        steps = ", ".join(f"{1 / (1 - one['contraction']):.0e} ({name})" for name, one in named)
        text += f"Near it a plain loop takes so many iterations to make its error e times smaller: {steps}. Of a row's mass at most "
        text += (
            ", ".join(f"{one['mass_off_largest']:.0e} ({name})" for name, one in named) + " is off its largest entry."
        )
    return [text.strip()]


def _notes(found):
    protocol = found["protocol"]
    notes = [
        "* Methods whose memory grows with the iterations are not run with the most of them.",
        "* POT gets the scores as costs counted from 0: the other ways tried left its plain method without a finite plan at "
        "n = 256, randn, temperature 0.05.",
    ]
    if "geomloss" in protocol["versions"]:
        notes.append(GEOMLOSS)
    for package in ("sinkhorn-rebasin", "geomloss"):
        if package not in protocol["versions"]:
            notes.append(f"* {package} was not installed, and is left out.")
    failures = {
        f"* {name}: {cell['failure']}"
        for cases in found["accuracy"].values()
        for case in cases.values()
        for name, counts in case["methods"].items()
        for cell in counts.values()
        if "failure" in cell
    }
    failures |= {
        f"* {name}: {cell['failure']}"
        for cells in found["memory"].values()
        for name, cell in cells.items()
        if "failure" in cell
    }
    return notes + sorted(failures)


def write_picture(found, path):
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    sizes = [int(n) for n in found["seconds"]]
    for name in next(iter(found["seconds"].values())):
        milliseconds = [cells[name]["ms"] for cells in found["seconds"].values()]
        own = name == "lit-rebasin"
        axes.loglog(sizes, milliseconds, "o-", label=name, lw=2.5 if own else 1.3, color="black" if own else None)
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.set(xlabel="n", ylabel="ms, forward and backward", title="20 Sinkhorn iterations, one thread")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
