"""Which tensors of a graph are written to in place."""

from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree


def is_region(node: Node) -> bool:
    """Return whether a node runs a graph of its own, such as the body of a ``with torch.no_grad()``."""
    return str(node.target).startswith("wrap_with_")


def written_nodes(graph: GraphModule) -> set[Node]:
    """Return the nodes that something later writes to in place, directly, through a view or in a region of its own."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        for value in _written_arguments(graph, node):
            _mark(value, found)
    return found


def _written_arguments(graph: GraphModule, node: Node) -> Iterator[Node]:
    if is_region(node):
        bodies = [(k, _attribute(graph, arg)) for k, arg in enumerate(node.args)]
        place, body = next((k, value) for k, value in bodies if isinstance(value, GraphModule))
        written = written_nodes(body)
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        yield from (
            outer  # type: ignore[misc]
            for inner, outer in zip(inputs, node.args[place + 1 :], strict=True)
            if inner in written
        )
    schema = getattr(node.target, "_schema", None)
    for k, argument in enumerate(schema.arguments if schema is not None else []):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Node))


def _mark(node: Node, found: set[Node]) -> None:
    """Note a node and all that it may be a view of."""
    if node not in found:
        found.add(node)
        sources = node.args if node.op == "call_function" and is_region(node) else node.args[:1]
        for source in sources:
            if isinstance(source, Node):
                _mark(source, found)


def _attribute(graph: GraphModule, value: Any) -> Any:
    named = isinstance(value, Node) and value.op == "get_attr"
    return getattr(graph, str(value.target), None) if named else None
