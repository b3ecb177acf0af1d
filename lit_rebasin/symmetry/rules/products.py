"""Sums over products: linear layers, convolutions, attention, embeddings."""

from typing import Any

import torch

from lit_rebasin.symmetry.factors import Dim, Dims
from lit_rebasin.symmetry.registry import rule
from lit_rebasin.symmetry.trace import Trace

aten = torch.ops.aten


@rule(aten.linear)
def _linear(trace: Trace, x: Dims, weight: Dims, bias: Any = None) -> Dims:
    trace.unify(x[-1], weight[-1])
    if bias is not None:
        trace.broadcast(weight[:-1], bias)
    return [*x[:-1], *weight[:-1]]


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot)
def _matmul(trace: Trace, a: Dims, b: Dims) -> Dims:
    inner = b[-1] if len(b) == 1 else b[-2]
    batches = [dims[:-2] for dims in (a, b) if len(dims) > 2]
    aligned = trace.broadcast(*batches) if batches else []
    trace.unify(a[-1], inner)
    return [*aligned, *(a[-2:-1] if len(a) > 1 else []), *(b[-1:] if len(b) > 1 else [])]


@rule(aten.inner)
def _inner(trace: Trace, a: Dims, b: Dims) -> Any:
    if not a or not b:
        return NotImplemented
    trace.unify(a[-1], b[-1])
    return [*a[:-1], *b[:-1]]


@rule(aten.addmm, aten.baddbmm, aten.addmv)
def _add_matmul(trace: Trace, base: Dims, a: Dims, b: Dims, **options: Any) -> Dims:
    return trace.broadcast(base, _matmul(trace, a, b))


@rule(aten.outer, aten.ger)
def _outer(trace: Trace, a: Dims, b: Dims) -> Dims:
    return [*a, *b]


@rule(aten.bilinear)
def _bilinear(trace: Trace, a: Dims, b: Dims, weight: Dims, bias: Any = None) -> Dims:
    trace.unify(a[-1], weight[1])
    trace.unify(b[-1], weight[2])
    if bias is not None:
        trace.unify(weight[0], bias[0])
    return [*trace.broadcast(a[:-1], b[:-1]), weight[0]]


@rule(aten.einsum)
def _einsum(trace: Trace, equation: str, operands: list[Dims], **options: Any) -> Any:
    terms, arrow, output = equation.replace(" ", "").partition("->")
    inputs = [_spelled(term, len(dims)) for term, dims in zip(terms.split(","), operands, strict=True)]
    if not arrow or any(len(set(term)) != len(term) for term in inputs):
        return NotImplemented  # the order of an implicit output, and diagonals, are not followed
    letters: dict[str, Dim] = {}
    for term, dims in zip(inputs, operands, strict=True):
        own = dict(zip(term, dims, strict=True))
        shared = [letter for letter in term if letter in letters]
        tied = trace.broadcast([letters[k] for k in shared], [own[k] for k in shared])
        letters |= own | dict(zip(shared, tied, strict=True))
    return [letters[letter] for letter in _spelled(output, len(trace.shape))]


def _spelled(term: str, rank: int) -> list[str]:
    """Return one letter a dimension, with the dimensions of an ellipsis counted from the last."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{k}" for k in range(hidden, 0, -1)), *after]


def _convolve(
    trace: Trace,
    x: Dims,
    weight: Dims,
    bias: Any,
    stride: Any,
    padding: Any,
    groups: int,
    *,
    transposed: bool = False,
) -> Dims:
    """Tie ``weight (out, in / groups, ...)``, or transposed ``(in, out / groups, ...)``, to the input; windows tell positions apart."""
    size = trace.algebra.length
    space = len(weight) - 2
    channel = len(x) - space - 1
    source, target = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    if groups > 1:
        inner, outer = (size(source) // groups, size(target)) if transposed else (size(source), size(target) // groups)
        index, into, out_of = trace.free(groups, inner, outer)
        trace.unify(weight[1], out_of if transposed else into)
        trace.unify(weight[0], (*index, *(into if transposed else out_of)))
        source, target = (*index, *into), (*index, *out_of)
    trace.unify(x[channel], source)
    if bias is not None:
        trace.unify(target, bias[0])
    found = [*x[:channel], target]
    plain = all(step == 1 for step in _each(stride)) and all(margin == 0 for margin in _each(padding))
    for k in range(space):
        position = x[channel + 1 + k]
        if plain and size(weight[2 + k]) == 1:  # the same sum at every position
            found.append(position)
            continue
        trace.fix(position, reason="a position that a convolution moves over")
        trace.fix(weight[2 + k], reason="a position in a convolution's kernel")
        found.extend(trace.fixed(trace.shape[channel + 1 + k]))
    return found


def _each(setting: Any) -> list[Any]:
    return list(setting) if isinstance(setting, list | tuple) else [setting]


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def _convolution(
    trace: Trace,
    x: Dims,
    weight: Dims,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Dims:
    return _convolve(trace, x, weight, bias, stride, padding, groups)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def _transposed_convolution(
    trace: Trace,
    x: Dims,
    weight: Dims,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Dims:
    return _convolve(trace, x, weight, bias, stride, [*_each(padding), *_each(output_padding)], groups, transposed=True)


@rule(aten.convolution)
def _any_convolution(trace: Trace, x: Dims, weight: Dims, bias: Any, *settings: Any) -> Any:
    stride, padding, _, transposed, more, groups = settings
    return _convolve(trace, x, weight, bias, stride, [*_each(padding), *_each(more)], groups, transposed=transposed)


@rule(aten.embedding)
def _embedding(trace: Trace, weight: Dims, indices: Dims, *rest: Any, **options: Any) -> Dims:
    trace.fix(weight[0], *indices, reason="rows that are looked up by index")
    return [*indices, weight[1]]


@rule(aten.scaled_dot_product_attention)
def _attention(
    trace: Trace,
    query: Dims,
    key: Dims,
    value: Dims,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa:
        heads, shared = trace.algebra.length(query[-3]), trace.algebra.length(key[-3])
        outer, inner = trace.free(shared, heads // shared)
        trace.unify(query[-3], (*outer, *inner))
        for dims in (key, value):
            trace.unify(dims[-3], outer)
        batch = [*trace.broadcast(query[:-3], key[:-3], value[:-3]), query[-3]]
    else:
        batch = trace.broadcast(query[:-2], key[:-2], value[:-2])
    trace.unify(query[-1], key[-1])
    trace.unify(key[-2], value[-2])
    if is_causal:
        trace.fix(query[-2], key[-2])
    if attn_mask is not None:
        trace.broadcast([*batch, query[-2], key[-2]], attn_mask)
    return [*batch, query[-2], value[-1]]
