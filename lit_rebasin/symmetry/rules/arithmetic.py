"""Functions of single entries, reductions, and functions along one dimension."""

from typing import Any

import torch

from lit_rebasin.symmetry.factors import Dims
from lit_rebasin.symmetry.registry import pointwise, rule
from lit_rebasin.symmetry.trace import Trace, is_dims

aten = torch.ops.aten


@pointwise
@rule(aten.hardswish, aten.hardswish_, aten.where, aten.masked_fill, aten.masked_fill_, aten.rsub, aten.true_divide)
@rule(aten.__and__, aten.__or__, aten.__xor__, aten.square_, aten.logical_not, aten.isfinite, aten.isinf)
def _pointwise(trace: Trace, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in (*args, *kwargs.values()) if is_dims(value) and (value or trace.shape == ())]
    scalars = [value for value in args if is_dims(value)]
    return trace.broadcast(*tensors) if tensors else (list(scalars[0]) if scalars else NotImplemented)


@rule(aten.copy_, aten.fill_, aten.zero_)
def _write(trace: Trace, x: Dims, *values: Any) -> Dims:
    return trace.broadcast(x, *(value for value in values if is_dims(value)))


@rule(
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.detach_,
    aten.alias,
    aten.to,
    aten._to_copy,
    aten.lift_fresh_copy,
    aten.lift_fresh,
)
@rule(
    aten.dropout,
    aten.dropout_,
    aten.feature_dropout,
    aten.feature_dropout_,
    aten.alpha_dropout,
    aten.type_as,
    aten.view_as_real_copy,
)
@rule(aten.bernoulli_, aten.requires_grad_)
def _same(trace: Trace, x: Dims, *rest: Any, **options: Any) -> Dims:
    return x


@rule(aten.softmax, aten.log_softmax, aten._softmax, aten._log_softmax, aten._safe_softmax)
def _softmax(trace: Trace, x: Dims, dim: int, *rest: Any, **options: Any) -> Dims:
    return trace.mixed(x, dim)


@rule(
    aten.zeros,
    aten.ones,
    aten.full,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
)
def _constant(trace: Trace, *args: Any, **options: Any) -> Dims:
    return trace.free(*trace.shape)


@rule(
    aten.arange,
    aten.linspace,
    aten.eye,
    aten.rand,
    aten.randn,
    aten.rand_like,
    aten.randn_like,
    aten.empty,
    aten.empty_like,
    aten.new_empty,
)
@rule(aten.bernoulli, aten.scalar_tensor, aten.randint, aten.randint_like)
def _positions(trace: Trace, *args: Any, **options: Any) -> Dims:
    return trace.fixed(*trace.shape)


@rule(aten.prelu)
def _prelu(trace: Trace, x: Dims, weight: Dims) -> Dims:
    if weight and len(x) > 1 and trace.algebra.length(weight[0]) > 1:
        trace.unify(x[1], weight[0])
    return x


def _without(x: Dims, dim: Any, keepdim: bool) -> Dims:
    gone = (
        range(len(x))
        if dim is None or dim == []
        else [d % max(len(x), 1) for d in ([dim] if isinstance(dim, int) else dim)]
    )
    return [() if k in gone else part for k, part in enumerate(x) if keepdim or k not in gone]


@rule(
    aten.sum,
    aten.mean,
    aten.nansum,
    aten.nanmean,
    aten.amax,
    aten.amin,
    aten.prod,
    aten.logsumexp,
    aten.all,
    aten.any,
    aten.median.default,
)
@rule(aten.max.default, aten.min.default, aten.count_nonzero)
def _reduce(trace: Trace, x: Dims, dim: Any = None, keepdim: bool = False, **options: Any) -> Dims:
    return _without(x, dim, keepdim)


@rule(aten.linalg_vector_norm)
def _vector_norm(trace: Trace, x: Dims, ord: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Dims:
    return _without(x, dim, keepdim)


@rule(aten.norm)
def _norm(trace: Trace, x: Dims, p: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Dims:
    return _without(x, dim, keepdim)


@rule(aten.var, aten.std)
def _variance(
    trace: Trace, x: Dims, dim: Any = None, unbiased: Any = True, keepdim: bool = False, **options: Any
) -> Dims:
    return _without(x, None if isinstance(dim, bool) else dim, keepdim)


@rule(aten.var_mean, aten.std_mean)
def _variance_and_mean(
    trace: Trace, x: Dims, dim: Any = None, *rest: Any, keepdim: bool = False, **options: Any
) -> list[Dims]:
    found = _without(x, None if isinstance(dim, bool) else dim, keepdim or (bool(rest) and bool(rest[-1])))
    return [found, list(found)]


@rule(aten.max.dim, aten.min.dim, aten.median.dim)
def _extreme(trace: Trace, x: Dims, dim: int, keepdim: bool = False) -> list[Dims]:
    if trace.uses(1):
        trace.fix(x[dim])
    found = _without(x, dim, keepdim)
    return [found, list(found)]


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp)
def _ordered(trace: Trace, x: Dims, dim: int, **options: Any) -> Dims:
    trace.fix(x[dim])
    return trace.mixed(x, dim)


@rule(aten.flip)
def _flip(trace: Trace, x: Dims, dims: Any) -> Dims:
    trace.fix(*(x[dim] for dim in dims))
    return trace.mixed(x, *dims)


@rule(aten.roll)
def _roll(trace: Trace, x: Dims, shifts: Any, dims: Any = ()) -> Dims:
    trace.fix(*(x[dim] for dim in dims or range(len(x))))
    return trace.mixed(x, *(dims or range(len(x))))


@rule(aten.tril, aten.triu, aten.tril_, aten.triu_)
def _triangle(trace: Trace, x: Dims, *diagonal: int) -> Dims:
    trace.fix(x[-1], x[-2])
    return trace.mixed(x, -1, -2)


@rule(aten.argmax, aten.argmin)
def _position_of_extreme(trace: Trace, x: Dims, dim: int | None = None, keepdim: bool = False) -> Dims:
    trace.fix(*(x if dim is None else [x[dim]]))
    return _without(x, dim, keepdim)


@rule(aten.glu)
def _glu(trace: Trace, x: Dims, dim: int = -1) -> Dims:
    value, gate = trace.cut(x[dim], trace.algebra.length(x[dim]) // 2)
    trace.unify(value, gate)
    found = list(x)
    found[dim] = value
    return found


@rule(aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd, aten.nll_loss2d)
def _classes(
    trace: Trace, x: Dims, target: Dims, weight: Any = None, reduction: int = 1, *rest: Any, **options: Any
) -> Any:
    trace.fix(*x, *target, *(weight or []), reason="the classes of a loss")
    return [] if trace.shape == () else NotImplemented


@rule(aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.huber_loss, aten.binary_cross_entropy)
@rule(aten.binary_cross_entropy_with_logits, aten.soft_margin_loss)
def _regression(trace: Trace, x: Dims, target: Dims, *rest: Any, **options: Any) -> Dims:
    found = trace.broadcast(x, target, *(value for value in (*rest, *options.values()) if is_dims(value) and value))
    return [] if trace.shape == () else found
