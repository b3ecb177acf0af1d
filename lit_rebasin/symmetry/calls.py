"""Find the symmetries of whatever networks a function calls."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lit_rebasin.symmetry.spec import Axis, Group, PermutationSpec
from lit_rebasin.symmetry.tracing import permutation_spec


def spec_of_calls(root: nn.Module, run: Callable[[], Any]) -> PermutationSpec:
    """Find the symmetries of a module that is not called itself, but calls its parts.

    A LightningModule need have no forward: its training step calls a network, or several. Each outermost call of a part with weights is
    traced by itself, with its inputs and outputs fixed, so whatever happens between the calls stays as it is.

    Args:
        root: The module whose parts are called; names in the spec are those of its own parameters and buffers.
        run: Runs it once.

    Returns:
        The groups that every call agrees on; the rest is fixed.

    Raises:
        ValueError: If a part cannot be exported.
    """
    specs = [_trace_part(root, part, args, kwargs) for part, args, kwargs in _outermost_calls(root, run)]
    reasons: dict[str, str] = {}
    for spec in specs:
        reasons.update(spec.fixed)
    every = [group for spec in specs for group in spec.groups.values()]
    groups: dict[str, Group] = {}
    for group in every:
        clash = next((str(axis) for axis in group.axes if str(axis) in reasons), None)
        differs = any(other.axes != group.axes and set(other.axes) & set(group.axes) for other in every)
        if clash is None and not differs:
            groups[group.name] = group
        else:
            reason = reasons[clash] if clash else "two calls move it in different ways"
            reasons.update({str(axis): reason for axis in group.axes})
    called = {axis.split("[")[0] for axis in reasons} | {axis.tensor for g in groups.values() for axis in g.axes}
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if name not in called:
            reasons.update({f"{name}[{dim}]": "not used in the calls seen" for dim in range(tensor.ndim)})
    return PermutationSpec(groups, reasons)


def _outermost_calls(root: nn.Module, run: Callable[[], Any]) -> list[tuple[nn.Module, Any, Any]]:
    """Return each part with weights that is called from outside every other part, with the inputs of its first call."""
    depth = 0
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def enter(part: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        if depth == 0 and part not in calls:
            detach = lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf  # noqa: E731
            calls[part] = pytree.tree_map(detach, (args, kwargs))
        depth += 1

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = []
    for part in root.modules():
        if any(True for _ in part.parameters()) or any(True for _ in part.buffers()):
            handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [(part, *inputs) for part, inputs in calls.items()]


def _trace_part(root: nn.Module, part: nn.Module, args: Any, kwargs: Any) -> PermutationSpec:
    """Trace one part, and give its tensors the names that they have in the root."""
    spec = permutation_spec(part, *args, **kwargs)
    names: dict[int, list[str]] = {}
    for name, tensor in [
        *root.named_parameters(remove_duplicate=False),
        *root.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
    inside = [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]
    local = {name: names[id(tensor)] for name, tensor in inside}
    prefix = next(name for name, module in root.named_modules() if module is part)
    groups = {}
    for group in spec.groups.values():
        axes = {Axis(name, a.dim, a.before, a.after): None for a in group.axes for name in local[a.tensor]}
        full = f"{prefix}.{group.name}" if prefix else group.name
        groups[full] = Group(full, group.size, tuple(axes))
    fixed = {}
    for axis, reason in spec.fixed.items():
        owner, dim = axis[:-1].rsplit("[", 1)
        fixed.update({f"{name}[{dim}]": reason for name in local[owner]})
    return PermutationSpec(groups, fixed)
