"""Carry one network towards another by one method, in a process of its own: two of the peers install a module called `rebasin`.

Used by linear_mode_connectivity.py. As a script it reads a folder with both networks and the data, writes the permuted network beside them, and
prints one JSON line: CPU seconds and how far the process grew.
"""

import argparse
import contextlib
import copy
import io
import json
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from cifar_networks import NETWORKS
from torch import nn
from torch.nn.functional import cross_entropy

# Ours: the arguments of lit_rebasin.align. Loss-driven methods see the same labelled images as the peers' do.
OURS = {
    "identity": {"method": "identity"},
    "weights": {"method": "weights"},
    "weights, 10 restarts": {"method": "weights", "restarts": 10},
    "weights, as published": {"method": "weights", "normalize": False},
    "frank-wolfe": {"method": "frank-wolfe"},
    "covariance": {"method": "covariance"},
    "covariance, power 1": {"method": "covariance", "power": 1.0},
    "activations": {"method": "activations"},
    "activations, cosine": {"method": "activations", "similarity": "cosine"},
    "straight-through": {"method": "straight-through", "init": "covariance", "steps": 60},
    "sinkhorn, l2": {"method": "sinkhorn", "cost": "l2", "init": "identity", "steps": 100, "learning_rate": 1.0},
    "sinkhorn, midpoint": {"method": "sinkhorn", "cost": "midpoint", "init": "covariance", "steps": 180},
    "sinkhorn, midpoint, 20 steps": {"method": "sinkhorn", "cost": "midpoint", "init": "covariance", "steps": 20},
    "sinkhorn, midpoint, from activations": {
        "method": "sinkhorn",
        "cost": "midpoint",
        "init": "activations",
        "steps": 40,
    },
    "sinkhorn, random point": {"method": "sinkhorn", "cost": "random-point", "init": "covariance", "steps": 180},
}
# The peers, with the steps, learning rates and batches of their own examples, except where the table says otherwise.
PEERS = {
    "sinkhorn-rebasin, midpoint": ("sinkhorn", "mid"),
    "sinkhorn-rebasin, random point": ("sinkhorn", "random"),
    "sinkhorn-rebasin, L2, lr 1": ("sinkhorn", "l2"),
    "snimu's rebasin, weights": ("snimu", ""),
}
EPOCHS, BATCH, PICTURES, L2_STEPS = 20, 1000, 250, 100


class Measured:
    """CPU seconds, and how far the process grows beyond what it holds with its libraries loaded; Linux only."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
        self.bytes, self.start = self._largest_bytes(), time.process_time()

    def end(self):
        seconds = time.process_time() - self.start
        return {"seconds": seconds, "megabytes": (self._largest_bytes() - self.bytes) / 2**20}

    @staticmethod
    def _largest_bytes():
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def network(kind):
    """Return an untrained network: an MNIST MLP of a width, or a CIFAR network by name."""
    if isinstance(kind, str):
        return NETWORKS[kind]()
    return mlp(kind)


def mlp(width):
    widths = (784, width, width, width, 10)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def warm():
    """Let torch load what it loads for a first export and a first optimizer, which is no part of any method; the same in every process."""
    model = mlp(4)
    torch.export.export(model, (torch.zeros(2, 784),), strict=False)
    optimizer = torch.optim.AdamW(model.parameters())
    cross_entropy(model(torch.zeros(2, 784)), torch.zeros(2, dtype=torch.long)).backward()
    optimizer.step()


def by_ours(name, model, reference, inputs, targets):
    from lit_rebasin import align, permutation_spec, permute

    measured = Measured()
    batch = BATCH if inputs.ndim == 2 else PICTURES
    data = list(zip(inputs.split(batch), targets.split(batch), strict=True))
    spec = permutation_spec(reference, inputs[:2])
    found = align(model, reference, spec=spec, data=data, **OURS[name])
    return permute(model, spec, found.permutations), measured.end()


def by_sinkhorn_rebasin(kind, model, reference, inputs, targets):
    from rebasin import RebasinNet
    from rebasin.loss import DistL2Loss, MidLoss, RndLoss

    measured = Measured()
    net = RebasinNet(copy.deepcopy(model), (1, *inputs.shape[1:]))
    if kind == "l2":
        net.identity_init()
    optimizer = torch.optim.AdamW(net.p.parameters(), lr=1.0 if kind == "l2" else 0.1)
    held = copy.deepcopy(reference)
    criterion = {
        "l2": lambda: DistL2Loss(held),
        "mid": lambda: MidLoss(held, criterion=cross_entropy),
        "random": lambda: RndLoss(held, criterion=cross_entropy),
    }[kind]()
    steps = [None] * L2_STEPS
    if kind != "l2":
        # As in their examples, nine tenths of the images train and the rest would validate.
        kept = len(inputs) * 9 // 10
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(kept, generator=generator).split(BATCH) for _ in range(EPOCHS)]
        steps = [order for epoch in orders for order in epoch]
    net.train()
    for order in steps:
        moved = net()
        loss = criterion(moved) if order is None else criterion(moved, inputs[order], targets[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    return copy.deepcopy(net()).eval(), measured.end()


def by_snimu(model, reference, inputs):
    from rebasin import PermutationCoordinateDescent

    measured = Measured()
    moved = copy.deepcopy(model)
    descent = PermutationCoordinateDescent(copy.deepcopy(reference), moved, inputs[:2])
    descent.rebasin()
    return moved, measured.end()


def carry(name, folder):
    """Run one method; write what it made of the model."""
    kept = torch.load(folder / "data.pt")
    inputs, targets = kept["inputs"], kept["targets"]
    model, reference = (network(kept["network"]).eval() for _ in range(2))
    model.load_state_dict(torch.load(folder / "model.pt"))
    reference.load_state_dict(torch.load(folder / "reference.pt"))
    if name in OURS:
        moved, figures = by_ours(name, model, reference, inputs, targets)
    else:
        peer, kind = PEERS[name]
        by_peer = by_sinkhorn_rebasin if peer == "sinkhorn" else lambda _, m, r, x, y: by_snimu(m, r, x)
        moved, figures = by_peer(kind, model, reference, inputs, targets)
    torch.save(moved.state_dict(), folder / "moved.pt")
    return figures


def by_process(name, folder, peers):
    """Return what a process of its own measures, or how it failed."""
    command = [sys.executable, __file__, name, str(folder)]
    if name in PEERS:
        command += ["--path", peers[PEERS[name][0]]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*OURS, *PEERS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--path", help="the folder that the peer was installed into")
    options = parser.parse_args()
    if options.path:
        sys.path.insert(0, options.path)
    torch.set_num_threads(1)
    warm()
    with contextlib.redirect_stdout(io.StringIO()):
        found = carry(options.name, options.folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
