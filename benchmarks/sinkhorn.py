"""How fast, how large and how exact are the plan and gradient of one Sinkhorn solve, beside other packages'?

Prints every figure as it comes, keeps them in docs/results/sinkhorn.json and writes docs/results/sinkhorn.md and sinkhorn.png.
Run: python benchmarks/sinkhorn.py --peer sinkhorn=FOLDER --peer geomloss=FOLDER (benchmarks/peers.md says how to get the peers).
It takes some ten minutes; --sizes 128,256 --turns 3 is a quick look.
"""

import argparse
import json
import math
import time
from pathlib import Path
from statistics import median

import torch
from sinkhorn_peers import (
    UNROLLED,
    measure_memory,
    methods,
    ours_by_default,
    peers_of,
    plan_and_gradient,
    problem,
    versions,
)
from sinkhorn_reference import gradient_of_the_limit, reference, relative_error
from sinkhorn_table import write_picture, write_table
from threadpoolctl import threadpool_limits

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sinkhorn.md"
SIZES = (128, 256, 512, 1024, 2048)
ITERATIONS = 20
# Most calls in a row, as a training step makes for its permutation groups; fewer where one takes long.
IN_A_ROW = 8
# Iterations for the gradient at each temperature; the last is for methods whose memory does not grow with it.
ACCURACY = {1.0: (20,), 0.05: (20, 2000, 50000)}
MOST_UNROLLED = 2000
DEFAULT = "default, to 1e-5"
CASES = [(n, kind) for n in (128, 256) for kind in ("init", "randn")]


def time_in_turns(every, n, turns, calls):
    """Return the seconds of a call of each method, each turn making some calls of every one, forth and back, after a warm-up."""
    logits, upstream = problem(n)
    taken = {name: [] for name in every}
    for turn in range(turns + 2):
        for name in list(every)[:: 1 if turn % 2 == 0 else -1]:
            leaf, copies = logits.clone().requires_grad_(), [upstream.clone() for _ in range(calls)]
            start = time.perf_counter()
            for copy in copies:
                plan_and_gradient(every[name], leaf, copy, 1.0, ITERATIONS)
            seconds = (time.perf_counter() - start) / calls
            if turn >= 2:
                taken[name].append(seconds)
    return taken


def summarise(taken):
    own = taken["lit-rebasin"]
    return {
        name: {
            "ms": 1000 * median(seconds),
            "fastest_ms": 1000 * min(seconds),
            "times_ours": median(one / base for one, base in zip(seconds, own, strict=True)),
            "turns": len(seconds),
        }
        for name, seconds in taken.items()
    }


def accuracy(method, logits, upstream, regularization, iterations, exact):
    """Compare one gradient with that of the converged plan, and with that of the plan which the method itself came to."""
    start = time.perf_counter()
    leaf = logits.clone().requires_grad_()
    try:
        plan, gradient = plan_and_gradient(method, leaf, upstream.clone(), regularization, iterations)
    except RuntimeError as error:
        return {"failure": " ".join(str(error).split())[:120]}
    plan = plan.detach().double()
    found = {"error": relative_error(gradient, exact), "seconds": time.perf_counter() - start}
    found["marginal_error"] = max((plan.sum(axis) - 1).abs().max().item() for axis in (0, 1))
    if plan.isfinite().all() and (plan.sum(0) > 0).all() and (plan.sum(1) > 0).all():
        of_its_plan = gradient_of_the_limit(plan, upstream.double(), regularization)
        found["error_given_its_plan"] = relative_error(gradient, of_its_plan)
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def measure_accuracy(every, regularization, iterations, say):
    """Return, for each case, what is known of the reference, and the errors of each method by its iterations."""
    found = {}
    for n, kind in CASES:
        logits, upstream = problem(n, kind)
        exact, known = reference(logits, upstream, regularization)
        case = found[f"{n} {kind}"] = {"reference": known, "methods": {}}
        say("reference", n, kind, regularization, known)
        for name, method in every.items():
            case["methods"][name] = {}
            for count in iterations:
                if count <= MOST_UNROLLED or name not in UNROLLED:
                    errors = accuracy(method, logits, upstream, regularization, count, exact)
                    case["methods"][name][count] = errors
                    say(name, n, kind, regularization, count, errors)
        errors = accuracy(ours_by_default, logits, upstream, regularization, None, exact)
        case["methods"]["lit-rebasin"][DEFAULT] = errors
        say("lit-rebasin", n, kind, regularization, DEFAULT, errors)
    return found


def command(options, peers, parser):
    """Return what was typed, without the folders of this machine."""
    given = [f"--peer {peer}=FOLDER" for peer in peers]
    given += [
        f"--{key} {getattr(options, key)}"
        for key in ("sizes", "turns")
        if getattr(options, key) != parser.get_default(key)
    ]
    return " ".join(["python benchmarks/sinkhorn.py", *given])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="append", default=[], help="sinkhorn=FOLDER or geomloss=FOLDER")
    parser.add_argument(
        "--sizes", default=",".join(map(str, SIZES)), help="sides of the square problems that are timed"
    )
    parser.add_argument("--turns", type=int, default=15, help="turns at the largest sizes; more at the smaller")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes, the JSON and PNG beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)  # of NumPy's products, which ours are where there is one problem on a CPU
    sizes, peers = [int(size) for size in options.sizes.split(",")], peers_of(options)
    every = methods(peers)
    kept = {
        "protocol": {
            "command": command(options, peers, parser),
            "versions": versions(peers),
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "iterations": ITERATIONS,
            "calls": IN_A_ROW,
        },
        "seconds": {},
        "single": {},
        "memory": {},
        "accuracy": {},
    }

    def say(*words):
        print(*words, flush=True)
        options.output.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")

    for n in sizes:
        turns = options.turns * max(1, 1024 // n)
        for kind, calls in (("seconds", max(1, min(IN_A_ROW, 2048 // n))), ("single", 1)):
            kept[kind][n] = summarise(time_in_turns(every, n, turns, calls))
            for name, figures in kept[kind][n].items():
                say(
                    f"n = {n}: {name}: {figures['ms']:.2f} ms, {figures['times_ours']:.1f} times ours, {calls} in a row"
                )
    for n in sizes:
        kept["memory"][n] = {}
        for name in every:
            kept["memory"][n][name] = measure_memory(name, n, ITERATIONS, peers)
            say(f"n = {n}: {name}: memory {kept['memory'][n][name]}")
    for regularization, iterations in ACCURACY.items():
        kept["accuracy"][regularization] = measure_accuracy(every, regularization, iterations, say)
    say("done")
    kept = json.loads(options.output.with_suffix(".json").read_text())
    write_table(kept, options.output)
    write_picture(kept, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
