"""Show by trial that a spec leaves what a network computes unchanged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lit_rebasin.symmetry.permute import permute
from lit_rebasin.symmetry.spec import PermutationSpec

# Rounding may exceed the tolerance in float32 in an ill-conditioned network; in float64 only a wrong spec exceeds this.
_FLOAT64_TOLERANCE = 1e-6


def check_invariance(
    model: nn.Module,
    spec: PermutationSpec,
    *example_inputs: Any,
    seed: int = 0,
    tolerance: float = 1e-4,
    **example_kwargs: Any,
) -> float:
    """Permute every group at random and compare what the network gives.

    Outputs are compared in evaluation mode, and the running statistics that BatchNorm layers update with those layers in training mode. The
    weights are perturbed first: zero biases and unit statistics of a fresh network would hide a wrong spec. Half precision is computed in
    float32; a difference above the tolerance is computed again in float64, to tell rounding from a wrong spec. The model is left as it was.

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
        ValueError: If the model is on the meta device, or gives other outputs when it runs twice.
        RuntimeError: If the difference is above the tolerance; the sentence names the groups, with their axes, that change the function by
            themselves.
    """
    trial = _Trial(model, spec, (example_inputs, example_kwargs), seed)
    with _modes_kept(model), torch.no_grad(), torch.random.fork_rng():
        model.eval()
        expected = trial.repeatable_outputs()
        difference = _difference(trial.run(spec.groups)[0], expected)
        if not difference <= tolerance and not trial.holds_in_float64():
            raise RuntimeError(
                f"Permuting changes the output by {difference:.1e} (relative). {trial.culprits(expected, tolerance)} "
                "If the spec was found by permutation_spec, a rule is at fault: please report the network."
            )
        trial.check_statistics(tolerance)
    return difference


class _Trial:
    """One set of perturbed weights and of random permutations, run in several ways."""

    def __init__(self, model: nn.Module, spec: PermutationSpec, inputs: Any, seed: int) -> None:
        self.model, self.spec = model, spec
        generator = torch.Generator().manual_seed(seed)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError(
                f"{type(model).__name__} is on the meta device, where weights have no values to compare: "
                "give it some with model.to_empty(device='cpu'), or pass check=False to permutation_spec."
            )
        self.inputs = pytree.tree_map(_single, inputs)
        self.tensors = {name: _single(tensor) for name, tensor in _perturb(tensors, generator).items()}
        # Tied weights go by several names in a spec, but only by their first in a functional call.
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        first = {id(tensor): name for name, tensor in reversed(every)}
        self.names = {name: first[id(tensor)] for name, tensor in every}
        self.permutations = spec.random(generator=generator)

    def run(self, groups: Any = (), *, double: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the outputs with some groups permuted, and the buffers afterwards."""
        chosen = {name: self.permutations[name] for name in groups}
        moved = permute({name: self.tensors[first] for name, first in self.names.items()}, self.spec, chosen)
        weights, inputs = {**moved, **{name: moved[name].clone() for name in self.buffers}}, self.inputs
        if double:
            weights, inputs = pytree.tree_map(_double, (weights, inputs))
        weights = {name: weights[name] for name in self.tensors}
        args, kwargs = inputs
        result = functional_call(self.model, weights, args, kwargs)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)], weights

    @property
    def buffers(self) -> list[str]:
        return [name for name, _ in self.model.named_buffers()]

    def repeatable_outputs(self) -> list[Tensor]:
        outputs = self.run()[0]
        noise = _difference(self.run()[0], outputs)
        if noise > 0:
            raise ValueError(
                f"{type(self.model).__name__} gives outputs that differ by {noise:.1e} (relative) when it runs twice on the same input in "
                "evaluation mode, so nothing can be compared: let it draw no random numbers there, or pass check=False to permutation_spec."
            )
        return outputs

    def holds_in_float64(self) -> bool:
        try:
            outputs, expected = self.run(self.spec.groups, double=True)[0], self.run(double=True)[0]
        except RuntimeError:  # a network that insists on its own precision
            return False
        return _difference(outputs, expected) <= _FLOAT64_TOLERANCE

    def culprits(self, expected: list[Tensor], tolerance: float) -> str:
        wrong = [name for name in self.spec.groups if not _difference(self.run([name])[0], expected) <= tolerance]
        axes = "; ".join(f"{name}: {', '.join(map(str, self.spec.groups[name].axes))}" for name in wrong)
        return f"Groups at fault: {axes or 'only several together'}."

    def check_statistics(self, tolerance: float) -> None:
        """Compare the running statistics after one pass in which only the BatchNorm layers are in training mode."""
        layers = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        if not layers:
            return
        for layer in layers:
            layer.train()
        try:
            _, still = self.run(double=True)
            _, after = self.run(self.spec.groups, double=True)
        except (ValueError, RuntimeError):  # such as a single value a channel, from which there are no statistics
            return
        every = {name: still[first] for name, first in self.names.items()}
        expected = permute(every, self.spec, self.permutations)
        for name in self.buffers:
            difference = _difference([after[name]], [expected[name]])
            if not difference <= tolerance:
                raise RuntimeError(
                    f"Permuting changes what BatchNorm updates in training mode: {name} differs by {difference:.1e} (relative)."
                )


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _single(leaf: Any) -> Any:
    half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if half else leaf


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _perturb(tensors: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
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
