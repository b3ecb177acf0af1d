"""Does a torchvision model still compute the same function after a peer has permuted it at random?

Used by symmetry_coverage.py. As a script it does one model with one peer and prints one JSON line: each in a process of its own, because both
peers install a module called `rebasin`.
"""

import argparse
import contextlib
import copy
import io
import json
import subprocess
import sys
import time
from importlib.metadata import distributions

import torch
from randomised_models import build, example_input, relative_difference, with_batch_statistics

PACKAGES = {"sinkhorn": "sinkhorn-rebasin", "snimu": "rebasin"}
SECONDS = 60
# Small ones of most families: larger ones have the same operators, and take the peers more than a minute.
MODELS = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
    mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t
    vgg11 vgg11_bn vit_b_16 wide_resnet50_2
""".split()  # noqa: SIM905
# The smallest side that a network takes; the peers are given less than our own table to be quick.
SIZES = {"inception_v3": 75, "vit_b_16": 224, "maxvit_t": 224}


def permute_by_sinkhorn_rebasin(model, x):
    """Give RebasinNet hard permutations, as its evaluation mode applies them."""
    from rebasin import RebasinNet

    with torch.enable_grad():  # its graph is drawn from the autograd graph
        net = RebasinNet(copy.deepcopy(model).requires_grad_(True), tuple(x.shape))
    net.eval()
    net.random_init()
    return net().eval(), len(net.p)


def permute_by_snimu(model, x):
    """Draw each permutation at random in place of matching, and let it apply them."""
    from rebasin import PermutationCoordinateDescent

    moved = copy.deepcopy(model)
    graph = PermutationCoordinateDescent(copy.deepcopy(model), moved, x).pinit.model_graph
    drawn = {}
    for permutation, _ in graph.permutation_to_info:
        permutation.perm_indices = torch.randperm(len(permutation.perm_indices))
        drawn[id(permutation)] = permutation
    graph.apply_permutations()
    return moved.eval(), len(drawn)


PEERS = {"sinkhorn": permute_by_sinkhorn_rebasin, "snimu": permute_by_snimu}


def measure(peer, name):
    x = example_input(name, SIZES.get(name, 64))
    model = build(name, x)
    start = time.process_time()
    try:
        moved, groups = PEERS[peer](model, x)
    except Exception as error:  # whatever a peer raises is its result
        return {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    seconds = time.process_time() - start
    old, new = dict(model.named_parameters()), dict(moved.named_parameters())
    changed = sum(old[key].numel() for key in old if not torch.equal(old[key], new[key]))
    found = {
        "groups": groups,
        "coverage": changed / sum(parameter.numel() for parameter in old.values()),
        "error": relative_difference(moved(x), model(x)),
        "seconds": seconds,
    }
    if not found["error"] <= 1e-3:
        found["error_with_batch_statistics"] = relative_difference(
            with_batch_statistics(moved, x), with_batch_statistics(model, x)
        )
    return found


def title(peer, folder):
    found = next(iter(distributions(name=PACKAGES[peer], path=[folder])))
    return f"{PACKAGES[peer]} {found.version}"


def run(peer, folder, name):
    """Return what a process of its own measures."""
    command = [sys.executable, __file__, "--peer", peer, "--path", folder, "--model", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"more than {SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"failure": done.stderr.strip()[-200:]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--path", required=True, help="the folder that the peer was installed into")
    parser.add_argument("--model", required=True, help="a name in torchvision.models")
    options = parser.parse_args()
    sys.path.insert(0, options.path)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with contextlib.redirect_stdout(io.StringIO()):
        found = measure(options.peer, options.model)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
