import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rebasin.transport.barycenter import doubly_regularized_barycenter

DOUBLE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clouds(count=3, size=8, seed=0, dtype=DOUBLE):
    return [torch.rand(size, 2, generator=generator(seed + k), dtype=dtype) for k in range(count)]


def line(n=161, half_width=6.0):
    return torch.linspace(-half_width, half_width, n, dtype=DOUBLE)[:, None]


def gaussian(points, mean, variance):
    mass = (-(points - mean).square().sum(-1) / (2 * variance)).exp()
    return mass / mass.sum()


def closed_form_variance(weights, variances, inner, outer):
    """Of isotropic Gaussians: the entropic plan from variance S to s has covariance c with c^2 + inner c = S s; S (1 - sum w c / S) = outer."""
    low, high = 0.0, 100.0
    for _ in range(100):
        s = (low + high) / 2
        moved = sum(w * (math.sqrt(inner**2 + 4 * s * v) - inner) / 2 for w, v in zip(weights, variances, strict=True))
        low, high = (s, high) if outer + moved > s else (low, s)
    return low


def moments(result):
    mean = result.mass @ result.support
    return mean, result.mass @ (result.support - mean).square()


def mixed_measures():
    """Point clouds of several sizes, one of even mass, one with a point of no mass."""
    a, b, c = clouds()
    return [a, (b[:5], torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0])), (c[:6], torch.arange(1, 7))]


def objective(mass, support, measures, weights, inner, outer):
    """The objective at a mass, its transport solved by POT in float64."""
    mu = mass.numpy() / mass.numpy().sum()
    total = outer * float((mu * np.log(mu * len(mu))).sum())
    for w, (points, nu) in zip(weights, measures, strict=True):
        cost = ot.dist(support.numpy(), points.numpy()) / 2
        plan = ot.bregman.sinkhorn_log(mu, nu.numpy(), cost, inner, numItermax=20_000, stopThr=1e-13)
        divergence = float((plan * np.log(np.maximum(plan, 1e-300) / np.outer(mu, nu.numpy()))).sum())
        total += w * (float((plan * cost).sum()) + inner * divergence)
    return total


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("inner", "variances"), [(0.2, (0.5, 0.5)), (0.05, (0.25, 0.8))])
def test_gaussians_equal_the_closed_form(inner, variances, ratio):
    x, weights = line(201, 8.0), (0.4, 0.6)
    measures = [(x, gaussian(x, m, v)) for m, v in zip((-1.0, 0.5), variances, strict=True)]
    result = doubly_regularized_barycenter(measures, weights, inner, ratio * inner, support=x, tolerance=1e-10)
    expected = closed_form_variance(weights, variances, inner, ratio * inner)
    mean, variance = moments(result)
    assert result.converged
    assert float((result.mass - gaussian(x, -0.1, expected)).abs().sum()) < 1e-8
    assert float(mean) == pytest.approx(-0.1, abs=1e-8)
    assert float(variance) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("ratio", "low", "high"), [(None, 1.9, 2.1), (1.0, 0.9, 1.1)])
def test_debiased_error_falls_as_the_square_of_the_regularization(ratio, low, high):
    x = line()
    measures = [(x, gaussian(x, m, 1.0)) for m in (-0.5, 0.5)]
    strengths, errors = [0.4, 0.2, 0.1, 0.05], []
    for inner in strengths:
        outer = None if ratio is None else ratio * inner
        result = doubly_regularized_barycenter(measures, inner=inner, outer=outer, support=x, tolerance=1e-8)
        errors.append(float(moments(result)[1]) - 1.0)  # the barycenter without regularization has variance one
    slope = np.polyfit(np.log(strengths), np.log(errors), 1)[0]
    assert low < slope < high


def test_debiasing_also_helps_densities_that_are_not_gaussian():
    """In one dimension the barycenter without regularization has the mean of the quantile functions."""
    x = line(201, 1.5)
    masses = [torch.cos(2 * x[:, 0] + shift).square() * gaussian(x, shift / 2, 0.1) for shift in (-1.0, 0.3)]
    masses = [mass / mass.sum() for mass in masses]
    levels = np.linspace(0, 1, 4001)[1:-1]
    quantiles = lambda mass: np.interp(levels, np.cumsum(mass.numpy()) - mass.numpy() / 2, x[:, 0].numpy())  # noqa: E731
    exact = (quantiles(masses[0]) + quantiles(masses[1])) / 2
    errors = {}
    for ratio in (0.5, 1.0):
        result = doubly_regularized_barycenter([(x, mass) for mass in masses], None, 0.01, 0.01 * ratio, support=x)
        errors[ratio] = np.abs(quantiles(result.mass) - exact).mean()
    assert errors[0.5] < errors[1.0] / 2


