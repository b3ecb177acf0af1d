"""How near to the unregularized transport do annealed, debiased and fixed temperatures come, in how many iterations and seconds?

Prints every figure as it comes, keeps them in docs/results/annealing.json and writes docs/results/annealing.md and annealing.png.
Run: python benchmarks/annealing.py (some two minutes; --seeds 2 is a quick look; --redraw only writes the table and picture again).
"""

import argparse
import json
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

import ot
import torch
from annealing_table import write_picture, write_table

from lit_rebasin.transport import annealed_sinkhorn, round_to_polytope, sinkhorn

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "annealing.md"
STEPS = (10, 18, 32, 56, 100, 178, 316, 562, 1000)
BETAS = (10, 30, 100, 300, 1000)
CONVERGED_BETAS = (100, 1000, 10000)
TURNS = 3


def random_cost(seed, n=75):
    return _of_range_one(torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def geometric_cost(seed, n=300):
    """Squared distances of uniform points in the unit square."""
    points = torch.rand(2, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _of_range_one(torch.cdist(*points).square())


def _of_range_one(cost):
    return (cost - cost.min()) / (cost.max() - cost.min())


COSTS = {"random 75 x 75": random_cost, "geometric 300 x 300": geometric_cost}


def methods():
    """Return, by family and setting, what solves a cost with even masses, and the number of iterations if it is fixed."""
    every = {}
    for name, debiased in (("annealed", False), ("debiased annealed", True)):
        for steps in STEPS:
            every[name, f"T = {steps}"] = lambda c, a, s=steps, d=debiased: annealed_sinkhorn(
                c, a, a, steps=s, debiased=d
            )
    for beta in BETAS:
        for steps in STEPS:
            every[f"fixed, beta = {beta}", f"T = {steps}"] = lambda c, a, s=steps, b=beta: sinkhorn(
                c, a, a, regularization=1 / b, max_iterations=s, tolerance=0
            )
    for beta in CONVERGED_BETAS:
        every["converged", f"beta = {beta}"] = lambda c, a, b=beta: sinkhorn(c, a, a, regularization=1 / b)
    return every


def measure(cost, solve, exact):
    """Return the seconds of the solve alone, and the gap of its plan once rounded."""
    even = cost.new_full((len(cost),), 1 / len(cost))
    taken = []
    for _ in range(TURNS):
        start = time.perf_counter()
        result = solve(cost, even)
        taken.append(time.perf_counter() - start)
    gap = float((round_to_polytope(result.plan, even, even) * cost).sum()) - exact
    return {"seconds": median(taken), "gap": gap, "iterations": result.iterations, "converged": bool(result.converged)}


def summarise(runs):
    return {
        "gap": mean(run["gap"] for run in runs),
        "largest_gap": max(run["gap"] for run in runs),
        "seconds": median(run["seconds"] for run in runs),
        "iterations": median(run["iterations"] for run in runs),
        "converged": sum(run["converged"] for run in runs),
    }


def measure_all(make, seeds, say, label):
    """Return what is known of every setting; each seed runs all of them, so that a busy machine hits all alike."""
    every = methods()
    runs = {key: [] for key in every}
    for seed in range(seeds):
        cost = make(seed)
        even = cost.new_full((len(cost),), 1 / len(cost)).numpy()
        exact = ot.emd2(even, even, cost.numpy())
        for key, solve in every.items():
            if seed == 0:
                solve(cost, torch.from_numpy(even))
            runs[key].append(measure(cost, solve, exact))
    found = {}
    for (family, setting), figures in runs.items():
        summary = found.setdefault(family, {})[setting] = summarise(figures)
        say(f"{label}: {family}, {setting}: gap {summary['gap']:.2e}, {summary['seconds']:.4f} s")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="costs of each kind, seeded from 0")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes, the JSON and PNG beside it")
    parser.add_argument("--redraw", action="store_true", help="write table and picture from the JSON that is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept_at = options.output.with_suffix(".json")
    if not options.redraw:
        given = "" if options.seeds == parser.get_default("seeds") else f" --seeds {options.seeds}"
        protocol = {
            "command": f"python benchmarks/annealing.py{given}",
            "versions": {name: version(name) for name in ("torch", "pot")},
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "seeds": options.seeds,
        }
        costs = {
            name: measure_all(make, options.seeds, partial(print, flush=True), name) for name, make in COSTS.items()
        }
        kept_at.write_text(json.dumps({"protocol": protocol, "costs": costs}, indent=1) + "\n")
    found = json.loads(kept_at.read_text())
    write_table(found, options.output)
    write_picture(found, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
