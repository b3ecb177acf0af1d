"""Curves over the steps of a training."""

import math

import torch

from lit_rebasin.metrics import Curve, curves_figure


def curve(*seeds):
    values = torch.tensor(seeds, dtype=torch.float64)
    return Curve(torch.arange(values.shape[1]), values)


def test_a_curve_is_the_mean_and_a_band_the_range():
    figure = curves_figure({"trace": {"": curve([1.0, 2.0, math.nan], [3.0, 6.0, math.nan])}}, marks=[1])
    (axes,) = figure.axes
    mark, line = axes.lines
    assert set(mark.get_xdata()) == {1}
    assert line.get_xdata().tolist() == [0, 1]
    assert line.get_ydata().tolist() == [2, 4]
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1, 6)
    assert axes.get_title() == "trace"
    assert not figure.legends


def test_an_axis_is_logarithmic_where_positive_values_span_two_decades():
    wide, narrow = [1.0, 100.0], [1.0, 99.0]
    panels = {"wide": wide, "narrow": narrow, "with zero": [0.0, 100.0], "nothing": [math.nan, math.nan]}
    figure = curves_figure({name: {"": curve(values)} for name, values in panels.items()})
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]


def test_a_name_has_one_colour_and_a_long_legend_names_twelve():
    layers = {f"layer${index}$": curve([1.0 + index, 2.0]) for index in range(30)}
    figure = curves_figure({"a": layers, "b": dict(list(layers.items())[5:6])})
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(names) == 12
    assert (names[0], names[-1]) == ("layer$0$", "layer$29$")
    first, second = figure.axes
    assert first.lines[5].get_color() == second.lines[0].get_color() != first.lines[6].get_color()
    figure.canvas.draw()
