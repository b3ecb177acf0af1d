"""Normalisations with their weights and statistics."""

from typing import Any

import torch

from lit_rebasin.symmetry.factors import Dims, Sum, resolve, size_of
from lit_rebasin.symmetry.registry import rule
from lit_rebasin.symmetry.trace import Trace, is_dims

aten = torch.ops.aten


@rule(
    aten.batch_norm,
    aten._native_batch_norm_legit_no_training,
    aten.native_batch_norm,
    aten._native_batch_norm_legit_functional,
)
@rule(aten.instance_norm, aten._native_batch_norm_legit)
def _per_channel(trace: Trace, x: Dims, *rest: Any, **options: Any) -> Any:
    for vector in rest[:4]:
        if is_dims(vector):
            trace.unify(x[1], vector[0])
    x = trace.mixed(x, *(k for k in range(len(x)) if k != 1))
    return x if isinstance(trace.shape, tuple) and all(isinstance(n, int) for n in trace.shape) else NotImplemented


@rule(aten.rms_norm)
def _rms_norm(trace: Trace, x: Dims, shape: Any, weight: Any = None, eps: float | None = None) -> Dims:
    found: Dims = _layer_norm(trace, x, shape, weight)
    return found


@rule(aten.layer_norm)
def _layer_norm(
    trace: Trace, x: Dims, shape: Any, weight: Any = None, bias: Any = None, *rest: Any, **options: Any
) -> Dims:
    for affine in (weight, bias):
        if affine is not None:
            trace.broadcast(x[len(x) - len(shape) :], affine)
    return trace.mixed(x, *range(len(x) - len(shape), len(x)))


@rule(aten.group_norm)
def _group_norm(
    trace: Trace, x: Dims, groups: int, weight: Any = None, bias: Any = None, *rest: Any, **options: Any
) -> Dims:
    size = trace.algebra.length(x[1]) // groups
    along = resolve(x[1])
    if len(along) == 1 and isinstance(along[0], Sum) and any(size_of(part) % size for part in along[0].parts):
        trace.unify(
            x[1], (Sum(tuple(trace.free(*[size] * groups))),)
        )  # a group may hold parts of two concatenated tensors
    else:
        outer, inner = trace.free(groups, size)
        trace.unify(x[1], (*outer, *inner))
    for affine in (weight, bias):
        if affine is not None:
            trace.unify(x[1], affine[0])
    return trace.mixed(x, *range(1, len(x)))


@rule(aten._weight_norm)
def _weight_norm(trace: Trace, v: Dims, g: Dims, dim: int = 0) -> Dims:
    return trace.broadcast(v, g) if len(g) == len(v) else NotImplemented


@rule(aten.norm_except_dim)
def _norm_except(trace: Trace, v: Dims, pow: int = 2, dim: int = 0) -> Dims:
    return [part if k == dim else () for k, part in enumerate(v)]
