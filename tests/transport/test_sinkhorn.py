import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rebasin import sinkhorn


def random_logits(n, seed=0, dtype=torch.float64, batch=()):
    return torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unrolled_plan(logits, regularization, iterations=2000):
    """The same plan by plain log-domain iterations that autograd can follow."""
    log_plan = logits / regularization
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(-1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(-2, keepdim=True)
    return log_plan.exp()


@pytest.mark.parametrize("regularization", [1.0, 0.3, 0.1])
def test_plan_equals_pot(regularization):
    logits = random_logits(12)
    result = sinkhorn(logits, regularization=regularization, max_iterations=20_000, tolerance=1e-11)
    marginal = np.full(12, 1 / 12)
    expected = 12 * ot.sinkhorn(
        marginal, marginal, -logits.numpy(), regularization, method="sinkhorn_log", numItermax=20_000, stopThr=1e-12
    )
    assert bool(result.converged)
    np.testing.assert_allclose(result.plan.numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("regularization", [1.0, 0.3])
def test_gradient_equals_unrolled(regularization):
    upstream = random_logits(9, seed=1)
    ours, theirs = random_logits(9).requires_grad_(), random_logits(9).requires_grad_()
    (
        sinkhorn(ours, regularization=regularization, max_iterations=5000, tolerance=1e-12).plan * upstream
    ).sum().backward()
    (unrolled_plan(theirs, regularization) * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)


def test_gradcheck_batched():
    logits = random_logits(4, batch=(2,)).requires_grad_()
    solve = lambda x: sinkhorn(x, regularization=0.7, max_iterations=1000, tolerance=1e-13).plan  # noqa: E731
    assert torch.autograd.gradcheck(solve, (logits,))


def test_upstream_gradient_is_not_written_to():
    logits = random_logits(5).requires_grad_()
    plan = sinkhorn(logits).plan
    upstream = torch.ones_like(plan)  # an expanded gradient, as from sum(), would raise if written to
    plan.sum().backward()
    torch.autograd.grad(sinkhorn(logits).plan, logits, upstream)
    assert torch.equal(upstream, torch.ones_like(upstream))


def test_gradient_is_finite_near_a_permutation():
    logits = (60 * torch.eye(32)).requires_grad_()
    (sinkhorn(logits).plan * random_logits(32, dtype=torch.float32)).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() < 1e-2


@pytest.mark.parametrize(("width", "temperature"), [(16, 1.0), (16, 0.3), (16, 0.2), (256, 0.3)])
def test_float32_gradient_of_a_sharp_plan_is_no_noise(width, temperature):
    """The start of an alignment, annealed: the gradient is as small as what the plan has off the permutation."""
    exact = float(np.log(9 * (width - 1))) * torch.eye(width, dtype=torch.float64) + 0.1 * random_logits(width)
    upstream = random_logits(width, seed=1)
    gradients = []
    for logits in (exact, exact.float()):
        logits = logits.clone().requires_grad_()
        plan = sinkhorn(logits, regularization=temperature).plan
        (plan * upstream.to(plan.dtype)).sum().backward()
        assert logits.grad.dtype == logits.dtype
        gradients.append(logits.grad.double())
    assert (gradients[1] - gradients[0]).norm() < 2e-5 * gradients[0].norm()
    assert (gradients[1].sign() == gradients[0].sign()).double().mean() > 0.999


def dense_gradient(plan, upstream):
    """The gradient of Eisenberger et al. (CVPR 2022) as published: both multipliers from the whole system of optimality conditions."""
    rows, columns = plan.sum(1), plan.sum(0)
    weighted = plan * upstream
    system = torch.cat([torch.cat([rows.diag(), plan], 1), torch.cat([plan.T, columns.diag()], 1)])
    right = torch.cat([weighted.sum(1), weighted.sum(0)])[:, None]
    u, v = torch.linalg.lstsq(system, right, driver="gelsd").solution[:, 0].split(len(plan))
    return weighted - plan * (u[:, None] + v[None, :])


@pytest.mark.parametrize("sharpness", [1.0, 5.0, 10.0, 16.0])
def test_float32_gradient_equals_the_published_formula_in_float64(sharpness):
    p = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    logits = (sharpness * torch.eye(24)[p] + random_logits(24, dtype=torch.float32)).requires_grad_()
    upstream = random_logits(24, seed=1)
    plan = sinkhorn(logits).plan
    (plan * upstream.float()).sum().backward()
    expected = dense_gradient(plan.detach().double(), upstream)
    assert (logits.grad - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("even", [0.0, 1.0])
def test_gradient_where_the_plan_falls_apart_into_blocks(even):
    """No flow between the blocks: the multipliers of one are free against those of the other."""
    logits = torch.full((6, 6), -300.0, dtype=torch.float64)
    logits[:4, :4], logits[4:, 4:] = even * random_logits(4), even * random_logits(2, seed=1)
    logits.requires_grad_()
    upstream = random_logits(6, seed=2)
    plan = sinkhorn(logits, max_iterations=5000, tolerance=1e-13).plan
    (plan * upstream).sum().backward()
    torch.testing.assert_close(logits.grad, dense_gradient(plan.detach(), upstream), rtol=1e-8, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 20), seed=st.integers(0, 1000), regularization=st.floats(0.05, 5))
def test_plan_is_doubly_stochastic_and_says_how_nearly(n, seed, regularization):
    result = sinkhorn(random_logits(n, seed), regularization=regularization, max_iterations=500, tolerance=1e-6)
    assert (result.plan >= 0).all()
    torch.testing.assert_close(result.plan.sum(-2), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-9)
    error = (result.plan.sum(-1) - 1).abs().max()
    assert float(result.marginal_error) == pytest.approx(float(error), abs=1e-12)
    assert bool(result.converged) == (float(error) <= 1e-6)
    assert result.converged or result.iterations == 500
    f, g = result.potentials
    rebuilt = (random_logits(n, seed) / regularization + f[:, None] + g[None, :]).exp()
    torch.testing.assert_close(rebuilt, result.plan)


def test_early_stop_and_full_run():
    logits = random_logits(16)
    few = sinkhorn(logits, regularization=0.02, max_iterations=3)
    assert few.iterations == 3
    assert not bool(few.converged)
    assert sinkhorn(logits, max_iterations=40, tolerance=0).iterations == 40
    assert sinkhorn(logits, max_iterations=40, tolerance=1e-3).iterations < 40
    for allowed in (1, 2, 7):  # as many updates by hand leave the same plan
        by_hand = unrolled_plan(logits, 1.0, iterations=allowed)
        torch.testing.assert_close(sinkhorn(logits, max_iterations=allowed, tolerance=0).plan, by_hand)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 2e-7])
