import itertools

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lit_rebasin.transport import energy_distance, wasserstein_distance


def cloud(n, d=3, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 9), (1, 4)])
def test_wasserstein_distance_is_that_of_pot(n, m):
    x, y = cloud(n), cloud(m, seed=1, shift=0.5)
    distance, plan = wasserstein_distance(x, y)
    costs = ot.dist(x.numpy(), y.numpy())  # squared Euclidean
    assert distance == pytest.approx(ot.emd2([], [], costs) ** 0.5, rel=1e-9)
    assert plan.sum(0).tolist() == pytest.approx([1 / m] * m)
    assert plan.sum(1).tolist() == pytest.approx([1 / n] * n)
    assert float((plan.numpy() * costs).sum()) == pytest.approx(distance**2, rel=1e-9)


def test_wasserstein_distance_is_the_best_pairing_of_all():
    x, y = cloud(6), cloud(6, seed=1)
    best = min(float((x - y[list(order)]).square().sum(1).mean()) for order in itertools.permutations(range(6)))
    assert wasserstein_distance(x, y)[0] == pytest.approx(best**0.5, rel=1e-9)


def test_on_a_line_both_are_those_of_scipy():
    x, y = cloud(40, d=1), 2 * cloud(25, d=1, seed=1) + 1
    assert energy_distance(x, y) == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]), rel=1e-9)
    sorted_costs = (cloud(40, d=1).sort(0).values - (y := 2 * cloud(40, d=1, seed=1)).sort(0).values).square().mean()
    assert wasserstein_distance(x, y)[0] == pytest.approx(float(sorted_costs) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_energy_distance_is_the_mean_discrepancy_of_its_kernel(exponent):
    x, y = cloud(8).numpy(), cloud(11, seed=1, shift=0.3).numpy()

    def kernel(a, b):
        return -np.array([[np.linalg.norm(p - q) ** exponent for q in b] for p in a])

    squared = kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()
    found = energy_distance(torch.tensor(x), torch.tensor(y), exponent=exponent)
    assert found == pytest.approx(squared**0.5, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.floats(0.1, 1.9))
def test_a_distance_is_symmetric_and_zero_for_the_same_cloud(n, m, seed, exponent):
    x, y = cloud(n, seed=seed), cloud(m, seed=seed + 100)
    there, back = energy_distance(x, y, exponent=exponent), energy_distance(y, x, exponent=exponent)
    assert there == pytest.approx(back)
    assert there > 1e-3
    assert energy_distance(x, x.flip(0), exponent=exponent) == pytest.approx(0, abs=1e-6)
    assert wasserstein_distance(x, x.flip(0))[0] == pytest.approx(0, abs=1e-6)
    assert wasserstein_distance(x, y)[0] == pytest.approx(wasserstein_distance(y, x)[0])


def test_a_shift_moves_every_point():
    x = cloud(30)
    assert wasserstein_distance(x, x + 2)[0] == pytest.approx(2 * 3**0.5)


def test_single_precision_does_not_lose_small_differences():
    x = (cloud(50, d=20) + 1000).float()
    assert wasserstein_distance(x, x)[0] == pytest.approx(0, abs=1e-9)
    assert energy_distance(x, x) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("distance", [wasserstein_distance, energy_distance])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 1), r"x must hold one point a row, \(n, d\), got shape \(3,\)"),
        (torch.zeros(3, 1), torch.zeros(0, 1), r"y must hold one point a row"),
        (torch.zeros(3, 2), torch.zeros(3, 1), "2 and 1 coordinates"),
        (torch.zeros(3, 1), torch.full((2, 1), float("nan")), "y holds NaN"),
        (torch.full((3, 1), -1e200, dtype=torch.double), torch.zeros(2, 1), "x holds coordinates above 1e150"),
    ],
)
def test_points_that_do_not_fit(distance, x, y, message):
    with pytest.raises(ValueError, match=message):
        distance(x, y)


@pytest.mark.parametrize("distance", [wasserstein_distance, energy_distance])
@pytest.mark.parametrize(("x", "kind"), [([[0.0]], "list"), (torch.zeros(2, 1, dtype=torch.cfloat), "torch.complex64")])
def test_what_is_no_tensor_of_real_numbers(distance, x, kind):
    with pytest.raises(TypeError, match=f"x must be a tensor of real numbers, got {kind}"):
        distance(x, torch.zeros(2, 1))


@pytest.mark.parametrize("exponent", ["a", None, [1.0], torch.ones(2)])
def test_an_exponent_that_is_no_number(exponent):
    with pytest.raises(TypeError, match="exponent must be a number, got a "):
        energy_distance(torch.zeros(2, 1), torch.zeros(2, 1), exponent=exponent)


@pytest.mark.parametrize("exponent", [0.0, 2.0, -1.0, float("nan")])
def test_an_exponent_out_of_range(exponent):
    with pytest.raises(ValueError, match="exponent must lie between 0 and 2"):
        energy_distance(torch.zeros(2, 1), torch.zeros(2, 1), exponent=exponent)
