import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rebasin import sinkhorn


def random_matrix(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_masses(*shape, seed=0):
    masses = 1 + random_matrix(*shape, seed=seed).abs()
    return masses / masses.sum(-1, keepdim=True)


def unrolled_plan(cost, regularization, iterations, a=None, b=None):
    """As many plain log-domain updates, rows first."""
    n, m = cost.shape
    log_a = torch.zeros(n, dtype=torch.float64) if a is None else a.log()
    log_b = torch.zeros(m, dtype=torch.float64) if b is None else b.log()
    g = torch.zeros(m, dtype=torch.float64)
    for _ in range(iterations):
        f = log_a - (g - cost / regularization).logsumexp(-1)
        g = log_b - (f[:, None] - cost / regularization).logsumexp(-2)
    return (f[:, None] + g - cost / regularization).exp()


def pot_plan(cost, regularization):
    """POT's plan for even masses of one in total, warm-started from higher temperatures: at 1e-3 a million updates from zero are too few."""
    mass, start, before = np.full(len(cost), 1 / len(cost)), None, None
    for level in np.geomspace(max(1.0, regularization), regularization, 13):
        start = None if start is None else tuple(potential * before / level for potential in start)
        plan, log = ot.sinkhorn(
            mass,
            mass,
            cost.numpy(),
            level,
            method="sinkhorn_log",
            numItermax=300 if level > 1.01 * regularization else 20_000,
            stopThr=1e-9,
            log=True,
            warn=False,
            warmstart=start,
        )
        start, before = (log["log_u"], log["log_v"]), level
    assert log["err"][-1] < 1e-6
    return plan


@pytest.mark.parametrize("seed", [3, 8])
@pytest.mark.parametrize("regularization", [10.0, 1.0, 0.1, 0.01, 0.001])
def test_plan_equals_pot(regularization, seed):
    """Costs of range 1. With these seeds no plan is a permutation yet."""
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = sinkhorn(cost, regularization=regularization, tolerance=1e-9)
    assert bool(result.converged)
    assert float(result.plan.amax(-1).min()) < 0.8
    np.testing.assert_allclose(result.plan.numpy() / 8, pot_plan(cost, regularization), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(9, 14), (14, 9)])
