"""Do the matchers undo a permutation that was planted? A network against its own permuted copy, which the right permutation makes equal again.

Writes docs/results/planted_permutations.{json,md}, a line after every method and network; what the file holds already is not run again. Run:

    python benchmarks/planted_permutations.py
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18, vgg11_bn

from lit_rebasin import PermutationSpec, align, permutation_spec, permute
from lit_rebasin.symmetry import invert

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "planted_permutations.md"
SEEDS = 20
METHODS = {
    "weights": {"method": "weights"},
    "frank-wolfe": {"method": "frank-wolfe"},
    "covariance": {"method": "covariance"},
    # From the identity: what weight matching finds is no start here.
    "sinkhorn, l2": {"method": "sinkhorn", "cost": "l2", "init": "identity", "steps": 200, "learning_rate": 5.0},
}


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((784, 128), (128, 128), (128, 128)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def vgg() -> nn.Module:
    """VGG-11 with BatchNorm and a small head, for pictures of 32 x 32."""
    return nn.Sequential(vgg11_bn().features, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def vit_tiny() -> nn.Module:
    """A vision transformer of the size of ViT-tiny in width, heads and depth, for pictures of 32 x 32."""
    model = VisionTransformer(32, 4, 12, 3, 192, 768, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision's is zero
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (64, 784)),
    "VGG-11 with BatchNorm": (vgg, (32, 3, 32, 32)),
    "ResNet-18": (lambda: resnet18(num_classes=10), (16, 3, 64, 64)),
    "ViT-tiny": (vit_tiny, (8, 3, 32, 32)),
}


def finds(network: str, method: str, seed: int, specs: dict[str, PermutationSpec]) -> bool:
    """Return whether every neuron of a permuted copy is carried back to its place."""
    make, shape = NETWORKS[network]
    torch.manual_seed(seed)
    reference, x = make().eval(), torch.randn(shape)
    if network not in specs:
        specs[network] = permutation_spec(reference, x[:2])
    spec = specs[network]
    planted = spec.random(generator=torch.Generator().manual_seed(seed))
    data: list[Tensor] | None = [x] if method == "covariance" else None
    found = align(permute(reference, spec, planted), reference, spec=spec, data=data, seed=seed, **METHODS[method])
    return all(torch.equal(found.permutations[name], p) for name, p in invert(planted).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--methods", default=";".join(METHODS), help="divided by semicolons")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS.with_suffix(".json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    specs: dict[str, PermutationSpec] = {}
    for network in options.networks.split(","):
        for method in options.methods.split(";"):
            seeds = kept.setdefault(network, {}).setdefault(method, [])
            for seed in range(len(seeds), SEEDS):
                seeds.append(finds(network, method, seed, specs))
                path.write_text(json.dumps(kept, indent=1) + "\n")
            print(network, method, sum(seeds), "of", len(seeds), flush=True)
            write(kept)


def write(kept: dict[str, dict[str, list[bool]]]) -> None:
    rows = ["| method | " + " | ".join(NETWORKS) + " |", "|---" + "|---:" * len(NETWORKS) + "|"]
    for method in METHODS:
        found = [kept.get(network, {}).get(method, []) for network in NETWORKS]
        cells = [f"{sum(seeds)} of {len(seeds)}" if seeds else "not run" for seeds in found]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    about = (
        "# Planted permutations\n\n"
        "A network with fresh weights against its own copy, permuted at random in every group: seeds on which every neuron is carried back "
        "to its place. Networks of torchvision, for pictures of 32 x 32 (ResNet-18: 64 x 64). `sinkhorn, l2` takes up to 200 steps at a "
        "learning rate of 5 from the identity. Covariance sees 8 to 64 random inputs. Made by `python benchmarks/planted_permutations.py`.\n\n"
    )
    RESULTS.write_text(about + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
