"""The differentiable Sinkhorn solves that sinkhorn.py compares, all as (logits, regularization, iterations) -> doubly
stochastic plan.

As a script it measures the memory of one of them and prints one JSON line: each in a process of its own, so that
nothing kept by another hides it.
"""

import argparse
import json
import re
import subprocess
import sys
import warnings
from importlib.metadata import distributions, version
from pathlib import Path

import torch

from lit_rebasin import sinkhorn

# The folder of each peer that does not come with our own environment, and what the registry calls it.
PACKAGES = {"sinkhorn": "sinkhorn-rebasin", "geomloss": "geomloss"}


def ours(logits, regularization, iterations):
    return sinkhorn(logits=logits, regularization=regularization, max_iterations=iterations, tolerance=0).plan


def ours_by_default(logits, regularization, iterations):
    """Until the tolerance is reached, by Newton steps where that is slow; the iterations are ours to choose."""
    return sinkhorn(logits=logits, regularization=regularization).plan


def unrolled(logits, regularization, iterations):
    scaled = logits / regularization
    f = torch.zeros_like(scaled[:, 0])
    for _ in range(iterations):
        g = -(scaled + f[:, None]).logsumexp(0)
        f = -(scaled + g).logsumexp(1)
    return (scaled + f[:, None] + g).exp()


def sinkhorn_rebasin(logits, regularization, iterations):
    """Call it as RebasinNet.forward does."""
    from rebasin.rebasinnet.sinkhorn import Sinkhorn

    ones = torch.ones(len(logits))
    return Sinkhorn.apply(-logits, ones, ones, iterations, regularization)


def pot(method):
    import ot

    def solve(logits, regularization, iterations):
        mass = torch.full((len(logits),), 1 / len(logits))
        # Costs above 0, as POT is meant to be given: the plain method would overflow at low temperatures.
        cost = logits.detach().amax() - logits
        options = {"method": method, "numItermax": iterations, "stopThr": 0, "warn": False}
        return ot.sinkhorn(mass, mass, cost, regularization, **options) * len(logits)

    return solve


def geomloss(logits, regularization, iterations):
    from geomloss import ot

    return ot.solve(-logits, reg=regularization, max_iter=iterations).plan * len(logits)


def methods(peers):
    """Return every method that is installed; peers says in which folders."""
    warnings.filterwarnings("ignore")
    sys.path[:0] = peers.values()
    found = {"lit-rebasin": ours}
    if "sinkhorn" in peers:
        found["sinkhorn-rebasin"] = sinkhorn_rebasin
    found |= {"unrolled log-domain loop": unrolled, "POT sinkhorn": pot("sinkhorn")}
    found["POT sinkhorn_log"] = pot("sinkhorn_log")
    if "geomloss" in peers:
        found["geomloss"] = geomloss
    return found


# Those whose memory grows with the iterations.
UNROLLED = ("unrolled log-domain loop", "POT sinkhorn", "POT sinkhorn_log")


def versions(peers):
    found = {name: version(name).split("+")[0] for name in ("torch", "lit-rebasin", "pot")}
    for peer, folder in peers.items():
        found[PACKAGES[peer]] = next(iter(distributions(name=PACKAGES[peer], path=[folder]))).version
    return found


def problem(n, kind="init", seed=0):
    """Return scores in float32, and the gradient of some loss with respect to the plan: "init" is how the published layers start."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, n, generator=generator)
    return torch.eye(n) + 0.1 * noise if kind == "init" else noise, torch.randn(n, n, generator=generator)


def plan_and_gradient(method, leaf, upstream, regularization, iterations):
    """One forward and backward. The upstream gradient must be a copy: sinkhorn-rebasin writes into it."""
    plan = method(leaf, regularization, iterations)
    return plan, torch.autograd.grad(plan, leaf, upstream)[0]


def status_bytes(key):
    return 1024 * int(re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def memory_growth(method, n, iterations):
    """Return how far the process grew over what it was with its inputs loaded and the libraries warm: Linux only."""
    logits, upstream = problem(64)
    plan_and_gradient(method, logits.requires_grad_(), upstream, 1.0, iterations)
    logits, upstream = problem(n)
    logits.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
    before = status_bytes("VmRSS")
    results = plan_and_gradient(method, logits, upstream, 1.0, iterations)
    peak = status_bytes("VmHWM") - before
    del results
    return peak


def measure_memory(name, n, iterations, peers):
    command = [sys.executable, __file__, "--method", name, "--size", str(n), "--iterations", str(iterations)]
    command += [f"--peer={peer}={folder}" for peer, folder in peers.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"failure": done.stderr.strip()[-200:]}


def peers_of(options):
    peers = dict(peer.split("=", 1) for peer in options.peer)
    unknown = peers.keys() - PACKAGES.keys()
    if unknown:
        raise SystemExit(f"--peer takes {', '.join(PACKAGES)}, not {', '.join(sorted(unknown))}.")
    return peers


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--peer", action="append", default=[], help="sinkhorn=FOLDER or geomloss=FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    method = methods(peers_of(options))[options.method]
    print(json.dumps({"bytes": memory_growth(method, options.size, options.iterations)}))


if __name__ == "__main__":
    main()
