"""The residual branches of a network, on its exported graph."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lit_rebasin.symmetry.export import export

LAYERS = (nn.Linear, _ConvNd)
NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

# Behind these no layer sets the size of what comes out: gates, and normalizations without weights.
_ENDS_SCALES = {f"aten::{name}" for name in ["sigmoid", "hardsigmoid", "softmax", "_softmax"]}
_ENDS_SCALES |= {f"aten::{name}_norm" for name in ["batch", "layer", "group", "instance", "rms"]}


@dataclass(frozen=True)
class Layout:
    """The layers of a network in order of use, and its residual branches.

    Attributes:
        names: Names of the linear and convolution layers, and of the normalizations among ``ends``, in the order of first use.
        ends: Names of the layers that set the size of the branches' outputs: the last linear or convolution layer of each, or the
            normalization that follows it.
        branches: Number of residual branches.
    """

    names: tuple[str, ...]
    ends: frozenset[str]
    branches: int


def layout(model: nn.Module, args: tuple[Any, ...]) -> Layout:
    """Find the layers and the residual branches of a network.

    A residual branch ends in an addition of two tensors of which one was made from the other, with a linear or convolution layer on the way. A
    block whose shortcut has a layer of its own, as where a ResNet changes its width, has no stream that passes through and is not counted.

    Args:
        model: The network, which is left as it was.
        args: Example inputs.

    Raises:
        ValueError: If ``torch.export`` cannot follow the network.
    """
    try:
        program = export(model, args, {}, training=False)
    except ValueError as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"The residual branches of {type(model).__name__} are found on its graph, and torch.export cannot make it: "
            f"{str(cause).strip().splitlines()[0]}"
        ) from error
    owners = _owners(model)
    parameters = program.graph_signature.inputs_to_parameters
    tensors = dict(model.named_parameters(remove_duplicate=False))
    weighted: dict[Node, tuple[str, nn.Module]] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            owner = owners.get(id(tensors.get(parameters.get(source.name, ""))))
            if owner is not None and _kind(node) != "aten::embedding":  # which may share the weight of a layer
                weighted[node] = owner
    found = [one for node in program.graph.nodes if (one := _branch_ends(node, weighted)) is not None]
    ends: frozenset[str] = frozenset().union(*found)
    names = dict.fromkeys(name for name, part in weighted.values() if isinstance(part, LAYERS) or name in ends)
    return Layout(tuple(names), ends, len(found))


def _owners(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Return, by identity of a weight, the layer or normalization that it belongs to."""
    return {
        id(part.weight): (name, part)
        for name, part in model.named_modules()
        if isinstance(part, (*LAYERS, *NORMS)) and isinstance(part._parameters.get("weight"), nn.Parameter)
    }


def _branch_ends(node: Node, weighted: dict[Node, tuple[str, nn.Module]]) -> frozenset[str] | None:
    """Return the layers whose scale is that of the branch which this node adds to a stream; None if it is no such addition."""
    terms = node.args[:2]
    if _kind(node) not in ("aten::add", "aten::add_") or not all(isinstance(term, Node) for term in terms):
        return None
    for stream, branch in (terms, terms[::-1]):
        inside = _between(stream, branch)
        if any(isinstance(weighted[one][1], LAYERS) for one in inside if one in weighted):
            return frozenset(_last_weighted(branch, inside, weighted))
    return None


def _between(start: Any, end: Any) -> set[Node]:
    """Return the nodes that lie after ``start`` and lead from it to ``end``, with ``end``."""
    before = {end, *_closure(end, lambda one: one.all_input_nodes)}
    return before.intersection(_closure(start, lambda one: one.users))


def _closure(start: Node, neighbours: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """Yield the nodes that can be reached from a node, without it."""
    seen, waiting = {start}, [start]
    while waiting:
        for node in neighbours(waiting.pop()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
                yield node


def _last_weighted(branch: Any, inside: set[Node], weighted: dict[Node, tuple[str, nn.Module]]) -> Iterator[str]:
    """Yield the names of the layers that are met first on the way back from the end of a branch."""
    seen, waiting = {branch}, [branch]
    while waiting:
        node = waiting.pop()
        if node in weighted:
            yield weighted[node][0]
        elif _kind(node) not in _ENDS_SCALES:
            fresh = [one for one in node.all_input_nodes if one in inside and one not in seen]
            seen.update(fresh)
            waiting.extend(fresh)


def _kind(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""
