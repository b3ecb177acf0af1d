import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath
from lit_rebasin.merging import has_batch_norm, line_search, reestimate_batch_norm

PREVIOUS, NEW = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}


def test_ends_and_direction_of_alpha():
    path = LinearPath(PREVIOUS, NEW)
    assert torch.equal(path.at(1.0)["w"], PREVIOUS["w"])
    assert torch.equal(path.at(0.0)["w"], NEW["w"])
    assert torch.equal(path.at(0.75)["w"], torch.tensor([0.75, 0.5]))


def test_barrier_and_area_of_a_known_curve():
    # Loss 4 a (1 - a) + a: 1 at the previous end, 0 at the new one, excess 4 a (1 - a).
    path = LinearPath({"w": torch.tensor([1.0], dtype=torch.float64)}, {"w": torch.tensor([0.0], dtype=torch.float64)})
    found = path.losses(lambda weights: 4 * weights["w"][0] * (1 - weights["w"][0]) + weights["w"][0])
    assert len(found.alphas) == 21
    assert found.barrier == pytest.approx(1.0)
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert found.area == pytest.approx(float((4 * grid * (1 - grid)).mean()))


def test_barrier_is_negative_where_the_path_dips():
    found = LinearPath(PREVIOUS, NEW).losses(lambda weights: (weights["w"] - 0.5).square().sum())
    assert found.barrier < 0
    assert found.area < 0


def test_line_search_on_a_quadratic_and_ties():
    path = LinearPath({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.0])})
    assert line_search(path.losses(lambda weights: (weights["w"][0] - 0.35) ** 2)) == pytest.approx(0.35)
    assert line_search(path.losses(lambda weights: 0.0)) == 1.0
    with pytest.raises(ValueError, match="NaN"):
        line_search(path.losses(lambda weights: float("nan")))


def test_statistics_equal_those_of_the_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[0].eval()
    model[1].running_mean.fill_(9.0)
    batches = [torch.randn(50, 3) for _ in range(4)]
    assert has_batch_norm(model)
    reestimate_batch_norm(model, model, batches)
    hidden = [model[0](batch).detach() for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert [module.training for module in model] == [False, True, True, True]
    assert not has_batch_norm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        LinearPath(PREVIOUS, NEW).at(alpha)


def test_too_few_points_and_other_architecture():
    with pytest.raises(ValueError, match="at least 3"):
        LinearPath(PREVIOUS, NEW).losses(lambda weights: 0.0, points=2)
    with pytest.raises(ValueError, match="'w' has shape"):
        LinearPath({"w": torch.zeros(3)}, NEW)