@pytest.mark.parametrize("inner", [0.01, 0.1])
def test_equal_strengths_are_the_classical_entropic_barycenter(inner):
    """POT penalises the entropy of the plan; against mu x nu that is less by the entropy of mu, which the outer term gives back."""
    x = line(60, 0.5)
    masses = torch.stack([torch.rand(60, generator=generator(k), dtype=DOUBLE) ** 4 for k in range(3)])
    masses /= masses.sum(1, keepdim=True)
    weights = [0.2, 0.3, 0.5]
    result = doubly_regularized_barycenter([(x, m) for m in masses], weights, inner, inner, support=x, tolerance=1e-12)
    cost = ot.dist(x.numpy(), x.numpy()) / 2
    # Not method="sinkhorn": it starts as if the weights were even, which its iterations keep as a bias.
    expected = ot.bregman.barycenter(
        masses.T.numpy(), cost, inner, np.array(weights), method="sinkhorn_log", numItermax=10_000, stopThr=1e-13
    )
    np.testing.assert_allclose(result.mass.numpy(), expected / expected.sum(), atol=1e-9)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0])
def test_no_perturbed_mass_has_a_smaller_objective(ratio):
    inner, weights = 0.05, (0.5, 0.2, 0.3)
    support = torch.rand(12, 2, generator=generator(9), dtype=DOUBLE)
    masses = [torch.rand(7, generator=generator(20 + k), dtype=DOUBLE) for k in range(3)]
    measures = [(points, m / m.sum()) for points, m in zip(clouds(size=7), masses, strict=True)]
    result = doubly_regularized_barycenter(measures, weights, inner, ratio * inner, support=support, tolerance=1e-10)
    value = lambda mass: objective(mass, support, measures, weights, inner, ratio * inner)  # noqa: E731
    best = value(result.mass)
    for k in range(6):
        direction = torch.randn(12, generator=generator(k), dtype=DOUBLE)
        # The objective is strictly convex: were the mass off by some 1e-3, one of each pair would be below.
        for size in (-0.1, -0.003, 0.003, 0.1):
            assert value(result.mass * (size * direction).exp()) > best + 1e-10


@pytest.mark.parametrize("given_support", [True, False])
def test_plans_say_where_the_mass_goes(given_support):
    measures = mixed_measures()
    support = clouds(1, 10, seed=5)[0] if given_support else None
    result = doubly_regularized_barycenter(measures, [1, 1, 2], 0.05, support=support, tolerance=1e-9, steps=5)
    n = 10 if given_support else 200
    assert result.support.shape == (n, 2)
    assert result.converged
    assert float(result.mass.sum()) == pytest.approx(1)
    targets = [torch.full((8,), 1 / 8), torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0]) / 7, torch.arange(1, 7) / 21]
    for plan, target in zip(result.plans, targets, strict=True):
        assert plan.shape == (n, len(target))
        torch.testing.assert_close(plan.sum(1), result.mass)
        assert float((plan.sum(0) - target).abs().sum()) < 1e-6
    assert float(result.plans[1][:, 2].sum()) == 0


def test_padding_and_scale_of_mass_and_weights_change_nothing():
    measures, support = mixed_measures(), clouds(1, 10, seed=5)[0]
    solve = lambda m, w: doubly_regularized_barycenter(m, w, 0.05, support=support, tolerance=1e-12).mass  # noqa: E731
    base = solve(measures, [0.25, 0.25, 0.5])
    heavier = [(p, 7 * torch.ones(len(p))) if p is measures[0] else p for p in measures]
    torch.testing.assert_close(solve(heavier, torch.tensor([1, 1, 2])), base)
    points, mass = measures[1]
    without = [measures[0], (points[mass > 0], mass[mass > 0]), measures[2]]
    torch.testing.assert_close(solve(without, [0.25, 0.25, 0.5]), base)
    twice = [*measures[:2], measures[2], measures[2]]
    torch.testing.assert_close(solve(twice, [0.25] * 4), base, atol=1e-9, rtol=1e-7)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    inner=st.floats(0.02, 1),
    ratio=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    shift=st.floats(-100, 100),
)
def test_moves_and_is_reordered_with_its_measures(seed, inner, ratio, shift):
    measures, support = clouds(seed=seed), torch.rand(9, 2, generator=generator(seed + 50), dtype=DOUBLE)
    weights, order = torch.tensor([0.2, 0.3, 0.5]), torch.randperm(3, generator=generator(seed))
    points = torch.randperm(9, generator=generator(seed))
    settings_ = {"inner": inner, "outer": ratio * inner, "tolerance": 1e-10}
    base = doubly_regularized_barycenter(measures, weights, support=support, **settings_)
    moved = doubly_regularized_barycenter([m + shift for m in measures], weights, support=support + shift, **settings_)
    torch.testing.assert_close(moved.mass, base.mass, rtol=1e-6, atol=1e-8)
    reordered = doubly_regularized_barycenter(
        [measures[k].flip(0) for k in order.tolist()], weights[order], support=support[points], **settings_
    )
    torch.testing.assert_close(reordered.mass, base.mass[points], rtol=1e-6, atol=1e-8)
    for k, plan in zip(order.tolist(), reordered.plans, strict=True):
        torch.testing.assert_close(plan, base.plans[k][points].flip(1), rtol=1e-6, atol=1e-8)


