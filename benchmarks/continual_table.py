"""What do the methods come to on all benchmarks? One table of the results of `lit-rebasin benchmark`.

Reads docs/results/NAME/results.json of every benchmark named, prints the table and writes it into docs/results/continual.md. Run:

    python benchmarks/continual_table.py rotated_mnist permuted_mnist_online
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def cell(values):
    """Return mean and standard deviation over the seeds, in per cent."""
    shares = [100 * value for value in values]
    return f"{mean(shares):.1f}" + (f" ± {stdev(shares):.1f}" if len(shares) > 1 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    names = parser.parse_args().names
    found = {name: json.loads((RESULTS / name / "results.json").read_text())["methods"] for name in names}
    methods = list(dict.fromkeys(method for name in names for method in found[name]))
    heads = [f"[{name}]({name}/results.md)" for name in names]
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
    page = RESULTS / "continual.md"
    text = page.read_text()
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(text[:before] + "\n" + "\n".join(lines) + "\n" + text[after:])


if __name__ == "__main__":
    main()
