"""Show by trial that a spec leaves what a network computes unchanged."""

from collections.abc import Callable, Iterable, Mapping
from math import inf, isnan, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lit_rebasin.symmetry.keep import attributes_kept
from lit_rebasin.symmetry.permute import permute
from lit_rebasin.symmetry.spec import PermutationSpec, tensors_of

# Largest difference of an output that is put down to rounding, relative to the largest output.
_TOLERANCE = 1e-4
# A parameter smaller than this share of a fresh layer's would hide what comes before it.
_TINY = 0.01
# Rounding may exceed the tolerance in float32 in an ill-conditioned network; in float64 only a wrong spec exceeds this.
_FLOAT64_TOLERANCE = 1e-6


def check_invariance(
    model: nn.Module,
    spec: PermutationSpec,
    *example_inputs: Any,
    seed: int = 0,
    tolerance: float = _TOLERANCE,
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
        ValueError: If the model is on the meta device, gives NaN, or gives other outputs when it runs twice.
        RuntimeError: If the difference is above the tolerance; the sentence names the groups, with their axes, that change the function by
            themselves.
    """

    def run(weights: dict[str, Tensor]) -> Any:
        with attributes_kept(model.modules()):  # some cache what they compute from their weights
            return functional_call(model, weights, *_inputs(weights, example_inputs, example_kwargs))

    trial = Trial(model, spec, run, seed)
    with attributes_kept(model.modules()), torch.no_grad(), torch.random.fork_rng():
        model.eval()
        expected = trial.outputs()
        if not any(output.numel() for output in expected):
            raise ValueError(
                f"{type(model).__name__} gives no tensor with an entry on the example inputs, so nothing can be compared: give it an input "
                "that is not empty, or let it return tensors, or lists, tuples or dicts of them."
            )
        if any(output.isnan().any() for output in expected):
            raise ValueError(
                f"{type(model).__name__} gives NaN on the example inputs, so nothing can be compared: give it other inputs, "
                "or pass check=False to permutation_spec."
            )
        noise = _difference(trial.outputs(), expected)
        if noise > tolerance / 10:
            raise ValueError(
                f"{type(model).__name__} gives outputs that differ by {noise:.1e} (relative) when it runs twice on the same input in "
                "evaluation mode, so nothing can be compared: let it draw no random numbers there, or pass check=False to permutation_spec."
            )
        difference = trial.check(expected, tolerance)
        _check_statistics(trial, model, tolerance)
    return difference


def check_graph(
    model: nn.Module, spec: PermutationSpec, graph: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Compare what the exported graph of a module gives under permutations, with dropout left out; the graph is changed.

    Raises:
        RuntimeError: If the outputs differ, as in `check_invariance`.
    """
    for node in graph.graph.nodes:
        if "dropout" in str(node.target) and node.op == "call_function":
            node.args = (node.args[0], 0.0, False)
    graph.recompile()

    def run(weights: dict[str, Tensor]) -> Any:
        return functional_call(graph, weights, *_inputs(weights, args, kwargs))

    with torch.no_grad(), torch.random.fork_rng():
        trial = Trial(model, spec, run, seed=0)
        expected = trial.outputs()
        if _difference(trial.outputs(), expected) == 0:  # else it draws random numbers, and cannot be compared
            trial.check(expected, _TOLERANCE)


class Trial:
    """One set of perturbed weights and of random permutations, for runs of a network that should all give the same.

    Args:
        model: Whose weights; they are copied.
        spec: The symmetries.
        run: Gives outputs of the network with given weights.
        seed: Seed of the permutations and of the perturbation.

    Raises:
        ValueError: If the model is on the meta device.
    """

    def __init__(
        self, model: nn.Module, spec: PermutationSpec, run: Callable[[dict[str, Tensor]], Any], seed: int
    ) -> None:
        self.spec, self.call = spec, run
        generator = torch.Generator().manual_seed(seed)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError(
                f"{type(model).__name__} is on the meta device, where weights have no values to compare: "
                "give it some with model.to_empty(device='cpu'), or pass check=False to permutation_spec."
            )
        self.tensors = {name: _single(tensor) for name, tensor in _perturb(tensors, generator).items()}
        self.buffers = [name for name, _ in model.named_buffers()]
        # Tied weights go by several names in a spec, but only by their first in a functional call.
        first = {id(tensor): name for name, tensor in tensors.items()}
        self.names = {name: first[id(tensor)] for name, tensor in tensors_of(model).items()}
        drawn = spec.random(generator=generator)
        kept = {name for name, order in drawn.items() if torch.equal(order, torch.arange(len(order)))}
        self.permutations = {name: order.roll(1) if name in kept else order for name, order in drawn.items()}

    def permuted(self, tensors: dict[str, Tensor], groups: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors with some groups permuted, by the names that a functional call takes."""
        chosen = {name: self.permutations[name] for name in groups}
        moved = permute({name: tensors[first] for name, first in self.names.items()}, self.spec, chosen)
        return {name: moved[name] for name in tensors}

    def weights(self, groups: Iterable[str] = (), *, double: bool = False) -> dict[str, Tensor]:
        """Return weights for one run, which may write to its buffers."""
        moved = self.permuted(self.tensors, groups)
        moved |= {name: moved[name].clone() for name in self.buffers}
        return {name: _double(tensor) for name, tensor in moved.items()} if double else moved

    def outputs(self, groups: Iterable[str] = (), *, double: bool = False) -> list[Tensor]:
        """Return the tensors that the network gives with some groups permuted."""
        result = self.call(self.weights(groups, double=double))
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def check(self, expected: list[Tensor], tolerance: float) -> float:
        """Return the largest relative difference that all permutations together make.

        Raises:
            RuntimeError: If it is above the tolerance, and not by rounding.
        """
        difference = max((_difference(self.outputs(groups), expected) for groups in self.rounds()), key=_rank)
        if difference <= tolerance or self._holds_in_float64():
            return difference
        wrong = self.culprits(expected, tolerance)
        axes = "; ".join(f"{name}: {', '.join(map(str, self.spec.groups[name].axes))}" for name in wrong)
        raise RuntimeError(
            f"Permuting changes the output by {difference:.1e} (relative). Groups at fault: {axes or 'only several together'}. "
            "If the spec was found by permutation_spec, a rule is at fault: please report the network."
        )

    def rounds(self) -> list[list[str]]:
        """Return sets of groups to permute: all, and as many more as tell any two groups apart."""
        names = list(self.spec.groups)
        halves = [
            [name for k, name in enumerate(names) if k >> bit & 1] for bit in range((len(names) - 1).bit_length())
        ]
        return [names, *halves]

    def culprits(self, expected: list[Tensor], tolerance: float) -> list[str]:
        """Return the groups that change the function by themselves."""
        return [name for name in self.spec.groups if not _difference(self.outputs([name]), expected) <= tolerance]

    def _holds_in_float64(self) -> bool:
        try:
            expected = self.outputs(double=True)
            differences = [_difference(self.outputs(groups, double=True), expected) for groups in self.rounds()]
        except (RuntimeError, ValueError, TypeError):  # a network that insists on its own precision
            return False
        return all(difference <= _FLOAT64_TOLERANCE for difference in differences)


def _check_statistics(trial: Trial, model: nn.Module, tolerance: float) -> None:
    """Compare the running statistics after one pass in which only the BatchNorm layers are in training mode."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    for layer in layers:
        layer.train()
    try:
        worst, name = _worst_statistics(trial, double=False)
        if worst > tolerance:
            worst, name = _worst_statistics(trial, double=True)
    except (ValueError, RuntimeError):  # such as a single value a channel, from which there are no statistics
        return
    if worst > tolerance:
        raise RuntimeError(
            f"Permuting changes what BatchNorm updates in training mode: {name} differs by {worst:.1e} (relative)."
        )


def _worst_statistics(trial: Trial, *, double: bool) -> tuple[float, str]:
    """Return how far one pass with permuted weights ends from the permuted end of one without, and in which buffer."""
    still = trial.weights(double=double)
    trial.call(still)
    moved = trial.permuted(still, trial.spec.groups)
    expected = {name: moved[name] for name in trial.buffers}
    del still, moved  # weights are large
    after = trial.weights(trial.spec.groups, double=double)
    trial.call(after)
    differences = [(_difference([after[name]], [tensor]), name) for name, tensor in expected.items()]
    worst, name = max(differences, key=lambda found: _rank(found[0]), default=(0.0, ""))
    return _rank(worst), name


def _single(leaf: Any) -> Any:
    half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if half else leaf


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _inputs(weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """Return copies of example inputs, which some networks write to, in the precision of the weights."""
    double = any(tensor.dtype == torch.float64 for tensor in weights.values())

    def fresh(leaf: Any) -> Any:
        leaf = _double(leaf) if double else _single(leaf)
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(fresh, (args, kwargs))


def _rank(difference: float) -> float:
    return inf if isnan(difference) else difference


def _perturb(tensors: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors with noise, which keeps tensors without a negative entry, such as variances, so.

    The noise is a tenth of their scale, or of what a fresh layer would have where theirs is tiny: neither a bias of zero nor a layer scale of
    1e-6 must hide anything.
    """
    noisy = {}
    for name, tensor in tensors.items():
        value = tensor.detach().clone()
        finite = value.isfinite()
        if (value.is_floating_point() or value.is_complex()) and finite.any():
            scale = float(value.abs().mean()) if finite.all() else float(value[finite].abs().mean())
            noise = torch.randn(value.shape, generator=generator).mul_(0.1).to(value.device, value.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            if parameter:
                rows = max(value.shape, default=1)  # a vector counts as a matrix of one column
                fresh = (rows / value.numel()) ** 0.5
                scale = scale if scale > _TINY * fresh else fresh
            # A buffer of zeros, such as the means of a fresh BatchNorm, gets noise of both signs.
            if not parameter and not value.is_complex() and scale > 0 and bool((value >= 0).all()):
                value.mul_(noise.exp()).add_(noise.abs_(), alpha=scale)
            elif not value.is_complex() and bool((value > 0).all()):
                tiny = scale > 10 * float(value.max())
                # Gains stay gains: many larger ones in a row would blow up rounding.
                value.mul_(noise.exp()).add_(noise.abs_(), alpha=scale if tiny else 0.0)
            else:
                value.add_(noise, alpha=scale if scale > 0 else 1.0)  # a mask keeps its infinities
        noisy[name] = value
    return noisy


def _difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest finite value of its tensor; equal infinities do not differ."""
    differences = [0.0]
    for a, b in zip(outputs, expected, strict=True):
        if b.numel() > 0:
            a, b = (
                torch.view_as_real(leaf.to(torch.complex128)) if leaf.is_complex() else leaf.double() for leaf in (a, b)
            )
            scale = b.abs().masked_fill(b.isinf(), 0.0).max().clamp_min(1e-12)
            differences.append(float((a - b).masked_fill(a == b, 0.0).abs().max() / scale))
    return nan if any(map(isnan, differences)) else max(differences)