@pytest.mark.parametrize("regularization", [1.0, 0.05])
def test_rectangular_plan_with_masses_equals_pot(n, m, regularization):
    cost, a, b = random_matrix(n, m), random_masses(n, seed=1), random_masses(m, seed=2)
    expected = ot.sinkhorn(
        a.numpy(), b.numpy(), cost.numpy(), regularization, method="sinkhorn_log", numItermax=200_000, stopThr=1e-11
    )
    result = sinkhorn(cost, a, b, regularization=regularization, tolerance=1e-10)
    np.testing.assert_allclose(result.plan.numpy(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_temperatures_lead_to_the_optimal_assignment(scale, dtype):
    """At 1e-4 on costs of range 1 the plan is the assignment; on costs of range 1e4 its exponents reach 1e8."""
    cost = scale * torch.rand(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = sinkhorn(cost.to(dtype), regularization=1e-4)
    assert result.plan.isfinite().all()
    assert bool(result.converged)
    mass = np.full(40, 1 / 40)
    exact = torch.from_numpy(40 * ot.emd(mass, mass, cost.numpy()))
    torch.testing.assert_close(result.plan.double(), exact, rtol=0, atol=1e-3)
    assert float((result.plan * cost).sum()) <= float((exact * cost).sum()) * (1 + 1e-4)


@pytest.mark.parametrize("regularization", [1.0, 0.05, 0.01])
def test_float32_is_a_float64_solve_to_the_precision_of_the_costs(regularization):
    cost = random_matrix(50, 50, dtype=torch.float32)
    plan = sinkhorn(cost, regularization=regularization, tolerance=1e-6).plan
    exact = sinkhorn(cost.double(), regularization=regularization, tolerance=1e-12).plan
    torch.testing.assert_close(plan.double(), exact, rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    seed=st.integers(0, 1000),
    regularization=st.sampled_from([0.003, 0.05, 0.4, 5.0]),
)
def test_masses_potentials_and_the_account_of_the_result(n, m, seed, regularization):
    cost, a, b = random_matrix(n, m, seed=seed), random_masses(n, seed=seed + 1), random_masses(m, seed=seed + 2)
    result = sinkhorn(cost, a, b, regularization=regularization, tolerance=1e-8)
    assert (result.plan >= 0).all()
    torch.testing.assert_close(result.plan.sum(-2), b, rtol=0, atol=1e-12)
    error = (result.plan.sum(-1) - a).abs().max() / a.mean()
    assert float(result.marginal_error) == pytest.approx(float(error), abs=1e-10)
    assert bool(result.converged) == (float(result.marginal_error) <= 1e-8)
    assert bool(result.converged)
    f, g = result.potentials
    rebuilt = ((f[:, None] + g - cost) / regularization).exp()
    torch.testing.assert_close(rebuilt, result.plan, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), factor=st.floats(0.1, 10))
def test_plan_does_not_change_with_unit_shift_or_order(seed, shift, factor):
    cost = random_matrix(6, 6, seed=seed)
    solve = lambda cost, regularization: sinkhorn(cost, regularization=regularization, tolerance=1e-11).plan  # noqa: E731
    plan = solve(cost, 0.3)
    torch.testing.assert_close(solve(factor * cost + shift, 0.3 * factor), plan, rtol=0, atol=1e-8)
    p = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(solve(cost[p], 0.3), plan[p], rtol=0, atol=1e-8)
    torch.testing.assert_close(solve(cost.mT, 0.3), plan.mT, rtol=0, atol=1e-8)


@pytest.mark.parametrize("regularization", [1.0, 0.02])
@pytest.mark.parametrize("iterations", [1, 2, 7, 60])
def test_all_iterations_are_run_and_are_plain_ones(regularization, iterations):
    """0.02 is beyond what scaling vectors alone could do."""
    cost, a, b = random_matrix(16, 11), random_masses(16, seed=1), random_masses(11, seed=2)
    result = sinkhorn(cost, a, b, regularization=regularization, max_iterations=iterations, tolerance=0)
    assert result.iterations == iterations
    torch.testing.assert_close(result.plan, unrolled_plan(cost, regularization, iterations, a, b))


def test_early_stop():
    cost = random_matrix(16, 16)
    few = sinkhorn(cost, regularization=0.02, max_iterations=3)
    assert few.iterations == 3
    assert not bool(few.converged)
    loose, tight = (sinkhorn(cost, tolerance=tolerance).iterations for tolerance in (1e-2, 1e-10))
    assert loose < tight < 40


def test_newton_steps_end_what_plain_updates_do_not():
    """Two groups of neurons with a weak link: the plain error falls as one over the updates."""
    cost = random_matrix(12, 12)
    plain = sinkhorn(cost, regularization=0.02, max_iterations=5000, tolerance=0)
    result = sinkhorn(cost, regularization=0.02, tolerance=1e-10)
    assert plain.marginal_error > 1e-5
    assert bool(result.converged)
    assert result.iterations < 200


def test_warm_start():
    cost = random_matrix(30, 30)
    cold = sinkhorn(cost, regularization=0.2, tolerance=1e-9)
    again = sinkhorn(cost, regularization=0.2, tolerance=1e-9, warm_start=cold.potentials)
    assert again.iterations <= 5 < cold.iterations
    torch.testing.assert_close(again.plan, cold.plan)
    near = sinkhorn(cost, regularization=0.02, warm_start=sinkhorn(cost, regularization=0.021).potentials)
    torch.testing.assert_close(near.plan, sinkhorn(cost, regularization=0.02, tolerance=1e-9).plan, rtol=0, atol=1e-4)
    bad = (torch.full((30,), torch.inf), 1e6 * torch.arange(30.0))  # those of the rows are not used
    torch.testing.assert_close(sinkhorn(cost, regularization=0.2, tolerance=1e-9, warm_start=bad).plan, cold.plan)


def hard_problem(kind, n, seed):
    """Costs near a permutation, in blocks, of points or random, with random masses."""
    generator, i = torch.Generator().manual_seed(seed), torch.arange(n)
    noise = torch.rand(n, n, generator=generator, dtype=torch.float64)
    if kind == "permutation":
        cost = 0.1 * noise - torch.eye(n)[torch.randperm(n, generator=generator)]
    elif kind == "blocks":
        cost = 0.1 * noise + ((i[:, None] * 3 // n) != (i * 3 // n)).double()
    elif kind == "points":
        cost = torch.cdist(*torch.rand(2, n, 2, generator=generator, dtype=torch.float64)) ** 2
    else:
        cost = noise
    a, b = 0.05 + torch.rand(2, n, generator=generator, dtype=torch.float64)
    return cost, a / a.sum(), b / b.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["permutation", "blocks", "points", "random"])
def test_plans_at_low_temperatures_cost_what_the_exact_plan_costs(kind, dtype):
    """Against POT's network simplex: an entropic plan costs at most the entropy, n log n times the regularization, more."""
    for n, seed in ((24, 0), (24, 1), (46, 2)):
        cost, a, b = hard_problem(kind, n, seed)
        exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
        for regularization in (1e-3, 1e-4, 1e-5, 1e-6):
            result = sinkhorn(cost.to(dtype), a.to(dtype), b.to(dtype), regularization=regularization)
            assert result.plan.isfinite().all()
            assert bool(result.converged)
            gap = float((result.plan.double() * cost).sum()) - exact
            assert -1e-5 < gap < 2 * regularization * np.log(n) + 1e-5


def test_plans_of_nan_are_never_called_converged(monkeypatch):
    """Should a solve break down, the result says so."""
    monkeypatch.setattr(
        "lit_rebasin.transport.scaling.newton_step", lambda problem, phi, psi: (torch.full_like(psi, torch.nan), 1.0)
    )
    result = sinkhorn(random_matrix(12, 12), regularization=0.02, max_iterations=100)
    assert result.plan.isnan().any()
    assert not bool(result.converged)


@pytest.mark.parametrize("regularization", [1.0, 0.2])
def test_a_loose_tolerance_takes_no_longer(regularization):
    logits = random_matrix(64, 64, dtype=torch.float32)
    loose, tight = (
        sinkhorn(logits=logits, regularization=regularization, tolerance=tolerance).iterations
        for tolerance in (1e-2, 1e-6)
    )
    assert loose <= tight


def test_a_sharp_plan_is_exact_off_the_permutation():
    """All errors of rows are below the tolerance from the start, where next to nothing of a row is off its entry."""
    logits = 16 * torch.eye(64, dtype=torch.float64) + random_matrix(64, 64)
    plan = sinkhorn(logits=logits).plan
    exact = sinkhorn(logits=logits, tolerance=1e-14, max_iterations=5000).plan
    assert float(plan.diagonal().min()) > 0.999
    torch.testing.assert_close(plan, exact, rtol=1e-5, atol=0)


def test_masses_over_many_decades():
    a = torch.logspace(-25, 0, 8, dtype=torch.float64)
    b = a.flip(0)
    for dtype in (torch.float32, torch.float64):
        result = sinkhorn(random_matrix(8, 8, dtype=dtype), a.to(dtype), b.to(dtype), tolerance=1e-6)
        torch.testing.assert_close(result.plan.sum(-2), b.to(dtype), rtol=1e-4, atol=0)
        torch.testing.assert_close(result.plan.sum(-1), a.to(dtype), rtol=0, atol=1e-6)


def test_totals_that_differ_by_rounding_are_brought_together():
    a = torch.ones(5, dtype=torch.float64)
    result = sinkhorn(random_matrix(5, 5), a, (1 + 5e-5) * a, tolerance=1e-12)
    assert bool(result.converged)
    torch.testing.assert_close(result.plan.sum(-2), a, rtol=0, atol=1e-11)


def test_a_batch_of_no_problems():
    cost = torch.zeros(0, 3, 4, requires_grad=True)
    result = sinkhorn(cost, torch.ones(3))
    assert result.plan.shape == (0, 3, 4)
    assert result.potentials[1].shape == (0, 4)
    assert result.converged.shape == (0,)
    result.plan.sum().backward()
    assert cost.grad.shape == (0, 3, 4)


@pytest.mark.parametrize("regularization", [1.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neurons_without_mass_get_none(regularization, dtype):
    cost = random_matrix(2, 6, 7, dtype=dtype)
    a, b = random_masses(2, 6, seed=1).to(dtype), random_masses(2, 7, seed=2).to(dtype)
    a[0, 2] = b[0, 0] = b[0, 5] = 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    result = sinkhorn(cost, a, b, regularization=regularization)
    assert result.converged.all()
    plan = result.plan
    assert (plan[0, 2] == 0).all()
    assert (plan[0][:, [0, 5]] == 0).all()
    assert result.potentials[0][0, 2] == -torch.inf
    rows, columns = [0, 1, 3, 4, 5], [1, 2, 3, 4, 6]
    alone = sinkhorn(cost[0][rows][:, columns], a[0, rows], b[0, columns], regularization=regularization).plan
    torch.testing.assert_close(plan[0][rows][:, columns], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [5, 100])
def test_batch_equals_one_by_one(size):
    """Small matrices are multiplied at once, large ones one by one."""
    cost = random_matrix(2, 3, size, size + 1)
    a = random_masses(3, size, seed=1)
    temperatures = torch.tensor([[0.05, 0.3, 1.0]], dtype=torch.float64).expand(2, 3)
    together = sinkhorn(cost, a, regularization=temperatures, tolerance=1e-10)
    assert together.converged.shape == together.marginal_error.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn(cost[i, j], a[j], regularization=float(temperatures[i, j]), tolerance=1e-10)
            torch.testing.assert_close(together.plan[i, j], alone.plan, rtol=0, atol=1e-9)


def test_each_problem_of_a_batch_has_its_own_account():
    easy, hard = torch.zeros(5, 5), 40 * random_matrix(5, 5, dtype=torch.float32)
    result = sinkhorn(torch.stack([easy, hard]), max_iterations=3)
    assert result.converged.tolist() == [True, False]
    assert result.marginal_error[0] <= 1e-5 < result.marginal_error[1]


def test_masses_that_are_not_given():
    cost = random_matrix(4, 6)
    torch.testing.assert_close(sinkhorn(cost).plan.sum(-2), torch.full((6,), 4 / 6, dtype=torch.float64))
    a, b = random_masses(4), random_masses(6)
    torch.testing.assert_close(sinkhorn(cost, a).plan.sum(-2), torch.full((6,), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(sinkhorn(cost, b=b).plan.sum(-1), torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(sinkhorn(cost[:, :4]).plan.sum(-2), torch.ones(4, dtype=torch.float64))


def test_logits_are_the_negative_of_costs():
    cost = random_matrix(8, 8)
    for one, other in zip(sinkhorn(cost).potentials, sinkhorn(logits=-cost).potentials, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(sinkhorn(cost).plan, sinkhorn(logits=-cost).plan)
    torch.testing.assert_close(
        sinkhorn(cost, regularization=0.02).plan, sinkhorn(logits=-cost, regularization=0.02).plan
    )


def test_input_is_left_alone():
    for dtype in (torch.float32, torch.float64):
        for regularization in (1.0, 0.001):
            cost, a = random_matrix(6, 6, dtype=dtype), random_masses(6).to(dtype)
            copies = cost.clone(), a.clone()
            result = sinkhorn(cost, a, regularization=regularization)
            sinkhorn(cost, a, regularization=regularization, warm_start=result.potentials)
            assert torch.equal(cost, copies[0])
            assert torch.equal(a, copies[1])


def test_half_precision_is_solved_in_float32():
    logits = random_matrix(8, 8).bfloat16()
    result = sinkhorn(logits=logits)
    assert result.plan.dtype == torch.bfloat16
    assert result.potentials[0].dtype == torch.float32
    torch.testing.assert_close(result.plan.double(), sinkhorn(logits=logits.double()).plan, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"cost": torch.zeros(3)}, r"cost must have shape \(\.\.\., n, m\)"),
        ({"cost": torch.zeros(3, 0)}, "cost must have shape"),
        ({"logits": torch.zeros(0, 3)}, "logits must have shape"),
        ({"cost": torch.zeros(3, 3, dtype=torch.long)}, "cost must hold floating point"),
        ({}, "either cost or logits"),
        ({"cost": torch.zeros(3, 3), "logits": torch.zeros(3, 3)}, "either cost or logits"),
        ({"cost": torch.full((3, 3), torch.nan)}, "cost holds a NaN or an infinity"),
        ({"logits": torch.tensor([[0.0, torch.inf], [0.0, 0.0]])}, "logits holds a NaN or an infinity"),
        ({"cost": torch.full((2, 3, 3), -torch.inf)}, "cost holds a NaN or an infinity"),
        ({"cost": torch.zeros(3, 3), "a": torch.tensor([2.0, -1.0, 1.0])}, "a holds a mass that is negative"),
        ({"cost": torch.zeros(3, 3), "b": torch.tensor([torch.nan, 1.0, 1.0])}, "a holds|b holds"),
        ({"cost": torch.zeros(3, 3), "a": torch.zeros(3)}, "a has no mass"),
        ({"cost": torch.zeros(3, 3), "a": torch.ones(3), "b": 2 * torch.ones(3)}, "same total mass, got 3 and 6"),
        ({"cost": torch.zeros(3, 3), "a": torch.ones(4)}, "a must hold one mass for each of the 3 rows"),
        ({"cost": torch.zeros(3, 2), "b": torch.ones(3)}, "b must hold one mass for each of the 2 columns"),
        ({"cost": torch.zeros(2, 3, 3), "a": torch.ones(5, 3)}, "do not broadcast: cost"),
        ({"cost": torch.zeros(2, 3, 3), "regularization": torch.ones(5)}, "do not broadcast"),
        ({"cost": torch.zeros(3, 3), "regularization": 0.0}, "regularization must be above 0"),
        ({"cost": torch.zeros(3, 3), "regularization": -1.0}, "regularization must be above 0"),
        ({"cost": torch.zeros(2, 3, 3), "regularization": torch.tensor([1.0, torch.nan])}, "regularization"),
        ({"cost": torch.zeros(3, 3), "regularization": torch.inf}, "regularization"),
        ({"cost": torch.zeros(3, 3), "max_iterations": 0}, "max_iterations"),
        ({"cost": torch.zeros(3, 3), "tolerance": -1.0}, "tolerance"),
        ({"cost": torch.zeros(3, 3), "tolerance": torch.nan}, "tolerance"),
        ({"cost": torch.zeros(3, 3), "warm_start": (torch.zeros(3), torch.zeros(2))}, "warm_start must be of shapes"),
        ({"cost": torch.zeros(3, 3), "warm_start": torch.zeros(2, 3)}, "warm_start must be a pair"),
        ({"cost": torch.zeros(3, 3), "warm_start": (torch.zeros(3), torch.full((3,), torch.nan))}, "warm_start holds"),
        ({"cost": torch.eye(3), "warm_start": (torch.zeros(3), torch.full((3,), torch.inf))}, "warm_start holds"),
        ({"cost": np.zeros((3, 3))}, "cost must be a tensor, got ndarray"),
        ({"cost": torch.zeros(3, 3), "a": 0.1}, "a must be a tensor, got float"),
        ({"cost": torch.zeros(3, 3), "regularization": None}, "regularization must be a number"),
        ({"cost": torch.eye(3).double(), "regularization": 1e-320}, "regularization is too small"),
        ({"cost": torch.zeros(3, 3), "max_iterations": 5.5}, "max_iterations must be a whole number"),
        ({"cost": torch.zeros(3, 3), "tolerance": None}, "tolerance"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        sinkhorn(**arguments)
