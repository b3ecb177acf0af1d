"""What the dimensions of tensors are made of.

A dimension is a row-major product of factors. A factor is an `Atom`, a concatenation (`Sum`), or a `Family`: one of several dimensions, chosen
by the index along another dimension of the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias


@dataclass(eq=False)
class Atom:
    """A factor with no inner structure; ``reason`` says why it is fixed, ``value`` what it turned out to be."""

    name: str
    size: int
    reason: str | None = None
    value: Dim | None = None


@dataclass(frozen=True)
class Sum:
    """Dimensions laid one after another."""

    parts: tuple[Dim, ...]

    @property
    def size(self) -> int:
        """Return the length of the concatenation."""
        return sum(size_of(part) for part in self.parts)


@dataclass(frozen=True)
class Family:
    """``parts[k]`` where the tensor is indexed by ``k`` along the fixed atom ``index``: permutations may differ from part to part."""

    index: Atom
    parts: tuple[Dim, ...]

    @property
    def size(self) -> int:
        """Return the length that all parts have."""
        return size_of(self.parts[0])


Factor: TypeAlias = Atom | Sum | Family
Dim: TypeAlias = tuple[Factor, ...]
Dims: TypeAlias = list[Dim]


def size_of(factors: Iterable[Factor]) -> int:
    """Return the length of a dimension."""
    return prod(factor.size for factor in factors)


def resolve(dim: Iterable[Factor]) -> Dim:
    """Return a dimension in terms of what its atoms are known to be by now; factors of size one are left out."""
    found: list[Factor] = []
    for factor in dim:
        if isinstance(factor, Atom):
            if factor.value is not None:
                factor.value = resolve(factor.value)
                found.extend(factor.value)
            elif factor.size != 1:
                found.append(factor)
        else:
            found.extend(_resolve_parts(factor))
    return tuple(found)


def _resolve_parts(factor: Sum | Family) -> Dim:
    parts = [resolve(part) for part in factor.parts]
    if isinstance(factor, Family):
        same = all(part == parts[0] for part in parts)
        return parts[0] if same else (Family(factor.index, tuple(parts)),)
    flat: list[Dim] = []
    for part in parts:
        flat.extend(part[0].parts if len(part) == 1 and isinstance(part[0], Sum) else [part])
    flat = [part for part in flat if size_of(part)]
    return flat[0] if len(flat) == 1 else (Sum(tuple(flat)),)


def atoms_of(factors: Iterable[Factor]) -> Iterator[Atom]:
    """Yield the atoms of a resolved dimension, indices of families left out."""
    for factor in factors:
        if isinstance(factor, Atom):
            yield factor
        else:
            for part in factor.parts:
                yield from atoms_of(part)


def reason_of(dim: Iterable[Factor]) -> str | None:
    """Return why nothing along a dimension can move, or None if something can."""
    reason = "one entry long"
    for atom in atoms_of(resolve(dim)):
        if atom.reason is None:
            return None
        reason = atom.reason
    return reason


def select_part(dims: Iterable[Dim], index: Atom, k: int) -> Dims:
    """Return the dimensions of the slice at ``k`` along ``index``."""

    def chosen(dim: Dim) -> Dim:
        found: list[Factor] = []
        for factor in resolve(dim):
            if isinstance(factor, Family) and factor.index is index:
                found.extend(chosen(factor.parts[k]))
            elif isinstance(factor, Atom):
                found.append(factor)
            else:
                parts = tuple(chosen(part) for part in factor.parts)
                found.append(Sum(parts) if isinstance(factor, Sum) else Family(factor.index, parts))
        return tuple(found)

    return [chosen(dim) for dim in dims]


def reindex(dims: Iterable[Dim], old: Atom, new: Atom, entries: Sequence[int] | None = None) -> Dims:
    """Return the dimensions with families over ``old`` turned into families over ``new`` (its ``entries`` only, if given)."""

    def renamed(dim: Dim) -> Dim:
        found: list[Factor] = []
        for factor in resolve(dim):
            if isinstance(factor, Family) and factor.index is old:
                kept = [factor.parts[k] for k in entries] if entries is not None else factor.parts
                found.append(Family(new, tuple(renamed(part) for part in kept)))
            elif isinstance(factor, Atom):
                found.append(new if factor is old else factor)
            else:
                parts = tuple(renamed(part) for part in factor.parts)
                found.append(Sum(parts) if isinstance(factor, Sum) else Family(factor.index, parts))
        return tuple(found)

    return [renamed(dim) for dim in dims]


def indices_of(dim: Iterable[Factor]) -> set[Atom]:
    """Return the atoms that families in a dimension are indexed by."""
    found: set[Atom] = set()
    for factor in dim:
        if not isinstance(factor, Atom):
            found |= {factor.index} if isinstance(factor, Family) else set()
            for part in factor.parts:
                found |= indices_of(part)
    return found
