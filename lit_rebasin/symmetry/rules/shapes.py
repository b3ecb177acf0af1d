"""Operators that move, join or take apart dimensions, and those that work on windows of positions."""

from typing import Any

import torch

from lit_rebasin.symmetry.factors import Atom, Dim, Dims, Family, Sum, reindex, resolve, select_part, size_of
from lit_rebasin.symmetry.registry import rule
from lit_rebasin.symmetry.trace import Trace, is_dims

aten = torch.ops.aten


@rule(
    aten.view.default,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.ravel,
    aten.view_as,
    aten.reshape_as,
)
@rule(
    aten.squeeze, aten.unsqueeze, aten._reshape_alias, aten.squeeze_, aten.unsqueeze_, aten.atleast_1d, aten.atleast_2d
)
def _view(trace: Trace, x: Dims, *args: Any, **options: Any) -> Any:
    """Regroup the row-major product, block by block between the places where old and new dimensions end together."""
    if 0 in trace.shape:
        return NotImplemented
    old = [dim for dim in x if size_of(dim) > 1]
    new = [size for size in trace.shape if size > 1]
    found: Dims = []
    while new:
        block, sizes = [old.pop(0)], [new.pop(0)]
        have, need = size_of(block[0]), sizes[0]
        while have != need:
            if have < need:
                block.append(old.pop(0))
                have *= size_of(block[-1])
            else:
                sizes.append(new.pop(0))
                need *= sizes[-1]
        found.extend(block if len(block) == len(sizes) == 1 else trace.split(block, sizes))
    ordered = iter(found)
    return [next(ordered) if size > 1 else () for size in trace.shape]


@rule(aten.permute, aten.permute_copy)
def _permute(trace: Trace, x: Dims, dims: Any) -> Dims:
    return [x[dim] for dim in dims]


@rule(aten.transpose, aten.swapaxes, aten.swapdims, aten.transpose_)
def _transpose(trace: Trace, x: Dims, first: int, second: int) -> Dims:
    found = list(x)
    found[first], found[second] = found[second], found[first]
    return found


@rule(aten.numpy_T)
def _reverse(trace: Trace, x: Dims) -> Dims:
    return x[::-1]


@rule(aten.t, aten.mT, aten.t_)
def _turn(trace: Trace, x: Dims) -> Dims:
    return [*x[:-2], *reversed(x[-2:])]


@rule(aten.movedim, aten.moveaxis)
def _movedim(trace: Trace, x: Dims, source: Any, destination: Any) -> Dims:
    rank = len(x)
    sources, targets = (
        [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])] for dims in (source, destination)
    )
    rest = iter([k for k in range(rank) if k not in sources])
    order = [sources[targets.index(k)] if k in targets else next(rest) for k in range(rank)]
    return [x[k] for k in order]


@rule(aten.expand, aten.expand_as, aten.broadcast_to, aten.expand_copy)
def _expand(trace: Trace, x: Dims, *args: Any, **options: Any) -> Dims:
    new = trace.free(*trace.shape)
    old = [*[()] * (len(new) - len(x)), *x]
    return [dim if size_of(dim) == size else fresh for dim, size, fresh in zip(old, trace.shape, new, strict=True)]


