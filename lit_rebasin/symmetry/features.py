"""Read what a network computes on data: the values that its permutation groups move, and the inputs of its layers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from lit_rebasin.symmetry.export import export
from lit_rebasin.symmetry.factors import Atom
from lit_rebasin.symmetry.layout import axes_along
from lit_rebasin.symmetry.permute import neurons
from lit_rebasin.symmetry.spec import Axis, PermutationSpec
from lit_rebasin.symmetry.trace import is_dims
from lit_rebasin.symmetry.tracing import follow

# Layers whose inputs are read, with the dimension of the channels.
_LAYERS = {
    "aten.linear.default": -1,
    **{f"aten.conv{n}d.{overload}": 1 for n in (1, 2, 3) for overload in ("default", "padding")},
}


@dataclass(frozen=True)
class Features:
    """What a network computes on one batch.

    Attributes:
        groups: By group name, one tensor ``(size, samples)`` for each value of the graph that stands for the group.
        layers: By the name of a weight, the inputs ``(samples, channels)`` of each use of that weight; linear layers and convolutions only.
    """

    groups: dict[str, list[Tensor]]
    layers: dict[str, list[Tensor]]


class FeatureReader:
    """Run networks of one architecture, and read their features.

    The graph of the network (`torch.export`, in evaluation mode) tells which of its values a group moves. A group is read where a layer takes
    it in, that is after the activation function; a group that no layer takes in directly, such as the features inside an attention head, where
    layers give it out.

    Args:
        model: A network of the architecture; it is left as it was.
        spec: Its symmetries.
    """

    def __init__(self, model: nn.Module, spec: PermutationSpec) -> None:
        self.model, self.spec = model, spec
        self._taps: dict[Any, _Taps] = {}

    def read(self, weights: Mapping[str, Tensor], inputs: tuple[Any, ...], averaged: Collection[str] = ()) -> Features:
        """Return the features of a network of the architecture on one batch of inputs.

        Args:
            weights: Its parameters and buffers by name.
            inputs: The arguments of its forward pass.
            averaged: Groups whose neurons are averaged over what else their dimension holds, as heads over the features inside them.

        Raises:
            ValueError: If the network cannot be exported with inputs of these shapes.
        """
        key = tuple(
            (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in pytree.tree_leaves(inputs)
        )
        if key not in self._taps:
            self._taps[key] = _Taps(export(self.model, inputs, {}, training=False), self.spec)
        return self._taps[key].read(weights, inputs, averaged)


class _Taps:
    """Where in one graph the features are."""

    def __init__(self, program: ExportedProgram, spec: PermutationSpec) -> None:
        self.program = program
        self.placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        self.weights = {
            node: one.target
            for node, one in zip(self.placeholders, program.graph_signature.input_specs, strict=True)
            if one.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        }
        data = self._data_nodes()
        takers = [node for node in data if node.op == "call_function" and self._reads_weights(node, data)]
        self.layers: dict[Node, str] = {}
        for node in takers:
            weight = node.args[1] if str(node.target) in _LAYERS else None
            if isinstance(weight, Node) and weight in self.weights:
                self.layers[node] = self.weights[weight]
        taken = dict.fromkeys(arg for node in takers for arg in node.all_input_nodes if arg in data)
        (values,) = follow([program])[2]
        at_inputs, at_outputs = (_axes_by_group(nodes, values, self.weights, spec) for nodes in (taken, takers))
        self.groups = {name: at_inputs.get(name) or at_outputs.get(name, []) for name in spec.groups}
        self.sizes = {name: group.size for name, group in spec.groups.items()}

    def read(self, weights: Mapping[str, Tensor], inputs: tuple[Any, ...], averaged: Collection[str]) -> Features:
        """Run the graph with the weights of a network."""
        leaves = iter(pytree.tree_leaves(inputs))
        values = []
        for one in self.program.graph_signature.input_specs:
            if one.kind is InputKind.USER_INPUT:
                values.append(next(leaves))
            else:
                values.append(weights[one.target] if one.target in weights else self.program.constants[one.target])
        wanted = {node for axes in self.groups.values() for node, _ in axes}
        wanted |= {node.args[0] for node in self.layers if isinstance(node.args[0], Node)}
        seen = _Watcher(self.program.graph_module, wanted)
        with torch.no_grad():
            seen.run(*values)
        groups: dict[str, list[Tensor]] = {}
        for name, axes in self.groups.items():
            values = [(neurons(seen.values[node], axis, self.sizes[name]), axis.dim) for node, axis in axes]
            # What comes before and after a neuron along its dimension are the two dimensions from there on.
            groups[name] = [
                (value.float().mean((dim + 1, dim + 2)) if name in averaged else value).flatten(1)
                for value, dim in values
            ]
        layers: dict[str, list[Tensor]] = {}
        for node, weight in self.layers.items():
            (x,) = (value for arg, value in seen.values.items() if arg is node.args[0])
            layers.setdefault(weight, []).append(x.movedim(_LAYERS[str(node.target)], -1).flatten(0, -2))
        return Features(groups, layers)

    def _data_nodes(self) -> dict[Node, None]:
        """Return the nodes whose values depend on the inputs, in order."""
        kinds = [one.kind for one in self.program.graph_signature.input_specs]
        found = dict.fromkeys(
            node for node, kind in zip(self.placeholders, kinds, strict=True) if kind is InputKind.USER_INPUT
        )
        for node in self.program.graph.nodes:
            if any(arg in found for arg in node.all_input_nodes) and node.op != "output":
                found[node] = None
        return found

    def _reads_weights(self, node: Node, data: Mapping[Node, None]) -> bool:
        """Return whether a node computes with a matrix, or more, of weights."""
        others = [arg.meta.get("val") for arg in node.all_input_nodes if arg not in data]
        return any(isinstance(value, Tensor) and value.ndim > 1 for value in others)


def _axes_by_group(
    nodes: Mapping[Node, None] | list[Node],
    values: Mapping[Node, Any],
    weights: Mapping[Node, str],
    spec: PermutationSpec,
) -> dict[str, list[tuple[Node, Axis]]]:
    """Return where the groups of a spec lie in the values of some nodes."""
    owners = {axis: name for name, group in spec.groups.items() for axis in group.axes}
    atoms: dict[Atom, str] = {}
    for node, name in weights.items():
        for dim, factors in enumerate(values[node] if is_dims(values[node]) else []):
            for atom, axes in axes_along(name, dim, factors).items():
                for axis in axes:
                    if axis in owners:
                        atoms[atom] = owners[axis]
    found: dict[str, list[tuple[Node, Axis]]] = {}
    for node in nodes:
        for dim, factors in enumerate(values[node] if is_dims(values[node]) else []):
            for atom, axes in axes_along(node.name, dim, factors).items():
                if atom in atoms:
                    found.setdefault(atoms[atom], []).extend((node, axis) for axis in axes)
    return found


class _Watcher(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, graph: torch.fx.GraphModule, wanted: set[Node]) -> None:
        super().__init__(graph)
        self.wanted, self.values = wanted, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            # A later node may write to it in place.
            self.values[n] = result.clone()
        return result
