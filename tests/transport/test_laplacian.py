import numpy as np
import pytest
import torch

from lit_rebasin.transport.adjoint import adjoint
from lit_rebasin.transport.laplacian import DominantLaplacian, as_native, as_tensor, laplacian


def plans(batch, n, m, sharpness, seed=0, dtype=torch.float64):
    """Positive matrices with some rows, if sharp, that hold almost all of their mass on one entry."""
    generator = torch.Generator().manual_seed(seed)
    scores = 0.5 * torch.randn(batch, n, m, generator=generator, dtype=torch.float64)
    scores[:, : m // 2, : m // 2] += sharpness * torch.eye(m // 2, dtype=torch.float64)
    return scores.softmax(-1).to(dtype)


def dense(plan):
    a, b = plan.sum(-1), plan.sum(-2)
    return torch.diag_embed(b) - plan.mT @ (plan / a[..., None])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sharpness", [0.0, 6.0, 30.0])
@pytest.mark.parametrize(("n", "m"), [(8, 8), (12, 8), (100, 100)])
def test_product_and_solution_equal_the_dense_matrix(batch, sharpness, n, m):
    plan = plans(batch, n, m, sharpness)
    system = laplacian(plan)
    assert isinstance(system, DominantLaplacian) == (sharpness > 0)
    assert isinstance(system.plan, np.ndarray) == (batch == 1 and sharpness == 0)
    values = torch.randn(batch, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    native = as_native(values) if isinstance(system.plan, np.ndarray) else values
    image = as_tensor(system @ native)
    torch.testing.assert_close(image, (dense(plan) @ values[..., None])[..., 0])
    found = as_tensor(system.solve(image[0].numpy() if isinstance(system.plan, np.ndarray) else image))
    constant = values - found
    assert float((constant - constant.mean(-1, keepdim=True)).norm() / values.norm()) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_badly_conditioned_systems_are_solved_directly(batch):
    """Pairs of neurons with links of 1e-9 between the pairs: conjugate gradients would need too many steps."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, 40, 40, generator=generator, dtype=torch.float64)
    blocks = torch.kron(torch.eye(20, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))
    plan = scores.exp() * (blocks + torch.where(blocks > 0, 0.0, 10 ** (-9 * torch.rand(40, 40, generator=generator))))
    plan = plan / plan.sum(-1, keepdim=True)
    values = torch.randn(batch, 40, generator=generator, dtype=torch.float64)
    right = (dense(plan) @ values[..., None])[..., 0]
    system = laplacian(plan)
    found = as_tensor(system.solve(as_native(right) if isinstance(system.plan, np.ndarray) else right))
    torch.testing.assert_close((dense(plan) @ found[..., None])[..., 0], right, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sharpness", [0.0, 6.0])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(7, 5), (5, 7), (6, 6)])
def test_adjoint_solves_the_optimality_conditions(sharpness, batch, n, m):
    plan = plans(batch, max(n, m), min(n, m), sharpness)
    plan = plan if n >= m else plan.mT
    generator = torch.Generator().manual_seed(2)
    change = torch.randn(batch, n, m, generator=generator, dtype=torch.float64)
    da, db = (torch.randn(batch, size, generator=generator, dtype=torch.float64) for size in (n, m))
    db = db + (da.sum(-1, keepdim=True) - db.sum(-1, keepdim=True)) / m
    moved, alpha, beta = map(as_tensor, adjoint(plan, change, da, db))
    torch.testing.assert_close(moved, plan * (change - alpha[..., None] - beta[..., None, :]))
    torch.testing.assert_close(moved.sum(-1), da)
    torch.testing.assert_close(moved.sum(-2), db)


def test_adjoint_is_symmetric():
    """So that it is its own transpose: a change of the scores moves the plan as a gradient of the plan pulls at the scores."""
    plan, (one, other) = (
        plans(1, 6, 6, 6.0),
        torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    )
    there, back = ((as_tensor(adjoint(plan, x)[0]) * y).sum() for x, y in ((one, other), (other, one)))
    torch.testing.assert_close(there, back)
