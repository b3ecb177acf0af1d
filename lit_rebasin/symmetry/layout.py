"""Where the atoms of a dimension lie along it, as `Axis` data."""

from collections.abc import Iterator
from dataclasses import replace

from lit_rebasin.symmetry.factors import Atom, Dim, Factor, indices_of, resolve, select_part, size_of
from lit_rebasin.symmetry.spec import Axis

# (stride, count) of a nested range; the one that belongs to the atom itself is marked
_Range = tuple[int, int, bool]


def axes_along(tensor: str, dim: int, factors: Dim) -> dict[Atom, list[Axis]]:
    """Return, for every movable atom of a dimension, the axes that it moves there."""
    found: dict[Atom, list[Axis]] = {}
    for atom, start, ranges in _occurrences(_strided(resolve(factors), 1)):
        if atom.reason is None:
            found.setdefault(atom, []).extend(_axes(tensor, dim, start, ranges))
    length = size_of(factors)
    return {
        atom: [_measured(axis, atom.size, length) for axis in _merged(axes, atom.size)] for atom, axes in found.items()
    }


def _strided(dim: Dim, unit: int) -> list[tuple[Factor, int]]:
    """Return the factors of a row-major product with their strides."""
    return [(factor, unit * size_of(dim[k + 1 :])) for k, factor in enumerate(dim)]


def _occurrences(factors: list[tuple[Factor, int]]) -> Iterator[tuple[Atom, int, list[_Range]]]:
    """Yield each atom of a product with the start and the nested ranges of its entries."""
    for k, (index, stride) in enumerate(factors):
        rest = factors[:k] + factors[k + 1 :]
        if isinstance(index, Atom) and index in indices_of([factor for factor, _ in rest]):
            for entry in range(index.size):
                chosen = [(select_part([(factor,)], index, entry)[0], own) for factor, own in rest]
                flat = [pair for dim, own in chosen for pair in _strided(dim, own)]
                for atom, start, ranges in _occurrences(flat):
                    yield atom, start + entry * stride, ranges
            return
    for k, (factor, stride) in enumerate(factors):
        others = [(own, other.size, False) for j, (other, own) in enumerate(factors) if j != k]
        if isinstance(factor, Atom):
            yield factor, 0, [*others, (stride, factor.size, True)]
        else:
            start = 0
            for part in factor.parts:
                for atom, offset, ranges in _occurrences(_strided(part, stride)):
                    yield atom, start * stride + offset, [*others, *ranges]
                start += size_of(part)


def _axes(tensor: str, dim: int, start: int, ranges: list[_Range]) -> list[Axis]:
    """Write nested ranges as ``start + step * (before, size, after)``, one axis for each pass of the ranges that do not fit into that form."""
    ranges = sorted((r for r in ranges if r[1] > 1), reverse=True)
    own = next(k for k, r in enumerate(ranges) if r[2])
    for k in range(len(ranges) - 1):
        outer, inner = ranges[k], ranges[k + 1]
        if outer[0] != inner[0] * inner[1]:  # a gap between these two: unroll the one that is not the atom's
            loose = ranges.pop(k + 1 if k == own else k)
            return [
                axis for entry in range(loose[1]) for axis in _axes(tensor, dim, start + entry * loose[0], list(ranges))
            ]
    before, after = 1, 1
    for k, (_, count, _) in enumerate(ranges):
        before *= count if k < own else 1
        after *= count if k > own else 1
    return [Axis(tensor, dim, before, after, start, ranges[-1][0])]


def _merged(axes: list[Axis], size: int) -> list[Axis]:
    """Join runs of axes that follow one another without a gap into one with a larger ``before``."""
    merged: list[Axis] = []
    for axis in sorted(axes, key=lambda axis: axis.start):
        last = merged[-1] if merged else None
        follows = last is not None and (last.after, last.step) == (axis.after, axis.step)
        if last is not None and follows and axis.start == last.start + last.step * last.before * size * last.after:
            merged[-1] = replace(last, before=last.before + axis.before)
        else:
            merged.append(axis)
    return merged


def _measured(axis: Axis, size: int, length: int) -> Axis:
    return axis if axis.before * size * axis.after == length else replace(axis, length=length)
