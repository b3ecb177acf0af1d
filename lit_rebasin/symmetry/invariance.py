"""Show by trial that a spec leaves what a network computes unchanged."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lit_rebasin.symmetry.permute import permute
from lit_rebasin.symmetry.spec import PermutationSpec


def check_invariance(
    model: nn.Module,
    spec: PermutationSpec,
    *example_inputs: Any,
    seed: int = 0,
    tolerance: float = 1e-3,
    **example_kwargs: Any,
) -> float:
    """Permute every group at random and compare the outputs in evaluation mode.

    The weights are perturbed first: the zero biases and unit statistics of a fresh network would hide a wrong spec. The model is left as
    it was.

    Args:
        model: The network.
        spec: Its permutation symmetries.
        *example_inputs: Inputs of one forward pass.
        seed: Seed of the permutations and of the perturbation.
        tolerance: Largest difference allowed, relative to the largest output.
        **example_kwargs: Keyword inputs of the same.

    Returns:
        The largest relative difference of an output.

    Raises:
        RuntimeError: If it is above the tolerance; the sentence names the groups, with their axes, that change the function by themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = _perturb({**dict(model.named_parameters()), **dict(model.named_buffers())}, generator)
    # Tied weights go by several names in a spec, but only by their first in a functional call.
    aliases = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(aliases)}
    every = {name: tensors[first[id(tensor)]] for name, tensor in aliases}
    permutations = {name: torch.randperm(group.size, generator=generator) for name, group in spec.groups.items()}

    def outputs(chosen: dict[str, Tensor]) -> list[Tensor]:
        moved = permute(every, spec, chosen)
        result = functional_call(model, {name: moved[name] for name in tensors}, example_inputs, example_kwargs)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            expected = outputs({})
            difference = _difference(outputs(permutations), expected)
            if not difference <= tolerance:
                wrong = [n for n, p in permutations.items() if not _difference(outputs({n: p}), expected) <= tolerance]
    finally:
        for module, training in modes.items():
            module.training = training
    if not difference <= tolerance:
        axes = "; ".join(f"{name}: {', '.join(map(str, spec.groups[name].axes))}" for name in wrong)
        raise RuntimeError(
            f"Permuting changes the output by {difference:.1e} (relative). Groups at fault: {axes or 'only together'}."
        )
    return difference


def _perturb(tensors: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors with noise of a tenth of their scale; non-negative ones, such as variances, stay non-negative."""
    noisy = {}
    for name, tensor in tensors.items():
        value = tensor.detach().clone()
        if value.is_floating_point() and value.numel() > 0:
            noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            scale = value.abs().mean()
            varied = not isinstance(tensor, nn.Parameter) and bool((value > 0).all())
            value = value * (0.1 * noise).exp() if varied else value + 0.1 * noise * (scale if scale > 0 else 1.0)
        noisy[name] = value
    return noisy


def _difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, expected, strict=True) if b.numel() > 0]
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs), default=0.0)
