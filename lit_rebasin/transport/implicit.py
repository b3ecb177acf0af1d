"""Plans as differentiable functions of costs, masses and regularization, for autograd, ``torch.func`` and ``torch.compile``.

The solvers are opaque operators (``torch.library``): a compiler does not look into their loops, and ``vmap`` hands them a batch.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import CustomOpDef

from lit_rebasin.transport.adjoint import adjoint
from lit_rebasin.transport.laplacian import Array
from lit_rebasin.transport.problem import Problem
from lit_rebasin.transport.scaling import anneal, solve

Solution = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _sinkhorn(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    regularization: Tensor,
    start: Tensor | None,
    sign: int,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Solve a batch; return the plan, both potentials, the error and the number of iterations."""
    if 0 in cost.shape[:-2]:
        return _empty_solution(cost)
    problem = _problem(cost, a, b, regularization, sign)
    psi = None if start is None else _start(problem, _flat(start, cost.shape[:-2]))
    return _shaped(cost.shape[:-2], problem, *solve(problem, psi, max_iterations, tolerance))


def _annealed_sinkhorn(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    regularization: Tensor,
    betas: Tensor,
    sign: int,
    debiased: bool,
) -> Solution:
    """Anneal a batch, ``regularization`` being that of the last of ``betas``."""
    if 0 in cost.shape[:-2]:
        return _empty_solution(cost)
    problem = _problem(cost, a, b, regularization, sign)
    return _shaped(cost.shape[:-2], problem, *anneal(problem, (betas / betas[-1]).tolist(), debiased))


