"""Recurrent layers: all gates of a unit move together, so a packed weight has ``before = 4`` (LSTM) or ``3`` (GRU)."""

from collections.abc import Iterator
from typing import Any

import torch

from lit_rebasin.symmetry.factors import Dim, Dims, Family, Sum
from lit_rebasin.symmetry.registry import rule
from lit_rebasin.symmetry.rules.shapes import select
from lit_rebasin.symmetry.trace import Trace, Uniform

aten = torch.ops.aten


def _cell(
    trace: Trace, x: Dim, hidden: Dim, weights: Iterator[Dims], gates: int, biases: bool, state: Dim | None = None
) -> Dim:
    """Tie the weights ``(gates * units, ...)`` of one layer to its input and its hidden state, and return its units."""
    w_input, w_hidden = next(weights), next(weights)
    units = state or trace.free(trace.algebra.length(w_input[0]) // gates)[0]
    vectors = [next(weights), next(weights)] if biases else []
    for weight in (w_input, w_hidden, *vectors):
        trace.unify(weight[0], (*trace.fixed(gates)[0], *units))
    trace.unify(w_input[1], x)
    trace.unify(w_hidden[1], hidden)
    trace.reach(units, hidden)
    return units


def _layers(
    trace: Trace, x: Dims, states: list[Dims], params: list[Dims], settings: tuple[Any, ...], gates: int
) -> Any:
    biases, layers, _, _, bidirectional, batch_first = settings
    trace.fix(*x[:-1], reason="a position in a sequence")
    directions = 2 if bidirectional else 1
    cells = gates == 4
    projected = cells and trace.algebra.length(states[0][-1]) != trace.algebra.length(states[1][-1])
    weights = iter(params)
    flow, hiddens, units = x[-1], [], []
    for layer in range(layers):
        ends = []
        for direction in range(directions):
            k = layer * directions + direction
            hidden = trace.free(trace.algebra.length(states[0][-1]))[0]
            found = _cell(trace, flow, hidden, weights, gates, biases, None if projected else hidden)
            if projected:
                projection = next(weights)
                trace.unify(projection[0], hidden)
                trace.unify(projection[1], found)
            for state, dim in zip(states, (hidden, found), strict=False):
                if not isinstance(state, Uniform):
                    first = select(trace, state, 0, k)
                    trace.unify(first[-1], dim)
                    trace.fix(*first[:-1], reason="a position in a sequence")
            ends.append(hidden)
            hiddens.append(hidden)
            units.append(found)
        flow = (Sum(tuple(ends)),) if directions == 2 else ends[0]
    batch = x[0 if batch_first else 1] if len(x) == 3 else ()
    finals = []
    for dims in (hiddens, units) if cells else (hiddens,):
        index = trace.fixed(len(dims))[0]
        last: Dim = (Family(index[0], tuple(dims)),) if len(dims) > 1 else dims[0]  # type: ignore[arg-type]
        finals.append([index, *([batch] if len(x) == 3 else []), last])
    return [[*x[:-1], flow], *finals]


@rule(aten.lstm.input)
def _lstm(trace: Trace, x: Dims, states: list[Dims], params: list[Dims], *settings: Any) -> Any:
    return _layers(trace, x, states, params, settings, 4)


@rule(aten.gru.input)
def _gru(trace: Trace, x: Dims, state: Dims, params: list[Dims], *settings: Any) -> Any:
    return _layers(trace, x, [state], params, settings, 3)


@rule(aten.rnn_tanh.input, aten.rnn_relu.input)
def _rnn(trace: Trace, x: Dims, state: Dims, params: list[Dims], *settings: Any) -> Any:
    return _layers(trace, x, [state], params, settings, 1)


@rule(aten.lstm_cell)
def _lstm_cell(trace: Trace, x: Dims, states: list[Dims], *params: Any) -> Any:
    weights = [param for param in params if param is not None]
    units = _cell(trace, x[-1], states[0][-1], iter(weights), 4, len(weights) == 4, states[0][-1])
    trace.unify(units, states[1][-1])
    found = [*trace.broadcast(x[:-1], *(state[:-1] for state in states)), units]
    return [found, list(found)]


@rule(aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell)
def _cell_of_one_state(trace: Trace, x: Dims, state: Dims, *params: Any) -> Any:
    weights = [param for param in params if param is not None]
    gates = trace.algebra.length(weights[0][0]) // trace.algebra.length(state[-1])
    units = _cell(trace, x[-1], state[-1], iter(weights), gates, len(weights) == 4, state[-1])
    return [*trace.broadcast(x[:-1], state[:-1]), units]
