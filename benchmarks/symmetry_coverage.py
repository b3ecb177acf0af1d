"""Which of torchvision's classification models have their permutation symmetries found, how many, and at what cost?

Prints a line a model, keeps the figures in docs/results/symmetry_coverage.json and writes docs/results/symmetry_coverage.md.
Run: python benchmarks/symmetry_coverage.py --peer sinkhorn=FOLDER --peer snimu=FOLDER (benchmarks/peers.md says how to get the peers),
or with --models resnet18,vit_b_16 to do some of them again.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torchvision
from randomised_models import IMAGE_SIZES, build, example_input, relative_difference
from symmetry_coverage_table import write_table
from torch.func import functional_call

from lit_rebasin import check_invariance, permutation_spec, permute

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "symmetry_coverage.json"
WORKER = Path(__file__).with_name("symmetry_peers.py")
REPEATS = {"resnet18": 3}
PEER_SECONDS = 60
PEER_MODELS = """
    alexnet, convnext_tiny, densenet121, efficientnet_b0, efficientnet_v2_s, googlenet, inception_v3, maxvit_t,
    mnasnet0_5, mobilenet_v2, mobilenet_v3_small, regnet_x_400mf, regnet_y_400mf, resnet18, resnet50,
    resnext50_32x4d, shufflenet_v2_x0_5, squeezenet1_0, swin_t, swin_v2_t, vgg11, vgg11_bn, vit_b_16,
    wide_resnet50_2
"""
# check_invariance holds several copies of the weights, two of them in float64.
BYTES_OF_A_CHECK = 10


def seconds_of(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def time_export_and_spec(model, x, repeats):
    """Return the median seconds of both, timed in turns after a warm-up, and the spec."""
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
    return median(taken["export"]), median(taken["spec"]), results["spec"]


def output_change(model, x, expected, spec):
    moved = permute(model.state_dict(), spec, spec.random(generator=torch.Generator().manual_seed(2)))
    return relative_difference(functional_call(model, moved, (x,)), expected)


def control(model, x, expected, spec):
    """Return how far the output moves when the first group is permuted in one tensor only, where it must not be."""
    group = next(iter(spec.groups.values()))
    axis = group.axes[0]
    index = torch.arange(model.state_dict()[axis.tensor].shape[axis.dim])
    entries = axis.entries(group.size)
    index[entries.flatten()] = entries.flip(1).flatten()
    weight = model.state_dict()[axis.tensor].index_select(axis.dim, index)
    return relative_difference(functional_call(model, {axis.tensor: weight}, (x,)), expected)


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
        "error": output_change(model, x, expected, spec),
        "control": control(model, x, expected, spec),
        "export_seconds": export_seconds,
        "spec_seconds": spec_seconds,
    }
    if free_bytes() < BYTES_OF_A_CHECK * 4 * elements:
        return found | {"check_error": None, "check_seconds": None}
    seconds, error = seconds_of(lambda: check_invariance(model, spec, x))
    return found | {"check_error": error, "check_seconds": seconds}


def measure_or_say_why(name):
    try:
        return measure(name)
    except (ValueError, RuntimeError) as error:
        return {"failure": " ".join(str(error).split())}


def run_peer(peer, folder, name):
    command = [sys.executable, str(WORKER), "--peer", peer, "--path", folder, "--model", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"no result in {PEER_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"failure": done.stderr.strip()[-200:]}


def protocol(peers):
    packages = ["torch", "torchvision", "lit-rebasin"]
    told = RESULTS.exists() and json.loads(RESULTS.read_text()).get("protocol", {}).get("peers")
    return {
        "command": "python benchmarks/symmetry_coverage.py --peer sinkhorn=FOLDER --peer snimu=FOLDER",
        "peer_seconds": PEER_SECONDS,
        "versions": {package: version(package).split("+")[0] for package in packages},
        "threads": torch.get_num_threads(),
        "peers": {peer: _installed(folder) for peer, folder in peers.items()} or told or {},
    }


def _installed(folder):
    names = [path.name.removesuffix(".dist-info") for path in sorted(Path(folder).glob("*rebasin*.dist-info"))]
    return ", ".join(name.replace("-", " ").replace("_", "-") for name in names)


def main():
    every = torchvision.models.list_models(module=torchvision.models)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(every), help="those to measure; the others keep their figures")
    parser.add_argument("--peer", action="append", default=[], help="sinkhorn=FOLDER or snimu=FOLDER")
    options = parser.parse_args()
    chosen = options.models.split(",")
    peers = dict(peer.split("=", 1) for peer in options.peer)
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}, "peers": {}}
    for name in [name for name in every if name in chosen]:
        kept["models"][name] = measure_or_say_why(name)
        print(name, json.dumps(kept["models"][name]), flush=True)
        gc.collect()
        _keep(kept, peers)
    for peer, folder in peers.items():
        for name in [name for name in re.findall(r"\w+", PEER_MODELS) if name in chosen]:
            kept["peers"].setdefault(peer, {})[name] = run_peer(peer, folder, name)
            print(peer, name, json.dumps(kept["peers"][peer][name]), flush=True)
            _keep(kept, peers)
    write_table(kept, RESULTS.with_suffix(".md"))


def _keep(found, peers):
    found["protocol"] = protocol(peers)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
