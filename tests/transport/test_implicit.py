"""Gradients of plans, and what PyTorch may do with them."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lit_rebasin import sinkhorn


def random_matrix(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_masses(*shape, seed=0):
    masses = 1 + random_matrix(*shape, seed=seed).abs()
    return masses / masses.sum(-1, keepdim=True)


def exact_plan(cost, a=None, b=None, regularization=0.4):
    return sinkhorn(cost, a, b, regularization=regularization, max_iterations=5000, tolerance=1e-14).plan


def unrolled(logits, regularization, iterations=3000):
    """The plan of a loop that autograd can follow."""
    log_plan = logits / regularization
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(-1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(-2, keepdim=True)
    return log_plan.exp()


@pytest.mark.parametrize("regularization", [1.0, 0.3, 0.2])
def test_gradient_equals_unrolled(regularization):
    upstream = random_matrix(9, 9, seed=1)
    ours, theirs = random_matrix(9, 9).requires_grad_(), random_matrix(9, 9).requires_grad_()
    (sinkhorn(logits=ours, regularization=regularization, tolerance=1e-12).plan * upstream).sum().backward()
    (unrolled(theirs, regularization) * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 5), (5, 3)])
def test_first_and_second_derivatives(n, m):
    """Of cost, masses and regularization, in a batch; softmax keeps the totals equal."""
    arguments = (
        random_matrix(2, n, m),
        random_matrix(2, n, seed=1),
        random_matrix(m, seed=2),
        torch.tensor([0.4, 0.7], dtype=torch.float64),
    )
    arguments = tuple(argument.requires_grad_() for argument in arguments)
    solve = lambda cost, a, b, regularization: exact_plan(cost, a.softmax(-1), b.softmax(-1), regularization)  # noqa: E731
    assert gradcheck(solve, arguments)
    assert gradgradcheck(solve, arguments)


def test_derivatives_of_a_doubly_stochastic_plan():
    logits = random_matrix(2, 4, 4).requires_grad_()
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def solve(logits, temperature):
        return sinkhorn(logits=logits, regularization=temperature, max_iterations=5000, tolerance=1e-14).plan

    assert gradcheck(solve, (logits, temperature))
    assert gradgradcheck(solve, (logits, temperature))


def test_gradient_of_masses_is_that_of_moving_mass():
    """Known up to a constant; given with sum_j b_j grad_j = 0."""
    cost, a, b = random_matrix(4, 5), random_masses(4).requires_grad_(), random_masses(5).requires_grad_()
    upstream = random_matrix(4, 5, seed=1)
    over_a, over_b = torch.autograd.grad((exact_plan(cost, a, b) * upstream).sum(), (a, b))
    assert float((b * over_b).sum().detach()) == pytest.approx(0, abs=1e-12)
    step = 1e-6
    for i, j in ((0, 1), (3, 2)):
        moved = a.detach().clone()
        moved[i] += step
        moved[j] -= step
        change = ((exact_plan(cost, moved, b) - exact_plan(cost, a, b)) * upstream).sum() / step
        assert float(change.detach()) == pytest.approx(float(over_a[i] - over_a[j]), abs=1e-5)
    scaled = ((exact_plan(cost, (1 + step) * a, (1 + step) * b) - exact_plan(cost, a, b)) * upstream).sum() / step
    assert float(scaled.detach()) == pytest.approx(float(((a * over_a).sum() + (b * over_b).sum()).detach()), abs=1e-5)


def dense_gradient(plan, upstream):
    """The gradient of Eisenberger et al. (CVPR 2022) as published: both multipliers from the whole system of optimality conditions."""
    rows, columns = plan.sum(1), plan.sum(0)
    weighted = plan * upstream
    system = torch.cat([torch.cat([rows.diag(), plan], 1), torch.cat([plan.T, columns.diag()], 1)])
    right = torch.cat([weighted.sum(1), weighted.sum(0)])[:, None]
    u, v = torch.linalg.lstsq(system, right, driver="gelsd").solution[:, 0].split(list(plan.shape))
    return weighted - plan * (u[:, None] + v[None, :])


def test_gradient_of_an_early_stop_is_that_of_the_masses_that_were_reached():
    logits, upstream = random_matrix(10, 10).requires_grad_(), random_matrix(10, 10, seed=1)
    plan = sinkhorn(logits=logits, regularization=0.1, max_iterations=3, tolerance=0).plan
    (gradient,) = torch.autograd.grad(plan, logits, upstream)
    reached = plan.detach().sum(-1)
    assert (reached - 1).abs().max() > 0.05
    torch.testing.assert_close(gradient, dense_gradient(plan.detach(), upstream) / 0.1)
    solved = sinkhorn(-logits, reached, torch.ones(10).double(), regularization=0.1, tolerance=1e-13)
    torch.testing.assert_close(solved.plan, plan)
    torch.testing.assert_close(torch.autograd.grad(solved.plan, logits, upstream)[0], gradient)


@pytest.mark.parametrize("sharpness", [1.0, 5.0, 10.0, 16.0])
def test_float32_gradient_equals_the_published_formula_in_float64(sharpness):
    p = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    logits = (sharpness * torch.eye(24)[p] + random_matrix(24, 24, dtype=torch.float32)).requires_grad_()
    upstream = random_matrix(24, 24, seed=1)
    plan = sinkhorn(logits=logits).plan
    (plan * upstream.float()).sum().backward()
    expected = dense_gradient(plan.detach().double(), upstream)
    assert (logits.grad - expected).norm() < 2e-5 * expected.norm()


def exact_gradient(logits, temperature, upstream):
    """The gradient by float64 Newton steps to rounding, and the published formula."""
    plan = sinkhorn(logits=logits.double(), regularization=temperature, tolerance=1e-13).plan
    return dense_gradient(plan, upstream.double()) / temperature


@pytest.mark.parametrize("start", ["init", "randn"])
@pytest.mark.parametrize(("temperature", "bound"), [(1.0, 1e-5), (0.05, 1e-3)])
def test_float32_gradient_of_a_whole_solve(start, temperature, bound):
    """Also where plain updates take 1e5 of them, and the plan is far from even."""
    logits = random_matrix(128, 128, dtype=torch.float32)
    logits = (torch.eye(128) + 0.1 * logits if start == "init" else logits).requires_grad_()
    upstream = random_matrix(128, 128, seed=1, dtype=torch.float32)
    plan = sinkhorn(logits=logits, regularization=temperature, tolerance=1e-6).plan
    (plan * upstream).sum().backward()
    expected = exact_gradient(logits.detach(), temperature, upstream)
    assert (logits.grad - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize(("width", "temperature"), [(16, 1.0), (16, 0.3), (16, 0.2), (256, 0.3)])
def test_float32_gradient_of_a_sharp_plan_is_no_noise(width, temperature):
    """The start of an alignment, annealed: the gradient is as small as what the plan has off the permutation."""
    exact = float(np.log(9 * (width - 1))) * torch.eye(width, dtype=torch.float64) + 0.1 * random_matrix(width, width)
    upstream = random_matrix(width, width, seed=1)
    gradients = []
    for logits in (exact, exact.float()):
        logits = logits.clone().requires_grad_()
        plan = sinkhorn(logits=logits, regularization=temperature).plan
        (plan * upstream.to(plan.dtype)).sum().backward()
        assert logits.grad.dtype == logits.dtype
        gradients.append(logits.grad.double())
    assert (gradients[1] - gradients[0]).norm() < 2e-5 * gradients[0].norm()
    assert (gradients[1].sign() == gradients[0].sign()).double().mean() > 0.999


def test_gradient_is_finite_near_a_permutation():
    logits = (60 * torch.eye(32)).requires_grad_()
    (sinkhorn(logits=logits).plan * random_matrix(32, 32, dtype=torch.float32)).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() < 1e-20


@pytest.mark.parametrize("even", [0.0, 1.0])
def test_gradient_where_the_plan_falls_apart_into_blocks(even):
    """No flow between the blocks: the multipliers of one are free against those of the other."""
    logits = torch.full((6, 6), -300.0, dtype=torch.float64)
    logits[:4, :4], logits[4:, 4:] = even * random_matrix(4, 4), even * random_matrix(2, 2, seed=1)
    logits.requires_grad_()
    upstream = random_matrix(6, 6, seed=2)
    plan = sinkhorn(logits=logits, max_iterations=5000, tolerance=1e-13).plan
    (plan * upstream).sum().backward()
    torch.testing.assert_close(logits.grad, dense_gradient(plan.detach(), upstream), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(("n", "m"), [(6, 7), (7, 6)])
def test_neurons_without_mass_get_no_gradient(batch, n, m):
    cost, upstream = random_matrix(*batch, n, m).requires_grad_(), random_matrix(*batch, n, m, seed=3)
    a, b = random_masses(*batch, n, seed=1), random_masses(*batch, m, seed=2)
    a[..., 2] = b[..., 0] = 0
    a, b = (a / a.sum(-1, True)).requires_grad_(), (b / b.sum(-1, True)).requires_grad_()
    gradients = torch.autograd.grad((exact_plan(cost, a, b) * upstream).sum(), (cost, a, b))
    assert (gradients[0][..., 2, :] == 0).all()
    assert (gradients[1][..., 2] == 0).all()
    assert (gradients[2][..., 0] == 0).all()
    rows, columns = [i for i in range(n) if i != 2], list(range(1, m))
    part = lambda tensor: tensor.detach()[..., rows, :][..., columns]  # noqa: E731
    inner = [part(cost), a.detach()[..., rows], b.detach()[..., columns]]
    inner = [tensor.requires_grad_() for tensor in inner]
    expected = torch.autograd.grad((exact_plan(*inner) * part(upstream)).sum(), inner)
    torch.testing.assert_close(part(gradients[0]), expected[0])
    torch.testing.assert_close(gradients[1][..., rows], expected[1])
    torch.testing.assert_close(gradients[2][..., columns], expected[2])


def test_upstream_gradient_is_not_written_to():
    for regularization in (1.0, 0.05):
        logits = random_matrix(5, 5).requires_grad_()
        plan = sinkhorn(logits=logits, regularization=regularization).plan
        upstream = random_matrix(5, 5, seed=1)
        copy = upstream.clone()
        torch.autograd.grad(plan, logits, upstream, retain_graph=True)
        torch.autograd.grad(plan, logits, upstream, create_graph=True)
        assert torch.equal(upstream, copy)
        sinkhorn(logits=logits).plan.sum().backward()  # an expanded gradient would raise if written to


def test_gradient_twice_from_one_graph():
    """The backward works in place where it can; it may not do so on what it will need again."""
    logits, upstream = random_matrix(6, 6).requires_grad_(), random_matrix(6, 6, seed=1)
    plan = sinkhorn(logits=logits, regularization=0.5).plan
    kept = plan.detach().clone()
    first = torch.autograd.grad(plan, logits, upstream, retain_graph=True)[0]
    second = torch.autograd.grad(plan, logits, upstream)[0]
    assert torch.equal(first, second)
    assert torch.equal(plan.detach(), kept)


def test_only_the_plan_carries_a_gradient():
    result = sinkhorn(random_matrix(4, 4).requires_grad_())
    assert result.plan.requires_grad
    assert not any(tensor.requires_grad for tensor in (*result.potentials, result.marginal_error))


def test_bfloat16_gradient():
    logits = random_matrix(8, 8).bfloat16().requires_grad_()
    sinkhorn(logits=logits).plan[0, 0].backward()
    assert logits.grad.dtype == torch.bfloat16
    exact = logits.detach().double().requires_grad_()
    sinkhorn(logits=exact).plan[0, 0].backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2e-2, atol=2e-3)


def loss(cost, a, temperature):
    return (sinkhorn(cost, a, regularization=temperature, tolerance=1e-11).plan * cost.cos()).sum()


@pytest.mark.parametrize("size", [4, 96])
def test_function_transforms(size):
    costs, a = random_matrix(3, size, size + 1), random_masses(size)
    temperature = torch.tensor(0.3, dtype=torch.float64)
    one_by_one = torch.stack([loss(cost, a, temperature) for cost in costs])
    torch.testing.assert_close(torch.func.vmap(loss, (0, None, None))(costs, a, temperature), one_by_one)
    gradients = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, None, None))(costs, a, temperature)
    for i, cost in enumerate(costs):
        leaves = [tensor.clone().requires_grad_() for tensor in (cost, a, temperature)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one[i], other)


def test_jacobians():
    cost = random_matrix(3, 3)
    solve = lambda cost: sinkhorn(cost, regularization=0.5, tolerance=1e-12).plan  # noqa: E731
    expected = torch.autograd.functional.jacobian(solve, cost)
    torch.testing.assert_close(torch.func.jacrev(solve)(cost), expected)
    of_loss = lambda cost: (solve(cost) ** 2).sum()  # noqa: E731
    hessian = torch.func.jacrev(torch.func.grad(of_loss))(cost)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(of_loss, cost))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compile(fullgraph):
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=fullgraph)
    a, temperature = random_masses(5), torch.tensor(0.3, dtype=torch.float64)
    leaves = [random_matrix(5, 5).requires_grad_() for _ in range(2)]
    values = [function(leaf, a, temperature) for function, leaf in zip((loss, compiled), leaves, strict=True)]
    for value in values:
        value.backward()
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    with pytest.raises(ValueError, match="cost holds a NaN"):
        compiled(torch.full((5, 5), torch.nan, dtype=torch.float64), a, temperature)


def test_autocast_does_not_lower_the_precision():
    logits = random_matrix(64, 64, dtype=torch.float32).requires_grad_()
    plain = sinkhorn(logits=logits).plan
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = sinkhorn(logits=logits).plan
        (gradient,) = torch.autograd.grad(lowered.cos().sum(), logits)
    assert lowered.dtype == torch.float32
    torch.testing.assert_close(lowered, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.cos().sum(), logits)[0])
    batch = logits.detach()[None].repeat(3, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sinkhorn(logits=batch).plan[1], plain)
