import dataclasses

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from lit_rebasin.transport import Schedule, annealed_sinkhorn, round_to_polytope, sinkhorn

DOUBLE, NAN = torch.float64, float("nan")
GOOD = torch.eye(3)


def draws(seed):
    return torch.Generator().manual_seed(seed)


def random_cost(n=75, seed=0, m=None):
    return torch.rand(n, m or n, generator=draws(seed), dtype=DOUBLE)


def geometric_cost(n=300, seed=0):
    """Squared distances of uniform points in the unit square, of range 1."""
    points = torch.rand(2, n, 2, generator=draws(seed), dtype=DOUBLE)
    cost = torch.cdist(*points).square()
    return (cost - cost.min()) / (cost.max() - cost.min())


def masses(n, seed, zeros=0):
    mass = torch.rand(n, generator=draws(seed), dtype=DOUBLE) + 0.1
    mass[:zeros] = 0
    return mass / mass.sum()


def written_out(cost, a, b, steps, beta_0=10.0, kappa=2 / 3, debiased=True):
    """The formulas, in logarithms relative to the masses, one problem in float64; also how far each row sum is off."""
    cost, a, b = cost.numpy(), a.numpy(), b.numpy()
    betas = [beta_0 * t**kappa / (cost.max() - cost.min()) for t in range(1, steps + 2)]
    u, v = np.zeros(len(a)), np.zeros(len(b))
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(a), np.log(b)
    for t in range(steps):
        theta = (betas[t] - betas[t - 1]) / betas[t] if debiased and t > 0 else 0.0
        u = theta * u - logsumexp(log_q + v - betas[t] * cost, axis=1)
        v = -logsumexp((log_p + u)[:, None] - betas[t + 1] * cost, axis=0)
    plan = np.exp((log_p + u)[:, None] + log_q + v - betas[steps] * cost)
    return plan, abs(plan.sum(1) - a).max() / a.mean()


def gap(cost, **options):
    """The transport gap of the rounded plan, for even masses of total 1."""
    a, b = (torch.full((size,), 1 / size, dtype=DOUBLE) for size in cost.shape)
    plan = round_to_polytope(annealed_sinkhorn(cost, a, b, **options).plan, a, b)
    return float((plan * cost).sum()) - ot.emd2(a.numpy(), b.numpy(), cost.numpy())


def test_schedule():
    schedule = Schedule(beta_0=4.0, kappa=0.5)
    assert [schedule.beta(t) for t in (0, 3, 8)] == [4.0, 8.0, 12.0]
    assert schedule.regularization(3) == 0.125
    assert Schedule() == Schedule(10.0, 2 / 3)
    assert Schedule().beta(999) == pytest.approx(1000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.kappa = 1.0


@pytest.mark.parametrize("name", ["beta_0", "kappa"])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, float("inf")])
def test_schedule_errors(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number above 0 and finite"):
        Schedule(**{name: value})


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 8),
    m=st.integers(2, 8),
    zeros=st.integers(0, 1),
    steps=st.sampled_from([1, 2, 3, 50]),
    beta_0=st.sampled_from([1.0, 10.0, 300.0]),
    kappa=st.sampled_from([0.5, 2 / 3, 1.0]),
    debiased=st.booleans(),
)
def test_equals_the_formulas(seed, n, m, zeros, steps, beta_0, kappa, debiased):
    cost, a, b = 3 * random_cost(n, seed, m) - 1, masses(n, seed + 1, zeros), masses(m, seed + 2, zeros)
    schedule = Schedule(beta_0, kappa)
    expected, error = written_out(cost, a, b, steps, beta_0, kappa, debiased)
    found = annealed_sinkhorn(cost, a, b, steps=steps, schedule=schedule, debiased=debiased)
    np.testing.assert_allclose(found.plan.numpy(), expected, rtol=1e-8, atol=1e-14)
    assert float(found.marginal_error) == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert found.iterations == steps
    gains = annealed_sinkhorn(logits=-cost, a=a, b=b, steps=steps, schedule=schedule, debiased=debiased)
    torch.testing.assert_close(gains.plan, found.plan, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gains.potentials, found.potentials, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("debiased", "kappa"), [(True, 2 / 3), (False, 1 / 2)])
