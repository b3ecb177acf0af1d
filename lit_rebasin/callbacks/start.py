"""From which weights a task begins."""

from typing import Literal

import torch
from torch import Tensor, nn

from lit_rebasin.alignment import interpolate
from lit_rebasin.merging.path import weights_of, write_weights

Start = Literal["previous", "fresh", "perturbed"]
STARTS = ("previous", "fresh", "perturbed")


def check_resettable(module: nn.Module) -> None:
    """Raise a ValueError that names a layer which cannot be initialised anew."""
    for name, layer in module.named_modules():
        if next(layer.parameters(recurse=False), None) is not None and not hasattr(layer, "reset_parameters"):
            raise ValueError(
                f"start='fresh' and 'perturbed' need layers with reset_parameters, which {name or 'the module'!r} ({type(layer).__name__}) "
                "lacks: give it one, or begin from the previous network."
            )


@torch.no_grad()
def begin(module: nn.Module, start: Start, seed: int) -> dict[str, Tensor]:
    """Write the weights that a task begins with, in place.

    Args:
        module: Holds the network of the tasks so far. Frozen parameters stay as they are.
        start: ``"fresh"``: every layer is initialised anew; ``"perturbed"``: half of that and half of the network as it is (Ash and Adams,
            NeurIPS 2020); ``"previous"``: nothing is changed.
        seed: Of the initialisation; the global random states are left as they are.

    Returns:
        The weights that the task begins with.
    """
    previous = {name: tensor.clone() for name, tensor in weights_of(module).items()}
    if start != "previous":
        devices = {tensor.device for tensor in previous.values() if tensor.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)
            for layer in module.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()  # type: ignore[operator]
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(previous[name])
    if start == "perturbed":
        write_weights(module, interpolate(previous, weights_of(module), 0.5))
    return {name: tensor.clone() for name, tensor in weights_of(module).items()}
