r"""What do the methods come to on all benchmarks? One table of the results of `lit-rebasin benchmark`.

Reads docs/results/NAME/results.json of every benchmark named, prints the table and writes it into docs/results/continual.md, with a picture
of each benchmark beside it. Methods that were run apart are joined by a plus; what begins with an underscore is the end of a name. Run:

    python benchmarks/continual_table.py rotated_mnist+_no_merge+_baselines+_mc_sgd+_rebasin_il rotated_mnist_fresh+_average+_no_merge \
        rotated_mnist_online+_average+_mc_sgd+_no_merge+_baselines permuted_mnist_online+_average+_mc_sgd+_no_merge+_baselines \
        split_cifar100_online+_average+_no_merge split_mnist+_no_merge rotated_fashion_mnist+_ours
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt

from lit_rebasin.cli.methods import METHODS

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def cell(values):
    """Return mean and standard deviation over the seeds, in per cent."""
    shares = [100 * value for value in values]
    return f"{mean(shares):.1f}" + (f" ± {stdev(shares):.1f}" if len(shares) > 1 else "")


def joined(folders):
    """Return the numbers of all methods of some folders, which must differ in nothing but the methods and their own settings."""
    methods, protocols = {}, []
    for folder in folders:
        results = json.loads((RESULTS / folder / "results.json").read_text())
        protocol = results["protocol"]
        complete = {m: n for m, n in results["methods"].items() if len(n["accuracy"]) == len(protocol["seeds"])}
        if twice := methods.keys() & complete:
            raise SystemExit(f"{folders} have {sorted(twice)} more than once")
        methods |= complete
        shared = {key: protocol[key] for key in ("data", "seeds", "versions")}
        protocols.append(shared | {key: protocol["model"][key] for key in ("backbone", "optimizer")})
    if any(protocol != protocols[0] for protocol in protocols):
        raise SystemExit(f"{folders} are of different protocols")
    return methods


def forgetting_from_best(matrix):
    """Return by how much tasks end below the best they ever had, as Mirzadeh et al. measure it; the last task aside."""
    *_, last = matrix
    return mean(max(row[task] for row in matrix[task:]) - last[task] for task in range(len(last) - 1))


def draw(found):
    """Draw the average accuracy over the tasks so far of every benchmark, and between which values the seeds lie."""
    every = [method for method in METHODS if any(method in methods for methods in found.values())]
    colors = {method: f"C{number}" for number, method in enumerate(every)}
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.8 * rows), squeeze=False)
    for panel in axes.flat[len(found) :]:
        panel.remove()
    for panel, (name, methods) in zip(axes.flat, found.items(), strict=False):
        for method, numbers in ((method, methods[method]) for method in every if method in methods):
            curves = [[mean(row[: t + 1]) for t, row in enumerate(matrix)] for matrix in numbers["accuracy_matrix"]]
            at_task = [[100 * value for value in values] for values in zip(*curves, strict=True)]
            middle = [mean(values) for values in at_task]
            # The two that may coincide are told apart by dots upon the line.
            style = (
                {"linestyle": ":", "color": "black", "zorder": 3} if method == "average" else {"color": colors[method]}
            )
            tasks = range(1, len(middle) + 1)
            panel.plot(tasks, middle, label=method, **style)
            low, high = ([pick(values) for values in at_task] for pick in (min, max))
            panel.fill_between(tasks, low, high, color=style["color"], alpha=0.15, linewidth=0)
        panel.set(
            title=title(name),
            xlabel="tasks learned",
            ylabel="average accuracy %",
            ylim=(10, 100),
        )
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(RESULTS / "continual.png", dpi=150)


def title(name):
    """Return the name of a benchmark, and what is special about its data."""
    first = name.split("+")[0]
    benchmark = json.loads((RESULTS / first / "results.json").read_text())["benchmark"]
    return first.replace("_", " ") + (" (unofficial re-split)" if benchmark == "arrays" else "")


def _short(part, name):
    """Return the name of a folder, less what it has in common with the first of its benchmark."""
    first = name.split("+")[0]
    return part if part == first else part.removeprefix(f"{first}_")


def _whole(name):
    """Return the names of folders in full."""
    first, *others = name.split("+")
    return "+".join([first, *(first + part if part.startswith("_") else part for part in others)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    names = [_whole(name) for name in parser.parse_args().names]
    found = {name: joined(name.split("+")) for name in names}
    methods = [method for method in METHODS if any(method in numbers for numbers in found.values())]
    heads = [
        ", ".join(f"[{_short(part, name)}]({part}/results.md)" for part in name.split("+"))
        + (" (unofficial re-split)" if "re-split" in title(name) else "")
        for name in names
    ]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---:|" * len(names)]
    for method in methods:
        cells = []
        for name in names:
            numbers = found[name].get(method)
            cells.append(
                f"{cell(numbers['accuracy'])} ({cell(numbers['forgetting'])}), {mean(numbers['seconds']):.0f} s"
                if numbers
                else ""
            )
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    print("\n".join(lines))
    print("\nForgetting against the best accuracy, not that right after the task, in per cent:")
    for name in names:
        for method, numbers in found[name].items():
            print(f"{name.split('+')[0]} {method} {cell(forgetting_from_best(m) for m in numbers['accuracy_matrix'])}")
    draw(found)
    page = RESULTS / "continual.md"
    text = page.read_text()
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(text[:before] + "\n" + "\n".join(lines) + "\n" + text[after:])


if __name__ == "__main__":
    main()
