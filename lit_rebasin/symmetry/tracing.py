"""Find the permutation symmetries of a module by following its exported graph."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from lit_rebasin.symmetry import rules  # noqa: F401  registers the rules
from lit_rebasin.symmetry.algebra import Algebra
from lit_rebasin.symmetry.export import export
from lit_rebasin.symmetry.factors import Atom, Dims, atoms_of, reason_of, resolve
from lit_rebasin.symmetry.invariance import check_graph, check_invariance
from lit_rebasin.symmetry.layout import axes_along
from lit_rebasin.symmetry.spec import UNREAD, Axis, Group, PermutationSpec
from lit_rebasin.symmetry.trace import Trace, is_dims

# Passes over a graph: each may find packed projections inside those that the one before took apart.
_PASSES = 5
_EMPTY = "its tensor is empty"


def permutation_spec(
    model: nn.Module, *example_inputs: Any, check: bool = True, **example_kwargs: Any
) -> PermutationSpec:
    """Find which axes of which weights of a module may be permuted together.

    The module is exported with `torch.export` in evaluation mode (and in training mode as well, where some of its weights, such as those of
    auxiliary heads, are used in that mode only), and left as it was. Every dimension of every tensor of the graph gets an identity, one rule
    per operator ties or fixes identities, and what an operator without a rule touches is fixed. The trace copies no weights; the check holds
    two more copies of them while it runs.

    Args:
        model: Any module whose forward has no branch that depends on data.
        *example_inputs: Inputs of one forward pass, with at least two entries along every dimension that may be longer; the spec holds for the
            sizes and the branches that they stand for.
        check: Whether to permute every group at random and compare outputs (`check_invariance`) before the spec is returned.
        **example_kwargs: Keyword inputs of the same.

    Returns:
        The spec. Axes that cannot move are in ``spec.fixed``, with the reason.

    Raises:
        ValueError: If the module cannot be exported, has shapes that depend on data, or cannot be checked (`check_invariance`).
        RuntimeError: If the check fails, which is a fault of a rule; the sentence names the groups and their axes.
    """
    programs = [export(model, example_inputs, example_kwargs, training=False)]
    if _unread(programs[0]):
        with suppress(ValueError):  # then what only training reads stays fixed
            programs.append(export(model, example_inputs, example_kwargs, training=True))
    weights, read, _ = follow(programs)
    spec = _spec(model, weights, read)
    if check:
        check_invariance(model, spec, *example_inputs, **example_kwargs)
        for program in programs[1:]:
            check_graph(model, spec, program.module(), example_inputs, example_kwargs)
    return spec


def _unread(program: ExportedProgram) -> bool:
    """Return whether the graph leaves a parameter unread."""
    names = program.graph_signature.inputs_to_parameters
    return any(node.op == "placeholder" and node.name in names and not node.users for node in program.graph.nodes)


def follow(programs: list[ExportedProgram]) -> tuple[dict[str, Dims], set[str], list[dict[Node, Any]]]:
    """Walk graphs with the same weights until nothing new is found in them.

    Returns:
        The weights' dimensions, the names of those that are read, and for each graph the dimensions of the values of its nodes.
    """
    enumerated: set[tuple[str, int, str]] = set()
    for _ in range(_PASSES):
        algebra = Algebra(enumerated)
        result = _walk(programs, algebra)
        found = algebra.new_indices()
        if not found:
            break
        enumerated = enumerated | found
    return result


def _walk(programs: list[ExportedProgram], algebra: Algebra) -> tuple[dict[str, Dims], set[str], list[dict[Node, Any]]]:
    """Walk all graphs once."""
    weights: dict[str, Dims] = {}
    read: set[str] = set()
    values: list[dict[Node, Any]] = []
    used: list[tuple[list[Dims], list[Dims]]] = []
    for program in programs:
        trace = Trace(algebra, weights)
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        nodes = [placeholders[spec.arg.name] for spec in program.graph_signature.input_specs]
        specs = list(zip(program.graph_signature.input_specs, nodes, strict=True))
        read.update(spec.target for spec, node in specs if spec.target is not None and node.users)
        outputs = trace.walk(
            program.graph_module, [_input(trace, program, spec, node.meta.get("val")) for spec, node in specs]
        )
        used += trace.used
        values.append(trace.values)
        for spec, dims in zip(program.graph_signature.output_specs, outputs, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT and is_dims(dims):
                for dim in dims:
                    algebra.fix(dim, "the network's output")
    _fix_unreached(weights, used)
    return weights, read, values


def _fix_unreached(weights: dict[str, Dims], used: list[tuple[list[Dims], list[Dims]]]) -> None:
    """Fix entries that nothing computes with, such as the positions beyond the example's length: another input may reach them.

    What an operator reads and does not pass on, such as the dimension that it sums over, is reached; what it passes on may be cut off later.
    """
    reached: set[Atom] = set()
    for read, made in used:
        reached |= _atoms(read) - _atoms(made)
    for atom in _atoms(weights.values()) - reached:
        atom.reason = atom.reason or "entries that the example input does not reach"


def _atoms(tensors: Iterable[Dims]) -> set[Atom]:
    return {atom for dims in tensors for dim in dims for atom in atoms_of(resolve(dim))}


def _input(trace: Trace, program: ExportedProgram, spec: Any, value: Any) -> Any:
    """Return what a placeholder of the graph stands for."""
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.persistent is not False:
        if spec.target not in trace.weights:
            sizes = value.shape
            trace.weights[spec.target] = [
                (Atom(f"{spec.target}[{dim}]", size),) if size else trace.algebra.fixed(0, _EMPTY)
                for dim, size in enumerate(sizes)
            ]
        return trace.weights[spec.target]
    if spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        held = program.constants.get(spec.target)
        if isinstance(held, Tensor):
            return held
        reason = "a buffer that is not in the state dict"
    else:
        reason = "the network's input"
    return [trace.algebra.fixed(size, reason) for size in value.shape] if isinstance(value, Tensor) else value


def _spec(model: nn.Module, weights: dict[str, Dims], read: set[str]) -> PermutationSpec:
    """Collect the axes of every atom that can move, and account for every other axis."""
    axes: dict[Atom, list[Axis]] = {}
    fixed: dict[str, str] = {}
    for tensor, names in _aliases(model).items():
        known = next((name for name in names if name in weights and name in read), None)
        held = _tensor(model, tensor)
        for dim in range(held.ndim):
            moved = axes_along(tensor, dim, weights[known][dim]) if known and held.numel() else {}
            for atom, found in moved.items():
                axes.setdefault(atom, []).extend(replace(axis, tensor=name) for axis in found for name in names)
            if not moved:
                reason = (reason_of(weights[known][dim]) if held.numel() else _EMPTY) if known else UNREAD
                fixed.update({f"{name}[{dim}]": reason or "" for name in names})
    groups: dict[str, Group] = {}
    for atom, found in axes.items():
        name = _name(found, groups)
        groups[name] = Group(name, atom.size, tuple(found))
    return PermutationSpec(groups, fixed)


def _name(axes: list[Axis], taken: dict[str, Group]) -> str:
    """Name a group after the layer whose outputs it moves."""
    first = next((axis for axis in axes if axis.dim == 0), axes[0])
    name = first.tensor.removesuffix(".weight")
    if name not in taken:
        return name
    return next(f"{name}#{k}" for k in range(2, len(taken) + 3) if f"{name}#{k}" not in taken)


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), attribute)
    return found


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each tensor's first name, all names that it goes by (tied weights have several)."""
    names: dict[int, list[str]] = {}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        names.setdefault(id(tensor), []).append(name)
    return {found[0]: found for found in names.values()}
