"""Which of torchvision's classification models have their permutation symmetries found, how many, and at what cost?

Prints a line a model, keeps the figures in docs/results/symmetry_coverage.json and writes docs/results/symmetry_coverage.md.
Run: python benchmarks/symmetry_coverage.py --peer sinkhorn=FOLDER --peer snimu=FOLDER (benchmarks/peers.md says how to get the peers).
A model with figures is not measured again, unless --models names it: delete the JSON file to start anew.
"""

import argparse
import gc
import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import symmetry_peers
import torch
import torchvision
from randomised_models import IMAGE_SIZES, build, example_input, relative_difference
from symmetry_coverage_table import write_table
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from lit_rebasin import PermutationSpec, check_invariance, permutation_spec, permute
from lit_rebasin.symmetry import Group

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "symmetry_coverage.json"
REPEATS = {"resnet18": 9}
# check_invariance holds up to four copies of the weights, and with BatchNorm three more in float64.
BYTES_OF_A_CHECK = {False: 16, True: 40}


def seconds_of(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def time_export_and_spec(model, x, repeats):
    """Return the seconds of both, timed in turns after a warm-up, and the spec."""
    jobs = {
        "export": lambda: torch.export.export(model, (x,), strict=False),
        "spec": lambda: permutation_spec(model, x, check=False),
    }
    jobs["export"]()
    taken, results = {name: [] for name in jobs}, {}
    for turn in range(repeats):
        for name in list(jobs)[:: 1 if turn % 2 == 0 else -1]:
            gc.collect()
            seconds, results[name] = seconds_of(jobs[name])
            taken[name].append(seconds)
    return taken["export"], taken["spec"], results["spec"]


def output_change(model, x, expected, spec):
    moved = permute(model.state_dict(), spec, spec.random(generator=torch.Generator().manual_seed(2)))
    return relative_difference(functional_call(model, moved, (x,)), expected)


def control(model, x, expected, spec):
    """Return how far the output moves when the first group is reversed in one tensor only, where it must not be."""
    group = next(iter(spec.groups.values()))
    axis = group.axes[0]
    weight = {axis.tensor: model.state_dict()[axis.tensor]}
    only = PermutationSpec({group.name: Group(group.name, group.size, (axis,))})
    reversed_ = permute(weight, only, {group.name: torch.arange(group.size).flip(0)})
    return relative_difference(functional_call(model, reversed_, (x,)), expected)


def free_bytes():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def measure(name):
    x = example_input(name, IMAGE_SIZES.get(name, 224))
    model = build(name, x)
    export_seconds, spec_seconds, spec = time_export_and_spec(model, x, REPEATS.get(name, 1))
    elements = sum(parameter.numel() for parameter in model.parameters())
    expected = model(x)
    found = {
        "parameters": elements,
        "groups": len(spec.groups),
        "coverage": spec.coverage(model),
        "fixed": sorted(set(spec.fixed.values())),
        "error": output_change(model, x, expected, spec),
        "control": control(model, x, expected, spec),
        "export_seconds": median(export_seconds),
        "spec_seconds": median(spec_seconds),
        "spec_over_export": median(ours / alone for ours, alone in zip(spec_seconds, export_seconds, strict=True)),
        "repeats": len(spec_seconds),
    }
    batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if free_bytes() < BYTES_OF_A_CHECK[batch_norm] * elements:
        return found | {"check_error": None, "check_seconds": None}
    seconds, error = seconds_of(lambda: check_invariance(model, spec, x))
    return found | {"check_error": error, "check_seconds": seconds}


def measure_or_say_why(name):
    try:
        return measure(name)
    except (ValueError, RuntimeError) as error:
        return {"failure": " ".join(str(error).split())}


def protocol(every, peers):
    packages = ["torch", "torchvision", "lit-rebasin"]
    return {
        "command": "python benchmarks/symmetry_coverage.py --peer sinkhorn=FOLDER --peer snimu=FOLDER",
        "versions": {package: version(package).split("+")[0] for package in packages},
        "models": len(every),
        "threads": torch.get_num_threads(),
        "peers": {peer: symmetry_peers.title(peer, folder) for peer, folder in peers.items()},
        "peer_seconds": symmetry_peers.SECONDS,
    }


def main():
    every = torchvision.models.list_models(module=torchvision.models)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", help="measure these, such as resnet18,vit_b_16; all without figures by default")
    parser.add_argument("--peer", action="append", default=[], help="sinkhorn=FOLDER or snimu=FOLDER")
    options = parser.parse_args()
    again = options.models.split(",") if options.models else []
    peers = dict(peer.split("=", 1) for peer in options.peer)
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}, "peers": {}}
    before = kept.get("protocol", {}).get("peers", {})
    kept["protocol"] = protocol(every, peers)
    kept["protocol"]["peers"] = before | kept["protocol"]["peers"]

    def keep(owner, figures, name, measured):
        figures[name] = measured
        print(owner, name, json.dumps(measured), flush=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")

    def wanted(names, figures):
        return [name for name in names if name in again or not (again or name in figures)]

    for name in wanted(every, kept["models"]):
        keep("lit-rebasin", kept["models"], name, measure_or_say_why(name))
        gc.collect()
    for peer, folder in peers.items():
        figures = kept["peers"].setdefault(peer, {})
        for name in wanted(symmetry_peers.MODELS, figures):
            keep(peer, figures, name, symmetry_peers.run(peer, folder, name))
    write_table(kept, RESULTS.with_suffix(".md"))


if __name__ == "__main__":
    main()
