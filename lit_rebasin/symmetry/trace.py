"""The walk over a graph that gives every dimension of every tensor its identity."""

import inspect
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lit_rebasin.symmetry.algebra import Algebra
from lit_rebasin.symmetry.factors import Atom, Dim, Dims, Factor, indices_of, reindex, resolve, size_of
from lit_rebasin.symmetry.registry import find_rule
from lit_rebasin.symmetry.writes import is_region, written_nodes

_CREATION = {
    f"aten::{name}"
    for name in ["zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"]
}
_KEEPS_VALUES = (
    "expand expand_as view reshape flatten unflatten unsqueeze squeeze select slice transpose permute repeat chunk split unbind "
    "clone contiguous to _to_copy detach alias lift_fresh_copy"
)
_UNIFORM_KEPT = {f"aten::{name}" for name in _KEEPS_VALUES.split()}


class Uniform(list[Dim]):
    """The dimensions of a tensor with one value everywhere: nothing changes under any permutation, so every reader gets fresh ones."""


class Trace:
    """What rules see of a walk: dimensions, and the means to tie and to hold them.

    Attributes:
        shape: Shape of the output of the operator at hand (a list of shapes if it has several).
        node: The operator's node in the exported graph.
        used: The dimensions of what each operator that is no view reads, and of what it makes.
    """

    def __init__(self, algebra: Algebra, weights: dict[str, Dims]) -> None:
        self.algebra = algebra
        self.weights = weights
        self.values: dict[Node, Any] = {}
        self.node: Node
        self.shape: Any = ()
        self.used: list[tuple[list[Dims], list[Dims]]] = []
        self._written: set[Node] = set()
        self._fresh = 0

    # What rules use

    def unify(self, first: Iterable[Factor], second: Iterable[Factor]) -> None:
        """Let two dimensions of one length move together."""
        self.algebra.unify(first, second)

    def fix(self, *dims: Dim, reason: str | None = None) -> None:
        """Let nothing along the dimensions move."""
        for dim in dims:
            self.algebra.fix(dim, reason or f"{_name_of(self.node)} tells positions apart")

    def fixed(self, *sizes: int) -> Dims:
        """Return new dimensions that cannot move."""
        return [self.algebra.fixed(size, f"made by {_name_of(self.node)}") for size in sizes]

    def free(self, *sizes: int) -> Dims:
        """Return new dimensions that can move on their own, such as those of a tensor that is constant along them."""
        self._fresh += 1
        return [(Atom(f"{self.node.name}:{self._fresh}.{k}", size),) for k, size in enumerate(sizes)]

    def broadcast(self, *operands: Dims) -> Dims:
        """Tie dimensions that broadcasting lays on one another, and return the result's."""
        rank = max(map(len, operands))
        result: Dims = [()] * rank
        for operand in operands:
            aligned = [*[()] * (rank - len(operand)), *operand]
            result, aligned = self.algebra.same_indices(result, aligned)
            for k, dim in enumerate(aligned):
                if size_of(result[k]) == 1:
                    result[k] = dim
                elif size_of(dim) != 1:
                    self.unify(result[k], dim)
        return result

    def split(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dims:
        """Divide the row-major product of some dimensions into others; where that is not possible they are fixed."""
        found = self.algebra.split([factor for dim in dims for factor in dim], sizes)
        if found is None:
            self.fix(*dims, reason=f"{_name_of(self.node)} divides it across its structure")
            return self.fixed(*sizes)
        return found

    def cut(self, dim: Dim, at: int) -> tuple[Dim, Dim]:
        """Return the first ``at`` entries of a dimension, and the rest."""
        return self.algebra.cut(dim, at)

    def mixed(self, x: Dims, *along: int) -> Dims:
        """Return the dimensions of ``x`` after its entries along some of them have been combined or moved.

        Permutations of the other dimensions then must not differ from entry to entry.
        """
        return self.algebra.tie(x, {dim % len(x) for dim in along}) if x else x

    def reach(self, *dims: Dim) -> None:
        """Say that the operator computes with some dimensions, even where it passes them on."""
        self.used.append(([list(dims)], []))

    def uses(self, output: int) -> bool:
        """Return whether the graph reads this one of the operator's outputs."""
        readers = (user for user in self.node.users if user.users)
        return any(reader.target is not operator.getitem or reader.args[1] == output for reader in readers)

    # The walk

    def walk(self, graph: GraphModule, inputs: Sequence[Any]) -> Any:
        """Follow a graph from the values of its placeholders, in order, to those of its outputs."""
        self._written |= written_nodes(graph)
        placeholders = iter(inputs)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(placeholders)
            elif node.op == "get_attr":
                self.values[node] = _attribute(graph, node.target)
            elif node.op == "output":
                return pytree.tree_map(self._read, node.args[0])
            else:
                self.node = node
                self.values[node] = self._call(node)
        raise AssertionError("a graph without an output")

    def _read(self, value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        found = self.values[value]
        if isinstance(found, Tensor):
            return [self.algebra.fixed(size, "data or a constant") for size in found.shape]
        return Uniform(self.free(*map(size_of, found))) if isinstance(found, Uniform) else found

    def _call(self, node: Node) -> Any:
        args, kwargs = pytree.tree_map(self._read, (node.args, node.kwargs))
        if node.target is operator.getitem:
            return args[0][args[1]]
        if is_region(node):
            body = next(k for k, value in enumerate(args) if isinstance(value, GraphModule))
            result = self.walk(args[body], args[body + 1 :])
            self.node = node
            return result
        value = node.meta.get("val")
        schema = getattr(node.target, "_schema", None)
        if value is None and schema is not None and not schema.is_mutable:  # an assertion
            return None
        self.shape = pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else None, value)
        if any(isinstance(size, torch.SymInt) for size in pytree.tree_leaves(self.shape)):
            raise ValueError(
                f"{_name_of(node)} in {_module_of(node)} gives an output whose shape depends on data, which cannot be traced. "
                "A spec can be written by hand with PermutationSpec.from_axes."
            )
        args, kwargs = self._apart((args, kwargs), set())
        result = self._apply(node, args, kwargs)
        if not getattr(node.target, "is_view", False):
            self.used.append((_tensors_in((args, kwargs)), _tensors_in(result)))
        if result is NotImplemented or not _fits(result, value):
            return self._fix_all((args, kwargs), value, f"{_name_of(node)} has no rule for this use")
        if isinstance(value, Tensor):
            closed = self.algebra.close(result)
            return Uniform(closed) if self._is_uniform(node, args, kwargs) else closed
        pieces = [self.algebra.close(dims) for dims in result]
        return [Uniform(dims) for dims in pieces] if self._is_uniform(node, args, kwargs) else pieces

    def _apart(self, value: Any, met: set[Atom]) -> Any:
        """Give every operand indices of its own: only broadcasting can tell which lie on one another."""
        if is_dims(value):
            for index in set().union(*(indices_of(resolve(dim)) for dim in value)):
                if index in met:
                    value = type(value)(reindex(value, index, Atom("", index.size, index.reason)))
            met |= set().union(*(indices_of(resolve(dim)) for dim in value))
            return value
        if isinstance(value, list | tuple):
            return [self._apart(part, met) for part in value]
        return {name: self._apart(part, met) for name, part in value.items()} if isinstance(value, dict) else value

    def _apply(self, node: Node, args: Any, kwargs: Any) -> Any:
        rule = find_rule(node.target)
        if rule is None:
            return NotImplemented
        try:
            inspect.signature(rule).bind(self, *args, **kwargs)
        except TypeError:  # a use of the operator that the rule does not know
            return NotImplemented
        try:
            return rule(self, *args, **kwargs)
        except Exception as error:  # whatever it has tied by then only holds more in place
            warnings.warn(
                f"The rule of {_name_of(node)} fails in {_module_of(node)} ({error!r}), so what the operator touches is fixed.",
                stacklevel=2,
            )
            return NotImplemented

    def _is_uniform(self, node: Node, args: Any, kwargs: Any) -> bool:
        name = _name_of(node)
        if node in self._written:
            return False
        if name in _CREATION:
            return True
        tensors = _tensors_in((args, kwargs))
        kept = name in _UNIFORM_KEPT or torch.Tag.pointwise in getattr(node.target, "tags", ())
        return kept and bool(tensors) and all(isinstance(dims, Uniform) for dims in tensors)

    def _fix_all(self, arguments: Any, value: Any, reason: str) -> Any:
        """Hold everything that an operator reads, and what it makes."""
        for dims in _tensors_in(arguments):
            self.fix(*dims, reason=reason)
        made = lambda leaf: [self.algebra.fixed(n, reason) for n in leaf.shape] if isinstance(leaf, Tensor) else leaf  # noqa: E731
        return pytree.tree_map(made, value)


def _tensors_in(values: Any) -> list[Dims]:
    """Return the lists of dimensions in nested arguments."""
    found: list[Dims] = []
    if isinstance(values, dict):
        values = list(values.values())
    if is_dims(values):
        found.append(values)
    elif isinstance(values, list | tuple):
        for value in values:
            found.extend(_tensors_in(value))
    return found


def is_dims(value: Any) -> bool:
    """Return whether a value is the list of a tensor's dimensions (an empty list: that of a scalar tensor)."""
    return isinstance(value, list) and all(isinstance(dim, tuple) and all(_is_factor(f) for f in dim) for dim in value)


def _is_factor(value: Any) -> bool:
    return isinstance(value, Factor)


def _fits(result: Any, value: Any) -> bool:
    """Return whether a rule gave every output tensor dimensions of the right length."""
    if isinstance(value, Tensor):
        return is_dims(result) and tuple(map(size_of, result)) == tuple(value.shape)
    if not isinstance(value, list | tuple) or not isinstance(result, list | tuple) or len(value) != len(result):
        return False
    return all(_fits(dims, leaf) for dims, leaf in zip(result, value, strict=True))


def _name_of(node: Node) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", str(node.target))


def _module_of(node: Node) -> str:
    """Return the path of the part of the network that called an operator."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return repr(paths[-1]) if paths and paths[-1] else "the network's own forward"


def _attribute(graph: GraphModule, target: Any) -> Any:
    found: Any = graph
    for part in str(target).split("."):
        found = getattr(found, part)
    return found