def test_particles_equal_the_closed_form():
    axis = torch.linspace(-3.5, 3.5, 13, dtype=DOUBLE)
    z = torch.cartesian_prod(axis, axis)
    means, variances, weights = torch.tensor([[-2.0, 0.0], [1.0, 1.0]], dtype=DOUBLE), (0.5, 1.0), (0.4, 0.6)
    measures = [(z * math.sqrt(v) + m, gaussian(z, 0.0, 1.0)) for m, v in zip(means, variances, strict=True)]
    for ratio in (0.5, 1.0):
        result = doubly_regularized_barycenter(
            measures, weights, 0.5, ratio * 0.5, particles=400, steps=80, tolerance=1e-3, generator=generator(1)
        )
        mean, variance = moments(result)
        # Four standard errors, and the finite step's part of the variance.
        expected = closed_form_variance(weights, variances, 0.5, ratio * 0.5)
        torch.testing.assert_close(mean, means.T @ torch.tensor(weights, dtype=DOUBLE), rtol=0, atol=4 * 0.5 / 20)
        assert float(variance.mean()) == pytest.approx(expected, rel=4 / math.sqrt(800) * 0.7 + 0.02)
        assert result.iterations == 80
        assert result.converged


def test_particles_of_one_point_have_the_outer_variance():
    """All mass at one point: what is left is a random walk drawn back to it, whose law of variance outer / (1 - step / 2) is known."""
    point = torch.tensor([[3.0, -1.0]], dtype=DOUBLE)
    result = doubly_regularized_barycenter([point, point + 2], None, 1.0, 0.3, particles=4000, steps=60)
    mean, variance = moments(result)
    torch.testing.assert_close(mean, point[0] + 1, rtol=0, atol=4 * math.sqrt(0.3 / 4000))
    expected = 0.3 / (1 - 0.1 / 2)
    torch.testing.assert_close(variance, torch.full_like(variance, expected), rtol=4 * math.sqrt(2 / 4000), atol=0)


def test_particles_start_where_there_is_mass():
    only = torch.full((1, 2), 10.0)
    empty = (torch.tensor([[10.0, 10.0], [1e3, 1e3]]), torch.tensor([1.0, 0.0]))
    result = doubly_regularized_barycenter([only, empty], None, 1.0, steps=1, step_size=1e-10)
    torch.testing.assert_close(result.support, only.expand(200, 2), rtol=0, atol=1e-3)