def _plan_adjoint(plan: Tensor, change: Tensor, da: Tensor | None, db: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the adjoint system of a batch."""
    batch = plan.shape[:-2]
    if 0 in batch:
        return torch.zeros_like(plan), plan.new_zeros(plan.shape[:-1]), plan.new_zeros(batch + plan.shape[-1:])
    # Detached, as NumPy asks for.
    da = None if da is None else _flat(da.detach(), batch)
    db = None if db is None else _flat(db.detach(), batch)
    solved = adjoint(_flat(plan.detach(), batch), _flat(change.detach(), batch), da, db)
    moved, alpha, beta = (_unflat(tensor, batch) for tensor in solved)
    return moved, alpha, beta


def _problem(cost: Tensor, a: Tensor | None, b: Tensor | None, regularization: float | Tensor, sign: int) -> Problem:
    """Return the flat, checked and balanced batch."""
    if isinstance(regularization, Tensor):
        temperatures = regularization.reshape(-1).tolist()
    else:
        temperatures = [float(regularization)] * cost.shape[:-2].numel()
    if not all(0 < temperature < float("inf") for temperature in temperatures):
        raise ValueError("regularization must be above 0 and finite.")
    batch = cost.shape[:-2]
    cost = _flat(cost.detach(), batch)
    rates = [-sign / temperature for temperature in temperatures]
    masses = None if a is None or b is None else (_flat(a.detach(), batch), _flat(b.detach(), batch))
    problem = Problem(cost, rates, masses)
    problem.check("cost" if sign > 0 else "logits")
    return problem.balanced()


def _start(problem: Problem, potentials: Tensor) -> Tensor:
    """Return the potentials of the columns without their unit; those of columns that had no mass are as good as any."""
    if not (potentials < torch.inf).all():
        raise ValueError("warm_start holds a NaN or an infinity.")
    return potentials.double().masked_fill(potentials == -torch.inf, 0) * problem.rate.abs()


def _empty_solution(cost: Tensor) -> Solution:
    """Return the solution of a batch of no problems."""
    error = cost.new_zeros(cost.shape[:-2])
    rows, columns = cost.new_zeros(cost.shape[:-1]), cost.new_zeros(cost.shape[:-2] + cost.shape[-1:])
    return torch.zeros_like(cost), rows, columns, error, torch.scalar_tensor(0, dtype=torch.int64)


def _shaped(
    batch: torch.Size, problem: Problem, plan: Array, phi: Array, psi: Array, error: Array, iterations: int
) -> Solution:
    """Give the flat batch its shape again, and the potentials the unit of the cost."""
    # Those of one problem may be float32 here, of several they are brought to the unit in float64.
    unit = abs(1 / problem.rates[0]) if len(problem.rates) == 1 else 1 / problem.rate.abs()
    f, g = phi * unit, psi * unit
    result, f, g, error = (_unflat(array, batch) for array in (plan, f, g, error))
    f, g, error = (tensor.to(result.dtype) for tensor in (f, g, error))
    return result, f, g, error, torch.scalar_tensor(iterations, dtype=torch.int64)


def _flat(tensor: Tensor, batch: torch.Size) -> Tensor:
    """Bring all leading dimensions to one; by the quicker way if there are none."""
    return tensor.reshape(-1, *tensor.shape[len(batch) :]) if batch else tensor[None]


def _unflat(array: Array, batch: torch.Size) -> Tensor:
    """Give a flat batch its leading dimensions back, or those of one problem to its array."""
    if isinstance(array, Tensor):
        return array.reshape(batch + array.shape[1:]) if batch else array[0]
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.reshape(batch + tensor.shape) if batch else tensor


# A compiler cannot follow the loops; to it, each of the three is one operator.
_operators: dict[Callable[..., Any], CustomOpDef] = {
    function: torch.library.custom_op(f"lit_rebasin::{function.__name__.strip('_')}", function, mutates_args=())
    for function in (_sinkhorn, _annealed_sinkhorn, _plan_adjoint)
}


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a solver; as an operator only where it is compiled, for that costs time, and never in half precision."""
    if torch.compiler.is_compiling():
        return _operators[function](*arguments)
    kind = arguments[0].device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return function(*arguments)
    return function(*arguments)


def _fake_solution(cost: Tensor, *_: Any) -> Solution:
    rows, columns = torch.empty_like(cost[..., 0]), torch.empty_like(cost[..., 0, :])
    error = cost.new_empty(cost.shape[:-2])
    return cost.new_empty(cost.shape), rows, columns, error, torch.empty((), dtype=torch.int64)


_operators[_sinkhorn].register_fake(_fake_solution)
_operators[_annealed_sinkhorn].register_fake(_fake_solution)


@_operators[_plan_adjoint].register_fake
def _(plan: Tensor, change: Tensor, da: Tensor | None, db: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return plan.new_empty(plan.shape), torch.empty_like(plan[..., 0]), torch.empty_like(plan[..., 0, :])


def _moved(info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """Bring the dimension that ``vmap`` maps to the front of every tensor, for the solvers take any leading ones."""
    return [
        argument
        if not isinstance(argument, Tensor)
        else argument.expand(info.batch_size, *argument.shape)
        if dim is None
        else argument.movedim(dim, 0)
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]


class ImplicitPlan(torch.autograd.Function):
    """A plan, differentiated as the solution for the masses that it has.

    ``apply(cost, a, b, regularization, extra, sign, *settings)`` gives the plan, both potentials, the error and the number of iterations.
    ``extra`` and ``settings`` are those of one of the solvers.
    """

    @staticmethod
    def forward(
        cost: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        regularization: float | Tensor,
        extra: Tensor | None,
        sign: int,
        *settings: Any,
    ) -> Solution:
        """Solve."""
        solver = _annealed_sinkhorn if len(settings) == 1 else _sinkhorn
        found: Solution = _call(solver, cost, a, b, regularization, extra, sign, *settings)
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        """Solve the mapped problems as a batch, which has one schedule."""
        moved = _moved(info, in_dims, arguments)
        if len(arguments) == 7:
            moved[4] = arguments[4]
        return ImplicitPlan.apply(*moved), (0, 0, 0, 0, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Solution) -> None:
        """Keep the plan, which is all that the gradient needs."""
        ctx.sign, ctx.settings, ctx.unit = inputs[5], len(inputs) - 6, inputs[1] is None
        regularization = inputs[3]
        ctx.number = None if isinstance(regularization, Tensor) else regularization
        ctx.save_for_backward(output[0], regularization if ctx.number is None else None)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Pass the gradient on to cost, masses and regularization."""
        if gradient is None:
            return tuple(None for _ in range(6 + ctx.settings))
        plan, regularization = ctx.saved_tensors
        regularization = ctx.number or regularization
        scores, alpha, beta = _Adjoint.apply(plan, gradient, None, None)
        masses = (None, None) if ctx.unit else _fixed_gauge(plan, alpha, beta)
        temperature = None
        if ctx.needs_input_grad[3]:
            # The rows and columns of the gradient sum to zero, so that log P stands for the scores, without their large numbers.
            temperature = -torch.xlogy(scores, plan).sum((-2, -1)).to(regularization.dtype) / regularization
        divisor = regularization if ctx.sign < 0 else -regularization
        if ctx.number is None and divisor.ndim:
            divisor = divisor.to(plan.dtype)[..., None, None]
        if ctx.number is None or divisor != 1:
            # New memory of this size takes longer than the division itself, and is needed only where autograd records it.
            scores = scores / divisor if torch.is_grad_enabled() else scores.div_(divisor)
        return (scores, *masses, temperature, *[None] * (2 + ctx.settings))


def _fixed_gauge(plan: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the masses with ``sum_j b_j beta_j = 0``, and 0 where there is no mass."""
    a, b = plan.sum(-1), plan.sum(-2)
    shift = (b * beta).sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
    return torch.where(a > 0, alpha + shift, 0.0), torch.where(b > 0, beta - shift, 0.0)


class _Adjoint(torch.autograd.Function):
    """The solution of the adjoint system, differentiable any number of times by the same system."""

    @staticmethod
    def forward(plan: Tensor, change: Tensor, da: Tensor | None, db: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _call(_plan_adjoint, plan, change, da, db)
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _Adjoint.apply(*_moved(info, in_dims, arguments)), (0, 0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])
        ctx.shifted = inputs[2] is not None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate ``P * T``, ``T = change - alpha 1' - 1 beta'``, by way of the same residual of the incoming gradient."""
        moved, rows, columns = gradients
        plan, change, alpha, beta = ctx.saved_tensors
        to_change, over, under = _Adjoint.apply(plan, moved, rows, columns)
        residual = change - alpha[..., :, None] - beta[..., None, :]
        to_plan = (moved - over[..., :, None] - under[..., None, :]) * residual
        return to_plan, to_change, *((-over, -under) if ctx.shifted else (None, None))


class _AllByPosition(inspect.Signature):
    """The signature of a function that is called with all its arguments, by position: there is nothing to bind."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Return the arguments as they are."""
        return SimpleNamespace(args=args, kwargs=kwargs, apply_defaults=lambda: None)


# Else `apply` binds them at every call, for a tenth of the time of a solve of width 128.
for _function in (ImplicitPlan, _Adjoint):
    setattr(_function.forward, "__signature__", _AllByPosition())  # noqa: B010
