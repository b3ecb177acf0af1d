import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rebasin.transport import scaling
from lit_rebasin.transport.newton import newton_step
from lit_rebasin.transport.problem import Problem
from lit_rebasin.transport.scaling import solve


def problem(n, m, temperature, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(1, n, m, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(1, size, generator=generator, dtype=torch.float64) + 0.1 for size in (n, m))
    return Problem(cost.to(dtype), [-1 / temperature], ((a / a.sum()).to(dtype), (b / b.sum()).to(dtype)))


def semi_dual(some, psi):
    scores = some.cost * some.rates[0] + psi[:, None, :]
    return float((some.b * psi).sum() - (some.a * scores.logsumexp(-1)).sum())


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 9),
    m=st.integers(2, 9),
    seed=st.integers(0, 500),
    temperature=st.sampled_from([0.005, 0.05, 0.5]),
    distance=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_a_newton_step_raises_the_semi_dual_from_any_start(n, m, seed, temperature, distance):
    some = problem(n, m, temperature, seed)
    psi = distance * torch.randn(1, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step, _ = newton_step(some, some.row_update(psi), psi)
    before = semi_dual(some, psi)
    assert semi_dual(some, psi + step) >= before - 1e-12 * abs(before)


def test_newton_steps_converge_quadratically():
    some = problem(20, 20, 0.02)
    psi, distances = torch.zeros(1, 20, dtype=torch.float64), []
    for _ in range(40):
        step, distance = newton_step(some, some.row_update(psi), psi)
        psi = psi + step
        distances.append(distance)
    last = next(i for i, distance in enumerate(distances) if distance < 1e-2)
    assert distances[last + 1] < 2 * distances[last] ** 2


def test_kernels_are_absorbed_before_they_overflow(monkeypatch):
    """Plain updates in float32 at a temperature where scaling vectors would reach exp(2000)."""
    largest = []
    run = scaling.Scaling.run

    def watched(self, iterations, tolerance):
        result = run(self, iterations, tolerance)
        largest.append(max(float(abs(np.log(factor)).max()) for factor in (self.u, self.v)))
        return result

    monkeypatch.setattr(scaling.Scaling, "run", watched)
    some = problem(30, 30, 5e-4, dtype=torch.float32)
    plan, *_, iterations = solve(some, None, 400, 0.0)
    assert iterations == 400
    assert plan.isfinite().all()
    assert largest
    assert max(largest) <= 20.5
    # The same number of updates in the log domain by hand, in float64.
    x, psi = -some.cost.double() / 5e-4, torch.zeros(1, 30, dtype=torch.float64)
    for _ in range(400):
        phi = some.log_a - (x + psi[:, None, :]).logsumexp(-1)
        psi = some.log_b - (x + phi[:, :, None]).logsumexp(-2)
    torch.testing.assert_close(plan.double(), (x + phi[:, :, None] + psi[:, None, :]).exp(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_chunks_of_rows_make_no_difference(temperature, monkeypatch):
    some = problem(50, 40, temperature)
    whole = solve(some, None, 300, 1e-10)
    monkeypatch.setattr("lit_rebasin.transport.laplacian._CHUNK", 7 * 40)
    parts = solve(problem(50, 40, temperature), None, 300, 1e-10)
    for one, other in zip(whole[:4], parts[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
