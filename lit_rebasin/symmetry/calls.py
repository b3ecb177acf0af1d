"""Find the symmetries of whatever networks a function calls."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils import _pytree as pytree

from lit_rebasin.symmetry.join import join
from lit_rebasin.symmetry.spec import UNREAD, Axis, Group, PermutationSpec, tensors_of
from lit_rebasin.symmetry.tracing import permutation_spec

# Calls of one part that are traced; more of them hardly ever differ.
_CALLS = 8
_SCRIPTED = "in a ScriptModule, which cannot be exported: use the module that it was made of"


def spec_of_calls(root: nn.Module, run: Callable[[], Any]) -> PermutationSpec:
    """Find the symmetries of a module that cannot be exported as a whole, but calls parts that can.

    Each outermost call of a part with weights is traced by itself, with its inputs and outputs fixed, so whatever happens between the calls
    stays as it is. Weights that are read between the calls are not seen: check the result.

    Args:
        root: The module whose parts are called; names in the spec are those of its own parameters and buffers.
        run: Runs it once.

    Returns:
        The groups that all calls agree on; the rest is fixed, as is all of a part that cannot be exported.
    """
    specs = [_trace_part(root, part, args, kwargs) for part, args, kwargs in _outermost_calls(root, run)]
    scripted = tuple(f"{name}." for name, part in root.named_modules() if isinstance(part, ScriptModule))
    unread = {
        f"{name}[{dim}]": _SCRIPTED if name.startswith(scripted) else UNREAD
        for name, tensor in tensors_of(root).items()
        for dim in range(tensor.ndim)
    }
    return join([PermutationSpec({}, unread), *specs])


def _outermost_calls(root: nn.Module, run: Callable[[], Any]) -> list[tuple[nn.Module, Any, Any]]:
    """Return the calls of parts with weights from outside every other part, with their inputs."""
    depth = 0
    calls: list[tuple[nn.Module, Any, Any]] = []

    def enter(part: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        if depth == 0 and sum(known is part for known, _, _ in calls) < _CALLS:
            detach = lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf  # noqa: E731
            calls.append((part, *pytree.tree_map(detach, (args, kwargs))))
        depth += 1

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = []
    for part in root.modules():
        if isinstance(part, ScriptModule):  # which takes no hooks
            continue
        if any(True for _ in part.parameters()) or any(True for _ in part.buffers()):
            handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _trace_part(root: nn.Module, part: nn.Module, args: Any, kwargs: Any) -> PermutationSpec:
    """Trace one call of a part, and give its tensors the names that they have in the root."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors_of(root).items():
        names.setdefault(id(tensor), []).append(name)
    local = {name: names[id(tensor)] for name, tensor in tensors_of(part).items()}
    try:
        spec = permutation_spec(part, *args, **kwargs)
    except ValueError as error:
        held = {f"{name}[{dim}]": str(error) for name, tensor in tensors_of(part).items() for dim in range(tensor.ndim)}
        spec = PermutationSpec({}, held)
    prefix = next(name for name, module in root.named_modules() if module is part)
    groups = {}
    for group in spec.groups.values():
        axes: dict[Axis, None] = {
            replace(axis, tensor=name): None for axis in group.axes for name in local[axis.tensor]
        }
        full = f"{prefix}.{group.name}" if prefix else group.name
        groups[full] = Group(full, group.size, tuple(axes))
    fixed = {}
    for axis, reason in spec.fixed.items():
        owner, dim = axis[:-1].rsplit("[", 1)
        fixed.update({f"{name}[{dim}]": reason for name in local[owner]})
    return PermutationSpec(groups, fixed)
