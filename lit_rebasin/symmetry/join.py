"""Symmetries that several traces of the same weights agree on."""

from collections.abc import Sequence
from itertools import chain, count

from lit_rebasin.symmetry.spec import UNREAD, Axis, Group, PermutationSpec


def join(specs: Sequence[PermutationSpec]) -> PermutationSpec:
    """Return the symmetries that hold in every one of several traces, which may read different parts of the same weights.

    A network with a head a task reads one head a trace: the trunk's group of the result moves the inputs of all heads.

    Args:
        specs: At least one; tensors that a trace does not read are in its ``fixed``, as unread.

    Returns:
        The joint spec. Groups that two traces move in different ways are fixed.
    """
    found = specs[0]
    for spec in specs[1:]:
        found = _both(found, spec)
    return found


def _both(first: PermutationSpec, second: PermutationSpec) -> PermutationSpec:
    common = _read(first) & _read(second)
    groups: dict[str, Group] = {}
    fixed: dict[str, str] = {}
    for spec, other in ((first, second), (second, first)):
        for group in spec.groups.values():
            shared = {axis for axis in group.axes if axis.tensor in common}
            partners = [
                g for g in other.groups.values() if shared and shared == {a for a in g.axes if a.tensor in common}
            ]
            if shared and not partners:
                fixed.update({str(axis): _reason(other, shared) for axis in group.axes})
                continue
            axes = dict.fromkeys([*group.axes, *(axis for partner in partners for axis in partner.axes)])
            if not any(set(axes) <= set(known.axes) for known in groups.values()):
                names = chain([group.name], (f"{group.name}#{k}" for k in count(2)))
                name = next(name for name in names if name not in groups)
                groups[name] = Group(name, group.size, tuple(axes))
    moved = {str(axis) for group in groups.values() for axis in group.axes}
    for axis in {**first.fixed, **second.fixed, **fixed}:
        if axis not in moved:
            reasons = [spec.fixed[axis] for spec in (first, second) if spec.fixed.get(axis, UNREAD) != UNREAD]
            fixed[axis] = reasons[0] if reasons else fixed.get(axis, UNREAD)
    return PermutationSpec(groups, {axis: reason for axis, reason in fixed.items() if axis not in moved})


def _read(spec: PermutationSpec) -> set[str]:
    """Return the tensors that a trace reads."""
    moved = {axis.tensor for group in spec.groups.values() for axis in group.axes}
    return moved | {axis.rpartition("[")[0] for axis, reason in spec.fixed.items() if reason != UNREAD}


def _reason(spec: PermutationSpec, axes: set[Axis]) -> str:
    """Return why another trace does not move a group in the same way."""
    reasons = sorted({spec.fixed[str(axis)] for axis in axes if str(axis) in spec.fixed})
    return reasons[0] if reasons else "two traces move it in different ways"
