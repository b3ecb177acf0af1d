"""Find the permutation symmetries of a module by following its exported graph.

Covers what a chain of Linear, convolution and BatchNorm layers is made of, with element-wise functions, pooling and flattening between them.
Whatever has no rule here makes the axes that it touches fixed, with its name as the reason: an axis is never guessed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from lit_rebasin.symmetry.invariance import check_invariance
from lit_rebasin.symmetry.spec import Axis, Group, PermutationSpec


@dataclass
class _Draft:
    """A group while it is found; ``reason`` says why it cannot move, once something says so."""

    name: str
    size: int
    axes: list[Axis]
    reason: str | None = None


@dataclass(frozen=True)
class _Channels:
    """Where the neurons of a group lie in an activation: along ``dim``, each taking ``after`` neighbouring entries."""

    group: _Draft
    dim: int
    after: int = 1


class _Trace:
    """The walk over a graph: who owns which axis of the weights and of the activations."""

    def __init__(self, weights: dict[Node, str]) -> None:
        self.weights = weights
        self.drafts: list[_Draft] = []
        self.channels: dict[Node, _Channels] = {}
        self.owners: dict[tuple[str, int], _Draft] = {}
        self.fixed: dict[str, str] = {}

    def claim(self, axis: Axis, group: _Draft) -> None:
        """Let a group own an axis of a weight; two groups that claim the same one cannot move."""
        owner = self.owners.get((axis.tensor, axis.dim))
        if str(axis) in self.fixed:
            group.reason = self.fixed[str(axis)]
        if owner is None:
            self.owners[axis.tensor, axis.dim] = group
            group.axes.append(axis)
        elif owner is not group or axis not in group.axes:
            for draft in (owner, group):
                draft.reason = f"{axis} would belong to two groups"

    def produce(self, node: Node, weight: str, size: int, *, dim: int) -> _Draft:
        """Make (or, for a layer used twice, find) the group of a layer's outputs."""
        group = self.owners.get((weight, 0))
        if group is None:
            group = _Draft(weight.removesuffix(".weight"), size, [])
            self.drafts.append(group)
        self.claim(Axis(weight, 0), group)
        self.channels[node] = _Channels(group, dim)
        return group

    def consume(self, value: Any, weight: str, *, dim: int) -> None:
        """Let a layer's input axis follow the group that its input carries along ``dim``, if any."""
        source = self.channels.get(value)
        if source is None:
            self.fix_axis(f"{weight}[1]", "reads the network's input, or what no rule follows")
        elif source.dim != dim:
            source.group.reason = f"{weight!r} reads along another dimension than its neurons lie"
        else:
            self.claim(Axis(weight, 1, 1, source.after), source.group)

    def fix_axis(self, axis: str, reason: str) -> None:
        """Say why an axis cannot move; a group that owns it cannot either."""
        tensor, dim = axis[:-1].rsplit("[", 1)
        owner = self.owners.get((tensor, int(dim)))
        if owner is not None:
            owner.reason = reason
        self.fixed[axis] = reason

    def fix(self, node: Node, reason: str) -> None:
        """Fix everything that flows into a node which no rule follows."""
        for source in node.all_input_nodes:
            if source in self.channels:
                self.channels[source].group.reason = reason
            if source in self.weights:
                for dim in range(len(_shape_of(source))):
                    self.fix_axis(f"{self.weights[source]}[{dim}]", reason)


