import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath
from lit_rebasin.merging import NoFiniteLossError, PathLosses, has_batch_norm, line_search, reestimate_batch_norm

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.7, 0.9, 1.0])
def test_path_is_exact_where_both_ends_are_equal(alpha, dtype):
    """A frozen layer or a mask must not drift over many merges."""
    same = torch.randn(1000).to(dtype)
    same[:3] = torch.tensor([float("inf"), -float("inf"), 0.0])
    assert torch.equal(LinearPath({"w": same.clone()}, {"w": same}).at(alpha)["w"], same)


def test_ends_are_exact_at_any_scale():
    previous, new = torch.randn(1000) * 1e6, torch.randn(1000)
    path = LinearPath({"w": previous}, {"w": new})
    assert torch.equal(path.at(1.0)["w"], previous)
    assert torch.equal(path.at(0.0)["w"], new)
    middle = 0.7 * previous.double() + 0.3 * new.double()
    torch.testing.assert_close(path.at(0.7)["w"].double(), middle, rtol=1e-6, atol=0.1)


def test_path_passes_gradients_to_both_ends_also_where_they_are_equal():
    previous, new = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    LinearPath({"w": previous}, {"w": new}).at(0.8)["w"].sum().backward()
    torch.testing.assert_close(previous.grad, torch.full((3,), 0.8))
    torch.testing.assert_close(new.grad, torch.full((3,), 0.2))


def losses_of(*values):
    return PathLosses(torch.linspace(0, 1, len(values), dtype=torch.float64), torch.tensor(values, dtype=torch.float64))


def test_line_search_never_chooses_a_loss_that_is_not_finite():
    nan, inf = float("nan"), float("inf")
    assert line_search(losses_of(2.0, nan, 1.0, inf, 3.0)) == 0.5
    assert line_search(losses_of(nan, nan, nan, nan, 3.0)) == 1.0
    assert line_search(losses_of(2.0, 1.0, -inf, 1.5, nan)) == 0.25
    for values in ((nan, nan, nan), (inf, nan, inf)):
        with pytest.raises(NoFiniteLossError, match="Every loss along the path is NaN or infinite"):
            line_search(losses_of(*values))
    assert issubclass(NoFiniteLossError, ValueError)