def test_defaults_are_unit_masses_and_the_best_exponent(debiased, kappa):
    cost, ones = random_cost(6), torch.ones(6, dtype=DOUBLE)
    expected, _ = written_out(cost, ones, ones, 200, kappa=kappa, debiased=debiased)
    np.testing.assert_allclose(annealed_sinkhorn(cost, debiased=debiased).plan.numpy(), expected, rtol=1e-8, atol=1e-14)
    wide = annealed_sinkhorn(random_cost(4, m=8)).plan
    torch.testing.assert_close(wide.sum(0), torch.full((8,), 0.5, dtype=DOUBLE))


@pytest.mark.parametrize("debiased", [True, False])
def test_batch_is_one_by_one_each_in_units_of_its_range(debiased):
    cost = torch.stack([scale * random_cost(6, seed, 5) for seed, scale in enumerate((1, 100, 0.01))]).expand(
        2, 3, 6, 5
    )
    a, b = torch.stack([masses(6, 1), masses(6, 2, 1)])[:, None], masses(5, 3)
    together = annealed_sinkhorn(cost, a, b, steps=40, debiased=debiased)
    assert together.marginal_error.shape == together.converged.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = annealed_sinkhorn(cost[i, j], a[i, 0], b, steps=40, debiased=debiased)
            torch.testing.assert_close(together.plan[i, j], alone.plan, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(together.potentials[0][i, j], alone.potentials[0])
            torch.testing.assert_close(together.marginal_error[i, j], alone.marginal_error)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e4), shift=st.floats(-10, 10), debiased=st.booleans())
