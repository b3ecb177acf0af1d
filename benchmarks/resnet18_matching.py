"""What does it cost to match two ResNet-18, beside the other packages?

Two random ResNet-18 of torchvision at 64 x 64 pixels: weight matching to its end, and one training step of a soft permutation by the L2
cost. Every measurement is a process of its own with one thread, in turns. Writes docs/results/resnet18_matching.md. Run:

    python benchmarks/resnet18_matching.py --peer sinkhorn=FOLDER --peer snimu=FOLDER
"""

import argparse
import contextlib
import copy
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from connectivity_methods import Measured, warm
from torch import nn
from torchvision.models import resnet18

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "resnet18_matching.md"
TURNS, STEPS = 3, 6
# The measurements by name, and the peer that each needs.
CASES = {
    "weights": "",
    "weights, snimu": "snimu",
    "L2 step": "",
    "L2 step, sinkhorn-rebasin": "sinkhorn",
}


def networks() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(resnet18().eval())
    return models[0], models[1], torch.randn(2, 3, 64, 64)


def our_weights() -> dict[str, float]:
    from lit_rebasin import align, permutation_spec

    reference, model, x = networks()
    measured = Measured()
    spec = permutation_spec(reference, x)
    traced = measured.end()["seconds"]
    align(model, reference, method="weights", spec=spec)
    return {"trace": traced, **measured.end()}


def their_weights() -> dict[str, float]:
    from rebasin import PermutationCoordinateDescent

    reference, model, x = networks()
    measured = Measured()
    PermutationCoordinateDescent(reference, model, x).rebasin()
    return measured.end()


def our_step() -> dict[str, float]:
    from lit_rebasin import SinkhornRebasin, permutation_spec
    from lit_rebasin.alignment import l2_cost

    reference, model, x = networks()
    spec = permutation_spec(reference, x)
    rebasin = SinkhornRebasin(spec, noise=0.1)
    weights, theirs = ({n: p.detach() for n, p in one.named_parameters()} for one in (model, reference))
    weights |= {n: b for n, b in model.named_buffers() if b.ndim}
    optimizer = torch.optim.AdamW(rebasin.parameters(), lr=0.1)
    return steps(optimizer, lambda: l2_cost({n: w for n, w in rebasin(weights).items() if n in theirs}, theirs))


def their_step() -> dict[str, float]:
    from rebasin import RebasinNet
    from rebasin.loss import DistL2Loss

    reference, model, _ = networks()
    net = RebasinNet(copy.deepcopy(model), (1, 3, 64, 64))
    net.identity_init()
    criterion = DistL2Loss(reference)
    optimizer = torch.optim.AdamW(net.p.parameters(), lr=0.1)
    net.train()
    return steps(optimizer, lambda: criterion(net()))


def steps(optimizer: torch.optim.Optimizer, cost) -> dict[str, float]:
    seconds = []
    for _ in range(STEPS):
        started = time.process_time()
        optimizer.zero_grad()
        cost().backward()
        optimizer.step()
        seconds.append(time.process_time() - started)
    return {"seconds": median(seconds)}


FUNCTIONS = {
    "weights": our_weights,
    "weights, snimu": their_weights,
    "L2 step": our_step,
    "L2 step, sinkhorn-rebasin": their_step,
}


def measured_in_turns(peers: dict[str, str]) -> dict[str, list[dict[str, float]]]:
    kept: dict[str, list[dict[str, float]]] = {name: [] for name, peer in CASES.items() if not peer or peer in peers}
    for _ in range(TURNS):
        for name in kept:
            command = [
                sys.executable,
                __file__,
                "--case",
                name,
                *(["--path", peers[CASES[name]]] if CASES[name] else []),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr.strip()[-600:]}")
            kept[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(name, kept[name][-1], flush=True)
    return kept


def write(kept: dict[str, list[dict[str, float]]], command: str) -> None:
    rows = ["| what | CPU s | of which tracing |", "|---|---:|---:|"]
    for name, found in kept.items():
        traced = [one["trace"] for one in found if "trace" in one]
        cells = f"{median(one['seconds'] for one in found):.2f} | {f'{median(traced):.2f}' if traced else ''}"
        rows.append(f"| {name} | {cells} |")
    ratios = [
        f"{label}: {median(one['seconds'] for one in kept[theirs]) / median(one['seconds'] for one in kept[ours]):.1f} times as fast."
        for label, ours, theirs in (
            ("Weight matching", "weights", "weights, snimu"),
            ("A step of the L2 cost", "L2 step", "L2 step, sinkhorn-rebasin"),
        )
        if theirs in kept
    ]
    about = (
        "# Matching two ResNet-18\n\n"
        f"Two random ResNet-18 of torchvision (1000 classes, 64 x 64 pixels), one thread, medians of {TURNS} turns in processes of their "
        f"own. Weight "
        "matching until no group improves, tracing included; one step is soft permutations, the L2 cost, its gradient and AdamW, the median of "
        f"{STEPS} in a process. What torch loads for a first export and a first optimizer is left out, for all. Made by `{command}`.\n\n"
    )
    RESULTS.write_text("\n\n".join([about + "\n".join(rows), *ratios]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], help="sinkhorn=FOLDER or snimu=FOLDER")
    parser.add_argument("--case", choices=CASES, help="run one measurement in this process")
    parser.add_argument("--path", help="the folder that the peer was installed into")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case is None:
        peers = dict(peer.split("=", 1) for peer in options.peer)
        command = "python benchmarks/resnet18_matching.py" + "".join(f" --peer {name}=FOLDER" for name in peers)
        write(measured_in_turns(peers), command)
        return
    if options.path:
        sys.path.insert(0, options.path)
    warm()
    with contextlib.redirect_stdout(io.StringIO()):
        found = FUNCTIONS[options.case]()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
