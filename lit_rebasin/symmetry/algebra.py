"""The algebra of axis identities: which parts of dimensions are one and the same.

Atoms are joined by binding one to what it turned out to be (union-find), taken apart by `Algebra.split` (``view``) and `Algebra.cut`
(``chunk``), and fixed with a reason. Every step only ever shrinks the set of permutations that the identities allow: a step too many costs
symmetries, never correctness. What rules have to see to is that a dimension that they return is the one that they read, entry by entry
(else `Trace.mixed`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lit_rebasin.symmetry.factors import (
    Atom,
    Dim,
    Dims,
    Factor,
    Family,
    Sum,
    atoms_of,
    indices_of,
    reason_of,
    reindex,
    resolve,
    select_part,
    size_of,
)

# Splits into more parts than this are never tracked part by part: packed projections have 2 to 6 parts.
_LARGEST_INDEX = 16


def _plain(dim: Dim) -> Iterator[Atom]:
    """Yield the atoms that stand for the whole of a position along a dimension: none of those inside a concatenation."""
    for factor in dim:
        if isinstance(factor, Atom):
            yield factor
        elif isinstance(factor, Family):
            yield from dict.fromkeys(atom for part in factor.parts for atom in _plain(part))


@dataclass
class Algebra:
    """Joins, splits, cuts and fixes dimensions.

    Attributes:
        enumerated: Splits ``(atom's name, outer size, "outer" or "inner")`` whose named side is a fixed index, as an earlier pass over the
            same graph found; each entry of it then has a permutation of its own.
        splits: The splits made in this pass, with the two atoms they made.
    """

    enumerated: set[tuple[str, int, str]] = field(default_factory=set)
    splits: list[tuple[str, int, Atom, Atom]] = field(default_factory=list)

    length = staticmethod(size_of)

    def fix(self, dim: Iterable[Factor], reason: str) -> None:
        """Let nothing along a dimension move."""
        for atom in atoms_of(resolve(dim)):
            atom.reason = atom.reason or reason

    def fixed(self, size: int, reason: str) -> Dim:
        """Return a new dimension that cannot move."""
        return (Atom("", size, reason),)

    def new_indices(self) -> set[tuple[str, int, str]]:
        """Return the splits of this pass one side of which turned out to be a fixed index."""
        found = set()
        for name, outer, front, back in self.splits:
            stuck = reason_of((front,)) is not None, reason_of((back,)) is not None
            if stuck == (True, False) and outer <= _LARGEST_INDEX:
                found.add((name, outer, "outer"))
            elif stuck == (False, True) and back.size <= _LARGEST_INDEX:
                found.add((name, outer, "inner"))
        return found - self.enumerated

    def unify(self, first: Iterable[Factor], second: Iterable[Factor]) -> None:
        """Make two dimensions of one length the same; where their structures cannot be reconciled, both are fixed."""
        x, y = resolve(first), resolve(second)
        if x == y:
            return None
        if size_of(x) != size_of(y):
            raise ValueError(f"dimensions of {size_of(x)} and {size_of(y)} cannot be the same")
        for one, other in ((x, y), (y, x)):
            if len(one) == 1 and isinstance(one[0], Atom) and one[0].reason is None:
                return self._bind(one[0], other)
        for one, other in ((x, y), (y, x)):
            reason = reason_of(one)
            if reason is not None:
                return self.fix(other, reason)
        for one, other in ((x, y), (y, x)):
            if len(one) == 1 and isinstance(one[0], Sum):
                return self._unify_sum(one[0], other)
        if len(x) == len(y) == 1:
            return self._unify_families(x[0], y[0])
        return self._unify_products(x, y)

    def _bind(self, atom: Atom, dim: Dim) -> None:
        dim = self.close([dim])[0]
        if atom in set(atoms_of(dim)):  # only a family over the atom itself can hold it, and closing has tied that
            if dim != (atom,):
                self.fix(dim, "an axis that would contain itself")
        else:
            atom.value = dim

    def _unify_sum(self, total: Sum, other: Dim) -> None:
        for part in total.parts[:-1]:
            head, other = self.cut(other, size_of(part))
            self.unify(part, head)
        self.unify(total.parts[-1], other)

    def _unify_families(self, x: Factor, y: Factor) -> None:
        if isinstance(x, Family) and isinstance(y, Family) and x.index is y.index:
            for one, other in zip(x.parts, y.parts, strict=True):
                self.unify(one, other)
            return
        family, single = (x, y) if isinstance(x, Family) else (y, x)
        assert isinstance(family, Family)
        for part in family.parts:
            self.unify(part, (single,))

    def _unify_products(self, x: Dim, y: Dim) -> None:
        sizes, left, right = [], [f.size for f in x], [f.size for f in y]
        while left and right:
            step = min(left[0], right[0])
            if left[0] % step or right[0] % step:
                break
            sizes.append(step)
            left = [left[0] // step, *left[1:]] if left[0] != step else left[1:]
            right = [right[0] // step, *right[1:]] if right[0] != step else right[1:]
        one = self.split(x, sizes) if not left and not right else None
        other = self.split(y, sizes) if one is not None else None
        if one is None or other is None:
            for dim in (x, y):
                self.fix(dim, "two axes of different structure meet")
            return
        for a, b in zip(*self.same_indices(one, other), strict=True):
            self.unify(a, b)

    def same_indices(self, one: Dims, other: Dims) -> tuple[Dims, Dims]:
        """Let fixed dimensions that lie in the same place of two lists of dimensions be one index for the families of both."""
        one, other = [resolve(dim) for dim in one], [resolve(dim) for dim in other]
        for a, b in zip(one, other, strict=True):
            pair = (*a, *b)
            if len(a) == len(b) == 1 and all(isinstance(f, Atom) and f.reason is not None for f in pair) and a != b:
                other = reindex(other, b[0], a[0])  # type: ignore[arg-type]
        return one, other

    def close(self, dims: Dims) -> Dims:
        """Tie the parts of families whose index is no longer along any of the dimensions."""
        dims = [resolve(dim) for dim in dims]
        met = [atom for dim in dims for atom in _plain(dim)]
        there = {atom for atom in met if met.count(atom) == 1}
        while dangling := set().union(*map(indices_of, dims)) - there:
            index = dangling.pop()
            for dim in dims:
                self._tie(dim, index)
            dims = [resolve(dim) for dim in select_part(dims, index, 0)]
        return dims

    def tie(self, dims: Dims, along: set[int]) -> Dims:
        """Tie the parts of families over what lies along some dimensions, in the other dimensions."""
        indices = {atom for k in along for atom in atoms_of(resolve(dims[k]))}
        found = [resolve(dim) for dim in dims]
        others = [k for k in range(len(dims)) if k not in along]
        for index in set().union(*(indices_of(found[k]) for k in others)) & indices:
            for k in others:
                self._tie(found[k], index)
            for k, dim in zip(others, select_part([found[k] for k in others], index, 0), strict=True):
                found[k] = resolve(dim)
        return found

    def _tie(self, dim: Dim, index: Atom) -> None:
        for factor in resolve(dim):
            if not isinstance(factor, Atom):
                for part in factor.parts:
                    self._tie(part, index)
                if isinstance(factor, Family) and factor.index is index:
                    for part in factor.parts[1:]:
                        self.unify(factor.parts[0], part)

    def split(self, factors: Iterable[Factor], sizes: Sequence[int]) -> Dims | None:
        """Divide a row-major product into dimensions of the given sizes; None where its structure does not allow it."""
        queue = list(resolve(factors))
        dims: Dims = []
        for size in sizes:
            dim: list[Factor] = []
            while size > 1:
                queue = [*resolve(queue[:1]), *queue[1:]]
                head = queue.pop(0)
                if size % head.size == 0:
                    dim.append(head)
                    size //= head.size
                    continue
                halves = self._split_factor(head, size) if head.size % size == 0 else None
                if halves is None:
                    return None
                dim.extend(halves[0])
                queue = [*halves[1], *queue]
                size = 1
            dims.append(tuple(dim))
        return dims

    def _split_factor(self, factor: Factor, outer: int) -> tuple[Dim, Dim] | None:
        inner = factor.size // outer
        if isinstance(factor, Atom):
            if factor.reason is not None:
                return self.fixed(outer, factor.reason), self.fixed(inner, factor.reason)
            return self._split_atom(factor, outer, inner)
        if isinstance(factor, Family):
            halves = [self.split(part, (outer, inner)) for part in factor.parts]
            if any(half is None for half in halves):
                return None
            fronts, backs = zip(*halves, strict=True)
            return (Family(factor.index, fronts),), (Family(factor.index, backs),)
        return self._split_sum(factor, outer)

    def _split_atom(self, atom: Atom, outer: int, inner: int) -> tuple[Dim, Dim]:
        front, back = (Atom(f"{atom.name}/{outer}{side}", n) for side, n in (("o", outer), ("i", inner)))
        halves: tuple[Dim, Dim] = (front,), (back,)
        for side, index, other in (("outer", front, back), ("inner", back, front)):
            if (atom.name, outer, side) in self.enumerated:
                index.reason = "an index that takes an axis apart"
                parts = tuple((Atom(f"{other.name}{k}", other.size),) for k in range(index.size))
                family = (Family(index, parts),)
                halves = ((front,), family) if index is front else (family, (back,))
        if halves == ((front,), (back,)):
            self.splits.append((atom.name, outer, front, back))
        atom.value = (*halves[0], *halves[1])
        return halves

    def _split_sum(self, total: Sum, outer: int) -> tuple[Dim, Dim] | None:
        n, size = len(total.parts), size_of(total.parts[0])
        if any(size_of(part) != size for part in total.parts) or (n % outer and outer % n):
            return self._split_parts(total, total.size // outer)
        index = Atom("", min(n, outer), "the index of a concatenation")
        if n % outer == 0:
            step = n // outer
            chunks = [total.parts[k : k + step] for k in range(0, n, step)]
            backs = tuple(chunk[0] if step == 1 else (Sum(chunk),) for chunk in chunks)
            return (index,), (Family(index, backs),)
        halves = [self.split(part, (outer // n, size * n // outer)) for part in total.parts]
        if any(half is None for half in halves):
            return None
        fronts, inner = zip(*halves, strict=True)
        return (index, Family(index, fronts)), (Family(index, inner),)

    def _split_parts(self, total: Sum, inner: int) -> tuple[Dim, Dim] | None:
        """Split every part of a concatenation, such as different numbers of heads, with one and the same inner dimension."""
        if any(size_of(part) % inner for part in total.parts):
            return None
        halves = [self.split(part, (size_of(part) // inner, inner)) for part in total.parts]
        if any(half is None for half in halves):
            return None
        fronts, backs = zip(*halves, strict=True)
        for back in backs[1:]:
            self.unify(backs[0], back)
        return (Sum(fronts),), backs[0]

    def cut(self, dim: Iterable[Factor], at: int) -> tuple[Dim, Dim]:
        """Return the first ``at`` entries of a dimension, and the rest; where a cut is not possible, the dimension is fixed."""
        dim = resolve(dim)
        size = size_of(dim)
        if at == size or at == 0:
            empty = self.fixed(0, "no entries")
            return (dim, empty) if at else (empty, dim)
        head, rest = dim[0], dim[1:]
        if isinstance(head, Atom) and head in indices_of(rest):
            parts = tuple(select_part([rest], head, k)[0] for k in range(head.size))
            return self.cut((Sum(parts),), at)
        if isinstance(head, Sum) and rest:
            return self.cut((Sum(tuple((*part, *rest) for part in head.parts)),), at)
        if at % size_of(rest) or (halves := self._cut_factor(head, at // size_of(rest))) is None:
            reason = reason_of(dim) or "cut in the middle of a structure"
            self.fix(dim, reason)
            return self.fixed(at, reason), self.fixed(size - at, reason)
        return (*halves[0], *rest), (*halves[1], *rest)

    def _cut_factor(self, factor: Factor, at: int) -> tuple[Dim, Dim]:
        if isinstance(factor, Atom):
            halves = [Atom(f"{factor.name}/{at}{k}", n, factor.reason) for k, n in enumerate((at, factor.size - at))]
            if factor.reason is None:
                factor.value = (Sum(((halves[0],), (halves[1],))),)
            return (halves[0],), (halves[1],)
        if isinstance(factor, Family):
            fronts, backs = zip(*(self.cut(part, at) for part in factor.parts), strict=True)
            return (Family(factor.index, fronts),), (Family(factor.index, backs),)
        front: list[Dim] = []
        back = list(factor.parts)
        while at >= size_of(back[0]):
            at -= size_of(back[0])
            front.append(back.pop(0))
        if at:
            head, back[0] = self.cut(back[0], at)
            front.append(head)
        return resolve((Sum(tuple(front)),)), resolve((Sum(tuple(back)),))