def test_converged_is_true_of_a_float32_solve(tolerance):
    """It says whether the tolerance was reached, also where the tolerance is as small as the rounding of the row sums."""
    for seed in range(20):
        result = sinkhorn(random_logits(100, seed, torch.float32), regularization=0.7, tolerance=tolerance)
        assert bool(result.converged) == (result.iterations < 200) == (float(result.marginal_error) <= tolerance)
        assert float((result.plan.sum(-1) - 1).abs().max()) <= float(result.marginal_error) + 2e-6


def test_each_problem_of_a_batch_has_its_own_account():
    easy, hard = torch.zeros(5, 5), 40 * random_logits(5, dtype=torch.float32)
    result = sinkhorn(torch.stack([easy, hard, torch.full((5, 5), float("nan"))]), max_iterations=3)
    assert result.converged.tolist() == [True, False, False]
    assert result.marginal_error[0] <= 1e-5 < result.marginal_error[1]


def test_gradient_of_logits_that_are_not_finite_is_nan():
    logits = torch.full((3, 3), float("nan"), requires_grad=True)
    sinkhorn(logits).plan.sum().backward()
    assert logits.grad.isnan().all()


def test_bfloat16_is_solved_in_float32():
    logits = random_logits(8, dtype=torch.float32).bfloat16().requires_grad_()
    plan = sinkhorn(logits).plan
    plan[0, 0].backward()
    assert plan.dtype == logits.grad.dtype == torch.bfloat16
    expected = sinkhorn(logits.detach().double()).plan
    torch.testing.assert_close(plan.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"logits": torch.zeros(2, 3)}, "square"),
        ({"logits": torch.zeros(3)}, "square"),
        ({"logits": torch.zeros(3, 3), "regularization": 0.0}, "regularization"),
        ({"logits": torch.zeros(3, 3), "regularization": float("nan")}, "regularization"),
        ({"logits": torch.zeros(3, 3), "max_iterations": 0}, "max_iterations"),
        ({"logits": torch.zeros(3, 3), "tolerance": -1.0}, "tolerance"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        sinkhorn(**arguments)