def test_scale_and_shift_of_the_cost_change_nothing(seed, scale, shift, debiased):
    cost = random_cost(7, seed)
    base = annealed_sinkhorn(cost, steps=30, debiased=debiased).plan
    moved = annealed_sinkhorn(scale * (cost + shift), steps=30, debiased=debiased).plan
    torch.testing.assert_close(moved, base, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("debiased", [True, False])
def test_ends_at_the_last_temperature(debiased):
    cost, a, b, schedule = 10 * random_cost(6, m=5) + 3, masses(6, 1), masses(5, 2), Schedule(5.0, 0.8)
    result = annealed_sinkhorn(cost, a, b, steps=20, schedule=schedule, debiased=debiased)
    regularization = float(cost.max() - cost.min()) / (5 * 21**0.8)
    f, g = result.potentials
    torch.testing.assert_close(result.plan, ((f[:, None] + g - cost) / regularization).exp())
    torch.testing.assert_close(result.plan.sum(0), b)


def test_one_cost_for_all_is_the_even_plan():
    for result in (annealed_sinkhorn(torch.full((4, 4), 7.0)), annealed_sinkhorn(torch.zeros(4, 4), debiased=False)):
        torch.testing.assert_close(result.plan, torch.full((4, 4), 0.25))
        assert result.converged
    assert not annealed_sinkhorn(random_cost(20), steps=20).converged
    assert annealed_sinkhorn(torch.ones(1, 1)).plan.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_gap_of_random_costs(seed):
    cost = random_cost(seed=seed)
    debiased = gap(cost, steps=1000)
    assert 0 < debiased <= 3e-4
    assert debiased < gap(cost, steps=1000, debiased=False) / 2


def test_gap_of_geometric_costs():
    cost = geometric_cost()
    debiased = gap(cost, steps=1000)
    assert 0 < debiased <= 9e-4
    assert debiased < gap(cost, steps=1000, debiased=False) / 2


@pytest.mark.parametrize(("debiased", "low", "high"), [(False, -0.56, -0.44), (True, -0.79, -0.61)])
def test_gap_falls_with_the_steps_at_the_known_rate(debiased, low, high):
    """As long as there is more noise than distance between neighbours; below, it falls faster (-0.83 debiased of 150 points to T = 1000)."""
    steps = (20, 60, 200)
    gaps = [np.mean([gap(geometric_cost(seed=s), steps=t, debiased=debiased) for s in range(3)]) for t in steps]
    assert low < np.polyfit(np.log(steps), np.log(gaps), 1)[0] < high


@pytest.mark.parametrize("debiased", [True, False])
def test_gradient_is_that_of_the_solution_for_the_masses_reached(debiased):
    """Of cost and masses, against the converged solve at the same temperature, which is not differentiated."""
    upstream = random_cost(6, 7, 5)
    inputs = random_cost(6, 3, 5), masses(6, 1), masses(5, 2)
    first, second = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    result = annealed_sinkhorn(*first, steps=15, debiased=debiased)
    assert result.marginal_error > 1e-3
    cost, a, b = second
    reached = a + (result.plan.detach().sum(1) - a.detach())
    temperature = float(inputs[0].max() - inputs[0].min()) / Schedule(kappa=2 / 3 if debiased else 0.5).beta(15)
    solved = sinkhorn(cost, reached, b, regularization=temperature, tolerance=1e-12)
    torch.testing.assert_close(solved.plan, result.plan, rtol=1e-8, atol=1e-11)
    gradients = (torch.autograd.grad((r.plan * upstream).sum(), i) for r, i in ((result, first), (solved, second)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_func_transforms_and_compile():
    cost, upstream = torch.stack([random_cost(5, seed) for seed in range(3)]), random_cost(5, 9)
    score = lambda c: (annealed_sinkhorn(c, steps=10).plan * upstream).sum()  # noqa: E731
    leaf = cost[0].clone().requires_grad_()
    value = score(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(torch.func.grad(score)(cost[0]), gradient)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(score, backend=backend, fullgraph=True)(leaf)
        torch.testing.assert_close(compiled, value)
        torch.testing.assert_close(torch.autograd.grad(compiled, leaf)[0], gradient)


def test_vmap():
    cost = torch.stack([random_cost(5, seed) for seed in range(3)])
    mapped = torch.func.vmap(lambda c: annealed_sinkhorn(c, steps=10).plan)(cost)
    torch.testing.assert_close(mapped, annealed_sinkhorn(cost, steps=10).plan)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)])
def test_lower_precision(dtype, tolerance):
    cost = random_cost(8).to(dtype).requires_grad_()
    result, exact = annealed_sinkhorn(cost), annealed_sinkhorn(cost.detach().double()).plan
    assert result.plan.dtype == dtype
    torch.testing.assert_close(result.plan.detach().double(), exact, rtol=tolerance, atol=tolerance)
    result.plan[0, 0].backward()
    assert cost.grad.dtype == dtype
    assert cost.grad.isfinite().all()


@pytest.mark.parametrize("debiased", [True, False])
def test_rows_and_columns_without_mass_might_as_well_be_absent(debiased):
    cost, a, b = random_cost(6, m=5), masses(6, 1, 2), masses(5, 2, 1)
    cost[:2], cost[:, 0] = cost[3, 3], cost[4, 4]  # the range stays that of the others
    cost.requires_grad_()
    result = annealed_sinkhorn(cost, a, b, steps=30, debiased=debiased)
    part = annealed_sinkhorn(cost[2:, 1:], a[2:], b[1:], steps=30, debiased=debiased)
    torch.testing.assert_close(result.plan[2:, 1:], part.plan)
    assert result.plan[:2].sum() == result.plan[:, 0].sum() == 0
    (gradient,) = torch.autograd.grad(result.plan[3, 3], cost)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"cost": GOOD, "steps": 0}, "steps must be a whole number"),
        ({}, "either cost or logits"),
        ({"cost": GOOD, "logits": GOOD}, "either cost or logits"),
        ({"cost": GOOD[0]}, "cost must have shape"),
        ({"logits": torch.zeros(3, 0)}, "logits must have shape"),
        ({"cost": GOOD.long()}, "cost must hold floating point"),
        ({"cost": GOOD * NAN}, "cost holds a NaN or an infinity"),
        ({"cost": GOOD / 0}, "cost holds a NaN or an infinity"),
        ({"logits": -1 / GOOD}, "logits holds a NaN or an infinity"),
        ({"cost": GOOD, "a": torch.ones(2)}, "a must hold one mass"),
        ({"cost": GOOD, "a": torch.tensor([2.0, 2.0, -1.0])}, "a holds a mass that is negative"),
        ({"cost": GOOD, "a": torch.zeros(3), "b": torch.zeros(3)}, "a has no mass"),
        ({"cost": GOOD, "a": torch.ones(3), "b": 2 * torch.ones(3)}, "same total mass"),
        ({"cost": GOOD.expand(2, 3, 3), "a": torch.ones(4, 3)}, "do not broadcast"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        annealed_sinkhorn(**arguments)
