import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lit_rebasin.metrics import FeatureSpeed, feature_speed_figure


def test_numbers_are_those_of_numpy_over_all_batches():
    generator = np.random.default_rng(0)
    parts = [generator.standard_normal((3, size, 2, 4)) for size in (5, 2)]
    metric = FeatureSpeed()
    for part in parts:
        metric.update(*(torch.from_numpy(one) for one in part))
    before, after, gradient = (np.concatenate([part[k].ravel() for part in parts]) for k in range(3))
    found, step = metric.compute(), after - before
    assert set(found) == {"speed", "cosine", "forward", "backward"}
    assert float(found["speed"]) == pytest.approx(np.linalg.norm(step) / np.linalg.norm(before))
    assert float(found["cosine"]) == pytest.approx(-step @ gradient / np.linalg.norm(step) / np.linalg.norm(gradient))
    assert float(found["forward"]) == pytest.approx(np.sqrt((before**2).mean()))
    assert float(found["backward"]) == pytest.approx(np.sqrt((gradient**2).mean()))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_feature_speed_formula(depth):
    """What the layers up to one take off the loss, from autograd alone, is what the speed of its features says."""
    torch.manual_seed(depth)
    layers = [nn.Sequential(nn.Linear(width, 7), nn.Tanh()) for width in (5, 7, 7)]
    model = nn.Sequential(*layers, nn.Linear(7, 3)).double()
    inputs, target = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3
    rates = [1e-6, 3e-6, 2e-6]
    before = model[: depth + 1](inputs)
    loss = cross_entropy(model[depth + 1 :](before), target)
    gradient, *slopes = torch.autograd.grad(loss, [before, *model.parameters()])
    decay = sum(rates[k // 2] * float(slope.square().sum()) for k, slope in enumerate(slopes[: 2 * (depth + 1)]))
    with torch.no_grad():
        for k, (parameter, slope) in enumerate(zip(model[: depth + 1].parameters(), slopes, strict=False)):
            parameter -= rates[k // 2] * slope
    metric = FeatureSpeed()
    metric.update(before, model[: depth + 1](inputs), gradient)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found["cosine"] * found["speed"] * found["forward"] * found["backward"] * 63 == pytest.approx(
        decay, rel=1e-4
    )
    assert 0 < found["cosine"] < 1


def test_the_cosine_of_a_step_along_the_gradient():
    features, gradient = torch.randn(4, 3), torch.randn(4, 3)
    for sign in (1, -1):
        metric = FeatureSpeed()
        metric.update(features, features - sign * 0.5 * gradient, gradient)
        assert float(metric.compute()["cosine"]) == pytest.approx(sign, abs=1e-6)


def values(before, after, gradient):
    metric = FeatureSpeed()
    metric.update(*(torch.tensor([one]) for one in (before, after, gradient)))
    return [float(value) for value in metric.compute().values()]


def test_zeros():
    assert values([3.0, 4.0], [3.0, 4.0], [1.0, 1.0]) == [0, 0, pytest.approx(math.sqrt(12.5)), 1]
    assert values([3.0, 4.0], [3.0, 9.0], [0.0, 0.0]) == [1, 0, pytest.approx(math.sqrt(12.5)), 0]
    assert values([0.0, 0.0], [0.0, 1.0], [0.0, -2.0]) == [math.inf, 1, 0, pytest.approx(math.sqrt(2))]
    assert values([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]) == [0, 0, 0, 0]


def test_what_is_not_a_number_is_none():
    speed, cosine, forward, backward = values([3.0, math.nan], [3.0, 1.0], [1.0, 1.0])
    assert all(math.isnan(number) for number in (speed, cosine, forward))
    assert backward == 1


def test_small_gradients_do_not_underflow():
    assert values([1.0], [1.0 - 1e-6], [1e-30])[1] == pytest.approx(1)
    metric = FeatureSpeed()
    metric.update(*(torch.tensor([one], dtype=torch.float64) for one in (1.0, 1.0 - 1e-12, 1e-150)))
    assert float(metric.compute()["cosine"]) == pytest.approx(1)


def test_narrow_features_are_summed_in_float64():
    metric = FeatureSpeed()
    metric.update(torch.full((1000, 10), 300.0).half(), torch.zeros(1000, 10).half(), torch.ones(1000, 10).half())
    found = metric.compute()
    assert found["forward"] == 300
    assert found["forward"].dtype == torch.float64
    assert found["speed"] == 1


def test_the_metric_as_a_metric():
    metric = FeatureSpeed()
    assert metric.higher_is_better is None
    assert not metric.full_state_update
    assert not metric.is_differentiable
    assert all(value.isnan() for value in metric.compute().values())
    metric.reset()
    features = torch.randn(2, 3, requires_grad=True)
    batch = metric(features, 2 * features, features)
    assert batch == metric.compute()
    assert not batch["speed"].requires_grad
    figure, _ = metric.plot()
    figure.savefig(io.BytesIO())


def test_errors():
    metric = FeatureSpeed()
    with pytest.raises(ValueError, match=r"one shape, got before \(2, 3\), after \(2, 3\), gradient \(3, 2\)"):
        metric.update(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.ones(2).long(), "torch.int64"),
        (torch.ones(2).cfloat(), "torch.complex64"),
        (torch.ones(2).numpy(), "ndarray: torch.from_numpy makes it one"),
        (None, "NoneType"),
        ("after", "str"),
    ],
)
def test_what_is_no_tensor_of_floating_point(wrong, got):
    for place, name in enumerate(("before", "after", "gradient")):
        given = [torch.ones(2)] * 3
        given[place] = wrong
        with pytest.raises(TypeError, match=f"{name} must be a tensor of floating point, got {got}"):
            FeatureSpeed().update(*given)


def test_the_picture_has_a_line_a_layer_over_the_epochs_and_one_where_a_task_begins():
    figure = feature_speed_figure({"a": [(0, 0.1), (5, 0.2)], "b": [(0, 0.3), (5, 0.0)]}, tasks=[3])
    task, first, second = figure.axes[0].lines
    assert set(task.get_xdata()) == {3}
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0, 5], [0.1, 0.2])
    assert second.get_ydata()[0] == 0.3
    assert math.isnan(second.get_ydata()[1])  # has no logarithm
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]
    deep = feature_speed_figure({f"layer {n}": [(0, 1.0 + n)] for n in range(40)}, tasks=[3])
    named = {
        text.get_text(): line for text, line in zip(deep.legends[0].texts, deep.legends[0].get_lines(), strict=True)
    }
    assert len(named) == 12
    for name in ("layer 0", "layer 39"):
        assert named[name].get_color() == deep.axes[0].lines[1 + int(name.split()[1])].get_color()
