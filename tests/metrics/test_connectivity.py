import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lit_rebasin import Barrier, LinearPath, loss_barrier


def networks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]


def test_batches_of_several_sizes_give_the_barrier_of_the_whole():
    path = LinearPath(*networks())
    x, y = torch.randn(70, 4), torch.arange(70) % 3
    wanted = loss_barrier(path, [(x, y)], points=7)
    metric = Barrier(points=7)
    for part in (slice(0, 50), slice(50, 70)):
        models = [path.module_at(alpha) for alpha in wanted.alphas.tolist()]
        metric.update(torch.stack([cross_entropy(model(x[part]), y[part]) for model in models]), len(x[part]))
    assert float(metric.compute()) == pytest.approx(wanted.barrier, rel=1e-5)
    assert metric.path.area == pytest.approx(wanted.area, rel=1e-5)
    _, axes = metric.plot()
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(wanted.losses.tolist(), rel=1e-5)
    assert metric.higher_is_better is False


def test_the_barrier_is_of_the_mean_loss_and_not_the_mean_of_barriers():
    metric = Barrier(points=3)
    metric.update(torch.tensor([0.0, 1.0, 0.0]), 3)
    metric.update(torch.tensor([0.0, -1.0, 0.0]), 1)
    assert float(metric.compute()) == pytest.approx(0.5)
    metric.reset()
    metric.update(torch.tensor([1.0, 2.0, 1.0]))
    assert float(metric.compute()) == pytest.approx(1.0)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="points must be a whole number of at least 3, got 2"):
        Barrier(points=2)
    with pytest.raises(ValueError, match=r"one a point, \(3,\), got shape \(4,\)"):
        Barrier(points=3).update(torch.zeros(4))
    with pytest.raises(ValueError, match="examples must be a whole number of at least 1, got 0"):
        Barrier(points=3).update(torch.zeros(3), 0)


def test_what_is_of_another_type():
    with pytest.raises(ValueError, match=r"points must be a whole number of at least 3, got 4\.5"):
        Barrier(points=4.5)
    with pytest.raises(TypeError, match="losses must be a tensor of real numbers, got list"):
        Barrier(points=3).update([0.0, 1.0, 0.0])