def _shape_of(node: Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _argument(node: Node, index: int, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else default


def _linear(trace: _Trace, node: Node) -> bool:
    x, weight, bias = node.args[0], node.args[1], _argument(node, 2)
    return _layer(trace, node, x, weight, bias, dim=len(_shape_of(node)) - 1)


def _convolution(trace: _Trace, node: Node) -> bool:
    x, weight, bias = node.args[0], node.args[1], _argument(node, 2)
    batched = len(_shape_of(node)) == len(_shape_of(weight))  # type: ignore[arg-type]
    if not batched or _argument(node, 6, 1) != 1:
        return False
    return _layer(trace, node, x, weight, bias, dim=1)


def _layer(trace: _Trace, node: Node, x: Any, weight: Any, bias: Any, *, dim: int) -> bool:
    """Link a layer's weight ``(out, in, ...)`` and bias ``(out,)`` to its input's group and to one of its outputs."""
    if node.kwargs or weight not in trace.weights or (bias is not None and bias not in trace.weights):
        return False
    name = trace.weights[weight]
    trace.consume(x, name, dim=dim)
    group = trace.produce(node, name, _shape_of(weight)[0], dim=dim)
    if bias is not None:
        trace.claim(Axis(trace.weights[bias], 0), group)
    for kernel in range(2, len(_shape_of(weight))):
        trace.fix_axis(f"{name}[{kernel}]", "a position in the kernel")
    return True


def _batch_norm(trace: _Trace, node: Node) -> bool:
    vectors = [argument for argument in node.args[1:5] if isinstance(argument, Node)]
    source = trace.channels.get(node.args[0])  # type: ignore[arg-type]
    if source is None or source.dim != 1 or source.after != 1 or any(vector not in trace.weights for vector in vectors):
        return False
    for vector in vectors:
        trace.claim(Axis(trace.weights[vector], 0), source.group)
    trace.channels[node] = source
    return True


def _elementwise(trace: _Trace, node: Node) -> bool:
    """Pass the neurons on, unless the function mixes two tensors or uses a weight of its own."""
    inputs = node.all_input_nodes
    if len(inputs) != 1 or inputs[0] in trace.weights:
        return False
    if inputs[0] in trace.channels:
        trace.channels[node] = trace.channels[inputs[0]]
    return True


def _ignore(trace: _Trace, node: Node) -> bool:
    """Pass over a node that only asserts something."""
    return True


def _pool(trace: _Trace, node: Node) -> bool:
    """Pass channels on through a function of the dimensions behind them."""
    source = trace.channels.get(node.args[0])  # type: ignore[arg-type]
    if source is not None and (source.dim != 1 or source.after != 1 or len(_shape_of(node)) < 3):
        return False
    return _elementwise(trace, node)


def _reshape(trace: _Trace, node: Node) -> bool:
    """Follow neurons into a dimension that merges them with all that lies behind them."""
    source = trace.channels.get(node.args[0])  # type: ignore[arg-type]
    if source is None:
        return True
    before, after = _shape_of(node.args[0]), _shape_of(node)  # type: ignore[arg-type]
    dim = source.dim
    if before == after:
        trace.channels[node] = source
    elif len(after) == dim + 1 and before[:dim] == after[:dim]:
        trace.channels[node] = _Channels(source.group, dim, source.after * prod(before[dim + 1 :]))
    else:
        return False
    return True


_ELEMENTWISE = (
    "relu relu_ relu6 gelu silu silu_ sigmoid tanh elu elu_ leaky_relu leaky_relu_ softplus hardtanh hardtanh_ hardswish hardswish_ "
    "hardsigmoid mish selu selu_ celu dropout dropout_ clone contiguous detach alias abs exp sin cos square neg"
)
_POOLS = "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"

_Rule = Callable[[_Trace, Node], bool]
_RULES: dict[str, _Rule] = {
    "aten::linear": _linear,
    **{f"aten::conv{d}d": _convolution for d in (1, 2, 3)},
    "aten::batch_norm": _batch_norm,
    **{
        f"aten::{name}": rule
        for names, rule in ((_ELEMENTWISE, _elementwise), (_POOLS, _pool))
        for name in names.split()
    },
    **{f"aten::{name}": _elementwise for name in ("add", "sub", "mul", "div", "to", "_to_copy")},
    "aten::_assert_tensor_metadata": _ignore,
    **{f"aten::{name}": _reshape for name in ("flatten", "view", "reshape", "_unsafe_view")},
}


def permutation_spec(model: nn.Module, *example_inputs: Any, **example_kwargs: Any) -> PermutationSpec:
    """Find which axes of which weights of a module may be permuted together.

    The module is exported with `torch.export` in evaluation mode and left as it was. The result is checked with random permutations before
    it is returned.

    Args:
        model: Any module whose forward has no branch that depends on data.
        *example_inputs: Inputs of one forward pass.
        **example_kwargs: Keyword inputs of the same.

    Returns:
        The spec. Parts of the network that no rule follows are in ``spec.fixed``, with the reason.

    Raises:
        ValueError: If the module cannot be exported.
        RuntimeError: If the check fails, which is a fault of this library.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        program = torch.export.export(model, example_inputs, example_kwargs, strict=False)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be exported with torch.export, so its permutation groups cannot be found: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    signature = program.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = list(program.graph.nodes)
    trace = _Trace({node: lifted[node.name] for node in nodes if node.op == "placeholder" and node.name in lifted})
    for node in nodes:
        _visit(trace, node)
    spec = _finish(trace, model)
    check_invariance(model, spec, *example_inputs, **example_kwargs)
    return spec


def _visit(trace: _Trace, node: Node) -> None:
    if node.op == "output":
        trace.fix(node, "the network's output")
    elif node.op == "call_function":
        name = getattr(getattr(node.target, "_schema", None), "name", str(node.target))
        rule = _RULES.get(name)
        if rule is None or not rule(trace, node):
            trace.fix(node, f"{name} has no rule for this use")


def _finish(trace: _Trace, model: nn.Module) -> PermutationSpec:
    """Turn drafts into groups, and account for every axis that is in none."""
    aliases = _aliases(model)
    groups: dict[str, Group] = {}
    moving: set[str] = set()
    for draft in trace.drafts:
        if draft.reason is None and draft.size > 1:
            axes = [Axis(name, a.dim, a.before, a.after) for a in draft.axes for name in aliases[a.tensor]]
            groups[draft.name] = Group(draft.name, draft.size, tuple(axes))
            moving.update(map(str, axes))
        else:
            reason = draft.reason or "a single neuron"
            trace.fixed.update({str(axis): reason for axis in draft.axes})
    fixed = {}
    for tensor, names in aliases.items():
        for dim in range(_tensors(model)[tensor].ndim):
            if f"{tensor}[{dim}]" not in moving:
                reason = trace.fixed.get(f"{tensor}[{dim}]", "not used in the forward pass")
                fixed.update({f"{name}[{dim}]": reason for name in names})
    return PermutationSpec(groups, fixed)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each tensor's first name, all names that it goes by (tied weights have several)."""
    names: dict[int, list[str]] = {}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        names.setdefault(id(tensor), []).append(name)
    return {found[0]: found for found in names.values()}
