import io

import pytest
import torch

from lit_rebasin.metrics import Curve, curves_figure


def curve(*seeds):
    return Curve(torch.arange(1, len(seeds[0]) + 1), torch.tensor(seeds, dtype=torch.float64))


def test_curves_are_means_over_the_seeds_that_have_the_step():
    nan = float("nan")
    figure = curves_figure({"trace": {"": curve([1.0, nan, nan], [3.0, nan, 5.0])}}, marks=[2])
    (axes,) = figure.axes
    mark, line = axes.lines
    assert set(mark.get_xdata()) == {2}
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 3], [2, 5])
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().extents.tolist() == [1, 1, 3, 5]
    assert not figure.legends


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.01, 1.0], "log"), ([0.0, 1.0], "linear"), ([-1.0, 100.0], "linear"), ([1.0, 50.0], "linear")],
)
def test_the_axis_is_logarithmic_where_positive_values_span_decades(values, scale):
    assert curves_figure({"a": {"": curve(values)}}).axes[0].get_yscale() == scale


def test_panels_share_their_names_and_colours():
    figure = curves_figure({"a": {"x": curve([1.0]), "y": curve([2.0])}, "b": {"y": curve([3.0])}})
    first, second = figure.axes
    assert [axes.get_title() for axes in (first, second)] == ["a", "b"]
    assert first.lines[1].get_color() == second.lines[0].get_color() != first.lines[0].get_color()
    assert [text.get_text() for text in figure.legends[0].texts] == ["x", "y"]


def test_a_long_legend_names_twelve_from_the_first_to_the_last():
    figure = curves_figure({"a": {f"layer {n}": curve([1.0, 2.0]) for n in range(50)}})
    names = [text.get_text() for text in figure.legends[0].texts]
    assert len(set(names)) == 12
    assert (names[0], names[-1]) == ("layer 0", "layer 49")
    assert len(figure.axes[0].lines) == 50


def test_a_long_legend_always_names_with_and_without_alignment():
    layers = {f"layer {n}": curve([1.0, 2.0]) for n in range(50)}
    figure = curves_figure({"a": layers, "b": {"as trained": curve([1.0]), "aligned": curve([2.0])}})
    names = [text.get_text() for text in figure.legends[0].texts]
    assert len(set(names)) == 12
    assert {"layer 0", "layer 49", "as trained", "aligned"} <= set(names)


def test_names_are_no_formulas():
    figure = curves_figure({"$\\frac{$": {"_x $\\frac{$": curve([float("nan")])}})
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