@rule(aten.repeat, aten.tile)
def _repeat(trace: Trace, x: Dims, repeats: Any) -> Dims:
    old = [*[()] * (len(trace.shape) - len(x)), *x]
    times = trace.free(*(size // size_of(dim) for size, dim in zip(trace.shape, old, strict=True)))
    return [(*outer, *dim) for outer, dim in zip(times, old, strict=True)]


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(trace: Trace, x: Dims, repeats: int, dim: int | None = None, **options: Any) -> Dims:
    if dim is None:
        return [(*(factor for part in x for factor in part), *trace.free(repeats)[0])]
    found = list(x)
    found[dim] = (*x[dim], *trace.free(repeats)[0])
    return found


@rule(aten.cat, aten.concat, aten.concatenate)
def _cat(trace: Trace, tensors: list[Dims], dim: int = 0) -> Dims:
    tensors = [x for x in tensors if len(x) == len(trace.shape)]
    dim %= len(trace.shape)
    shared = trace.broadcast(*([*x[:dim], *x[dim + 1 :]] for x in tensors))
    whole: Dim = (Sum(tuple(x[dim] for x in tensors)),)
    return [*shared[:dim], whole, *shared[dim:]]


@rule(aten.stack)
def _stack(trace: Trace, tensors: list[Dims], dim: int = 0) -> Dims:
    index = trace.fixed(len(tensors))[0]
    parts = zip(*tensors, strict=True)
    found: Dims = [(Family(index[0], tuple(dims)),) for dims in parts] if index else list(tensors[0])  # type: ignore[arg-type]
    found.insert(dim % len(trace.shape), index)
    return found


def select(trace: Trace, x: Dims, dim: int, index: int) -> Dims:
    """Return the dimensions of the slice at one entry along ``dim``."""
    dim %= len(x)
    rest = [*x[:dim], *x[dim + 1 :]]
    along = resolve(x[dim])
    if len(along) == 1 and isinstance(along[0], Atom) and along[0].reason is not None:
        return select_part(rest, along[0], index % along[0].size)
    if along:
        _, tail = trace.cut(along, index % size_of(along))
        trace.cut(tail, 1)
    return rest


@rule(aten.select, aten.select_copy)
def _select(trace: Trace, x: Dims, dim: int, index: int) -> Dims:
    return select(trace, x, dim, index)


@rule(aten.unbind)
def _unbind(trace: Trace, x: Dims, dim: int = 0) -> list[Dims]:
    return [select(trace, x, dim, k) for k in range(size_of(x[dim]))]


def _narrow(trace: Trace, x: Dims, dim: int, start: int, length: int) -> Dims:
    """Return the dimensions of neighbouring entries along ``dim``."""
    dim %= len(x)
    along = resolve(x[dim])
    found = list(x)
    if length == size_of(along):
        return found
    if len(along) == 1 and isinstance(along[0], Atom) and along[0].reason is not None:
        index = Atom("", length, along[0].reason)
        found = reindex(x, along[0], index, range(start, start + length))
        found[dim] = (index,)
        return found
    _, tail = trace.cut(along, start)
    found[dim], _ = trace.cut(tail, length)
    return found


@rule(aten.slice)
def _slice(
    trace: Trace, x: Dims, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Dims:
    size = size_of(x[dim])
    entries = range(size)[slice(start, end, step)]
    if step == 1:
        return _narrow(trace, x, dim, entries.start, len(entries))
    trace.fix(x[dim])
    found = list(x)
    found[dim] = trace.fixed(len(entries))[0]
    return found


@rule(aten.narrow)
def _narrow_rule(trace: Trace, x: Dims, dim: int, start: int, length: int) -> Dims:
    return _narrow(trace, x, dim, start % max(size_of(x[dim]), 1), length)


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unsafe_split, aten.unsafe_chunk)
def _chunks(trace: Trace, x: Dims, sizes: Any, dim: int = 0) -> list[Dims]:
    found, start = [], 0
    for shape in trace.shape:
        found.append(_narrow(trace, x, dim, start, shape[dim]))
        start += shape[dim]
    return found


@rule(aten.index.Tensor)
def _index(trace: Trace, x: Dims, indices: list[Any]) -> Any:
    """Fix what is looked up; the dimensions of the indices stand where the looked-up ones stood together, or come first."""
    chosen = [k for k, index in enumerate(indices) if index is not None]
    rows = trace.broadcast(*(indices[k] for k in chosen))
    trace.fix(*(x[k] for k in chosen), *rows)
    rest = [dim for k, dim in enumerate(x) if k not in chosen]
    place = chosen[0] if chosen == list(range(chosen[0], chosen[-1] + 1)) else 0
    return [*rest[:place], *rows, *rest[place:]]


@rule(aten.index_select)
def _index_select(trace: Trace, x: Dims, dim: int, index: Dims) -> Dims:
    trace.fix(x[dim], *index)
    found = list(x)
    found[dim] = trace.fixed(trace.shape[dim])[0]
    return found


@rule(aten.pad, aten.constant_pad_nd)
def _pad(trace: Trace, x: Dims, pad: Any, mode: Any = "constant", value: Any = None) -> Any:
    """Lay new entries of one value around a dimension; other modes copy neighbours, so that positions matter."""
    found = list(x)
    for k, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = len(x) - 1 - k
        size = size_of(x[dim])
        if before < 0 or after < 0 or (mode not in ("constant", 0, 0.0) and not isinstance(mode, int | float)):
            trace.fix(x[dim])
            found[dim] = trace.fixed(size + before + after)[0]
        elif before or after:
            ends = trace.free(before, after)
            found[dim] = (Sum((ends[0], x[dim], ends[1])),)
    return found


def _window(trace: Trace, x: Dims, space: int) -> Any:
    """Fix the last dimensions, along which windows tell positions apart."""
    shapes = trace.shape if isinstance(trace.shape, list | tuple) and not _is_shape(trace.shape) else [trace.shape]
    trace.fix(*x[len(x) - space :], reason="a position that a window moves over")
    found = [[*x[: len(x) - space], *trace.fixed(*shape[len(x) - space :])] for shape in shapes]
    return found[0] if _is_shape(trace.shape) else found


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) for size in value)


