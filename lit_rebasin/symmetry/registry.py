"""Which rule an operator follows."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

Rule = Callable[..., Any]

_RULES: dict[str, Rule] = {}
# Tagged pointwise by torch, but not the same function at every position or not a function of the values alone.
_NOT_POINTWISE = ("aten::bernoulli", "aten::rrelu")


def rule(*operators: OpOverload | OpOverloadPacket) -> Callable[[Rule], Rule]:
    """Register how permutations pass through an operator; a rule registered later replaces an earlier one.

    The decorated function is called as ``function(trace, *args, **kwargs)`` with the operator's own arguments, every tensor among them given
    as the list of its dimensions (`Dim`). It ties dimensions with ``trace.unify`` or holds them with ``trace.fix``, and returns the list of
    the output's dimensions (a list of such lists for several outputs), or ``NotImplemented`` to fix everything that the operator touches.

    Args:
        *operators: Such as ``torch.ops.aten.linear`` (all overloads) or ``torch.ops.aten.add.Tensor`` (one).

    Returns:
        A decorator that registers the function and returns it as it is.

    Raises:
        TypeError: If an operator is not one of ``torch.ops``.
    """
    for operator in operators:
        if not isinstance(operator, OpOverload | OpOverloadPacket):
            raise TypeError(
                f"rule expects operators of torch.ops, such as torch.ops.aten.linear, got {operator!r} of type "
                f"{type(operator).__name__}."
            )

    def register(function: Rule) -> Rule:
        for operator in operators:
            _RULES[_name(operator)] = function
        return function

    return register


def find_rule(operator: Any) -> Rule | None:
    """Return the rule of an operator: its overload's own, or its packet's, or that of all pointwise functions."""
    if not isinstance(operator, OpOverload):
        return None
    packet = operator.overloadpacket
    found = _RULES.get(_name(operator)) or _RULES.get(_name(packet))
    if found is None and torch.Tag.pointwise in operator.tags and _name(packet) not in _NOT_POINTWISE:
        return _RULES["pointwise"]
    return found


def pointwise(function: Rule) -> Rule:
    """Register the rule of every operator that torch tags as pointwise and that has none of its own."""
    _RULES["pointwise"] = function
    return function


def _name(operator: OpOverload | OpOverloadPacket) -> str:
    packet = operator.overloadpacket if isinstance(operator, OpOverload) else operator
    name = packet._qualified_op_name
    return f"{name}.{operator._overloadname}" if isinstance(operator, OpOverload) else name
