"""Networks, and files of them, for the tests of commands that read checkpoints."""

import inspect
from itertools import pairwise

import numpy as np
import safetensors.torch
import torch
from torch import nn

MODEL = ["--model", "aligned_by_test.mlp"]
SHAPE = ["--input", "2,6"]


def mlp(width=12, norm=False):
    first = [nn.Linear(6, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def tied():
    """Return a network in which one layer runs twice, under two names."""
    middle = nn.Linear(12, 12)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), middle, nn.ReLU(), middle, nn.ReLU(), nn.Linear(12, 3))


CODE = f"""
from torch import nn

{inspect.getsource(mlp)}

{inspect.getsource(tied)}

class Pair(nn.Sequential):
    "Gives two outputs, which are no logits."

    def forward(self, x):
        return super().forward(x), x


def pair():
    return Pair(*mlp())
"""


def drawn(seed, width=12, norm=False):
    torch.manual_seed(seed)
    network = mlp(width, norm)
    for parameter in network.parameters():
        parameter.data *= 3  # else all outputs are near 0, and nothing between two networks is lost
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def shuffled(network, seed=0):
    """Return the state dict of a network whose hidden neurons stand in another order, moved by hand."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    linear = [name.removesuffix(".weight") for name, tensor in state.items() if tensor.ndim == 2]
    for layer, following in pairwise(linear):
        order = torch.randperm(len(state[f"{layer}.bias"]), generator=generator)
        between = range(int(layer), int(following))
        for name, tensor in state.items():
            if int(name.partition(".")[0]) in between and tensor.ndim:
                state[name] = tensor[order]
        state[f"{following}.weight"] = state[f"{following}.weight"][:, order]
    return state


def save(state, file):
    """Save weights in the format of the suffix; a .ckpt is one of a LightningModule that holds the network as ``net``."""
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(state, file)
    elif file.suffix == ".ckpt":
        wrapped = {f"net.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(3)}
        torch.save({"state_dict": wrapped, "epoch": 3, "hyper_parameters": {"lr": 0.1, "width": 4}}, file)
    else:
        torch.save(state, file)
    return str(file)


def save_examples(file, labels=True, n=90):
    draws = np.random.default_rng(0)
    arrays = {"x": draws.normal(size=(n, 6)), "y": draws.integers(0, 3, n)}
    np.savez(file, **arrays if labels else {"x": arrays["x"]})
    return str(file)


def examples(file):
    arrays = np.load(file)
    return torch.tensor(arrays["x"]).float(), torch.tensor(arrays["y"])


def loaded(file):
    return safetensors.torch.load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def table(shown):
    """Return the cells of a printed table by the first of each row."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]
    return {name: cells for name, *cells in rows}