def test_particles_come_from_the_generator_alone():
    solve = lambda g: doubly_regularized_barycenter(clouds(), None, 0.1, steps=3, generator=g).support  # noqa: E731
    before = torch.get_rng_state()
    first, again, other = solve(generator(0)), solve(None), solve(generator(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_regularization_is_finite(dtype):
    axis = torch.linspace(0, 1, 8, dtype=dtype)
    grid, measures = torch.cartesian_prod(axis, axis), [*clouds(2, dtype=dtype), torch.rand(3, 2, dtype=dtype)]
    for support in (grid, None):
        result = doubly_regularized_barycenter(
            measures, None, 1e-3, support=support, steps=3, max_iterations=300, particles=20
        )
        assert result.mass.dtype == result.support.dtype == result.plans[0].dtype == dtype
        for values in (result.mass, result.support, *result.plans):
            assert values.isfinite().all()
        assert math.isfinite(result.error)


def test_float32_equals_float64_and_half_is_solved_in_float32():
    points, support = [c.half() for c in clouds()], torch.rand(10, 2, generator=generator(5)).half()
    half, wide = (
        doubly_regularized_barycenter([p.to(t) for p in points], None, 0.02, support=support.to(t), tolerance=1e-6)
        for t in (torch.float16, DOUBLE)
    )
    assert half.mass.dtype == torch.float32
    assert half.converged
    torch.testing.assert_close(half.mass.double(), wide.mass, rtol=1e-3, atol=1e-6)


def test_float32_keeps_its_digits_far_from_the_origin():
    """On multiples of 1 / 64 a shift by 128 is exact, and so are the differences."""
    a, b, support = (torch.randint(0, 64, (40, 2), generator=generator(k)) / 64 for k in range(3))
    near = doubly_regularized_barycenter([a, b], None, 0.05, support=support)
    far = doubly_regularized_barycenter([a + 128, b + 128], None, 0.05, support=support + 128)
    assert torch.equal(near.mass, far.mass)


def test_early_stop_says_so():
    support = clouds(1, 10, seed=5)[0]
    few = doubly_regularized_barycenter(clouds(), None, 0.01, support=support, max_iterations=3)
    assert few.iterations == 3
    assert not few.converged
    assert few.error > 1e-5
    full = doubly_regularized_barycenter(clouds(), None, 1.0, support=support, max_iterations=40, tolerance=0)
    assert full.iterations == 40
    loose = doubly_regularized_barycenter(clouds(), None, 0.01, support=support, tolerance=1e-2)
    assert loose.converged
    column_errors = [float((plan.sum(0) - 1 / 8).abs().sum()) for plan in loose.plans]
    assert loose.error == pytest.approx(max(column_errors), rel=1e-6)


GOOD, NAN = torch.zeros(3, 2), float("nan")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"measures": []}, "measures is empty"),
        ({"measures": [torch.zeros(0, 2)]}, "points of measure 0 must have the shape"),
        ({"measures": [GOOD, torch.zeros(3)]}, "points of measure 1 must have the shape"),
        ({"measures": [GOOD, torch.zeros(3, 1)]}, "points of measure 1 have 1 dimensions, but"),
        ({"measures": [GOOD, GOOD + NAN]}, "points of measure 1 hold a NaN"),
        ({"measures": [(GOOD, torch.ones(2))]}, "mass of measure 0 must be one number for each of its 3 points"),
        ({"measures": [(GOOD, torch.tensor([1.0, -1.0, 1.0]))]}, "mass of measure 0 must be finite and non-negative"),
        ({"measures": [(GOOD, torch.tensor([1.0, NAN, 1.0]))]}, "mass of measure 0 must be finite"),
        ({"measures": [GOOD, (GOOD, torch.zeros(3))]}, "mass of measure 1 .* with a sum above 0"),
        ({"measures": [GOOD], "support": torch.zeros(3, 1)}, "support have 1 dimensions"),
        ({"measures": [GOOD], "support": GOOD + NAN}, "support hold a NaN"),
        ({"measures": [GOOD], "weights": [0.5, 0.5]}, "weights must be one number for each of the 1 measures"),
        ({"measures": [GOOD, GOOD], "weights": [1.5, -0.5]}, "weights must be finite and non-negative"),
        ({"measures": [GOOD, GOOD], "weights": [0.0, 0.0]}, "weights .* with a sum above 0"),
        ({"measures": [GOOD], "inner": 0.0}, "inner must be above 0"),
        ({"measures": [GOOD], "inner": NAN}, "inner must be above 0"),
        ({"measures": [GOOD], "outer": -1.0}, "outer must be above 0"),
        ({"measures": [GOOD], "outer": float("inf")}, "outer must be above 0"),
        ({"measures": [GOOD], "max_iterations": 0}, "max_iterations"),
        ({"measures": [GOOD], "tolerance": NAN}, "tolerance"),
        ({"measures": [GOOD], "particles": 0}, "particles"),
        ({"measures": [GOOD], "steps": 0}, "steps"),
        ({"measures": [GOOD], "step_size": 1.5}, "step_size"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        doubly_regularized_barycenter(**arguments)


def test_plans_belong_to_the_particles_that_are_returned():
    """Those that solve the transport of the returned support, not of the one before the last step."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    found = doubly_regularized_barycenter([points], inner=0.5, particles=20, steps=3, tolerance=1e-10)
    cost = torch.cdist(found.support, points) ** 2 / 2
    expected = ot.sinkhorn(
        np.full(20, 1 / 20), np.full(7, 1 / 7), cost.numpy(), 0.5, method="sinkhorn_log", stopThr=1e-12
    )
    np.testing.assert_allclose(found.plans[0].numpy(), expected, rtol=0, atol=1e-8)