def _register_windows() -> None:
    names = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool reflection_pad replication_pad fractional_max_pool lp_pool"
    for space in (1, 2, 3):
        kinds = [f"{name}{space}d" for name in names.split()] + [f"max_pool{space}d_with_indices"]
        kinds += [f"_adaptive_avg_pool{space}d"]
        kinds += [
            ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")[space - 1],
            f"upsample_nearest{space}d",
        ]
        kinds += ["upsample_bicubic2d", "grid_sampler_2d"] if space == 2 else []
        operators = [getattr(aten, kind) for kind in kinds if hasattr(aten, kind)]

        def windows(trace: Trace, x: Dims, *rest: Any, space: int = space, **options: Any) -> Any:
            for value in rest:
                if is_dims(value) and value:
                    trace.fix(*value)
            return _window(trace, x, space)

        rule(*operators)(windows)


_register_windows()


@rule(aten.pixel_shuffle)
def _pixel_shuffle(trace: Trace, x: Dims, factor: int) -> Dims:
    channels = size_of(x[-3]) // factor**2
    kept, _ = trace.split([x[-3]], (channels, factor**2))
    trace.fix(_, *x[-2:])
    return [*x[:-3], kept, *trace.fixed(*trace.shape[-2:])]


@rule(aten.pixel_unshuffle)
def _pixel_unshuffle(trace: Trace, x: Dims, factor: int) -> Dims:
    trace.fix(*x[-2:])
    return [*x[:-3], (*x[-3], *trace.fixed(factor**2)[0]), *trace.fixed(*trace.shape[-2:])]


@rule(aten.channel_shuffle)
def _channel_shuffle(trace: Trace, x: Dims, groups: int) -> Dims:
    outer, inner = trace.split([x[1]], (groups, size_of(x[1]) // groups))
    return [x[0], (*inner, *outer), *x[2:]]


@rule(aten.im2col)
def _unfold(trace: Trace, x: Dims, kernel: Any, *rest: Any) -> Dims:
    trace.fix(*x[-2:])
    return [*x[:-3], (*x[-3], *trace.fixed(kernel[0] * kernel[1])[0]), *trace.fixed(trace.shape[-1])]


@rule(aten.view_as_complex)
def _as_complex(trace: Trace, x: Dims) -> Dims:
    trace.fix(x[-1])
    return x[:-1]


@rule(aten.view_as_real)
def _as_real(trace: Trace, x: Dims) -> Dims:
    return [*x, *trace.fixed(2)]
