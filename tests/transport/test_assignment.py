import math
from importlib import import_module
from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from lit_rebasin.transport import annealed_sinkhorn, assignment, plan_entropy, round_to_polytope, sinkhorn

DOUBLE, NAN = torch.float64, float("nan")
EVEN = torch.ones(2, 2) / 2


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def total(gain, p):
    return float(gain.gather(-1, p[..., None]).sum())


def test_assignment_equals_brute_force():
    for seed in range(20):
        gain = draw(5, 5, seed=seed, dtype=torch.float32)
        best = max(permutations(range(5)), key=lambda p: sum(float(gain[i, j]) for i, j in enumerate(p)))
        assert assignment(gain).tolist() == list(best)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), whole=st.booleans())
def test_assignment_is_as_good_as_scipys_also_with_ties(seed, n, whole):
    gain = draw(n, n, seed=seed).round() if whole else draw(n, n, seed=seed)
    p = assignment(gain)
    assert sorted(p.tolist()) == list(range(n))
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    assert total(gain, p) == pytest.approx(gain.numpy()[rows, columns].sum(), abs=1e-12)


def test_assignment_of_ties_is_a_permutation():
    for gain in (torch.zeros(4, 4), torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, 0.0]])):
        p = assignment(gain)
        assert sorted(p.tolist()) == list(range(len(gain)))
    assert p.tolist() == [1, 0]


def test_assignment_convention_is_row_to_column():
    p = torch.tensor([2, 0, 1])
    matrix = torch.eye(3)[p]  # P[i, p[i]] = 1
    assert torch.equal(assignment(matrix), p)
    w = torch.randn(3, 4)
    assert torch.equal(matrix @ w, w.index_select(0, p))


def test_assignment_asks_no_solver_where_the_best_columns_differ(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("solved")

    # Not by a dotted path: the package's attribute of this name is the function.
    monkeypatch.setattr(import_module("lit_rebasin.transport.assignment"), "linear_sum_assignment", fail)
    p = torch.randperm(40)
    assert torch.equal(assignment(torch.eye(40)[p] + 0.4 * torch.rand(40, 40)), p)
    with pytest.raises(AssertionError, match="solved"):
        assignment(torch.tensor([[1.0, 0.0], [1.0, 0.9]]))


def test_assignment_of_batches_and_groups():
    gain = draw(2, 3, 6, 6, dtype=torch.float32)
    p = assignment(gain)
    assert p.shape == (2, 3, 6)
    assert p.dtype == torch.int64
    for i in range(2):
        for j in range(3):
            assert torch.equal(p[i, j], assignment(gain[i, j]))
    groups = assignment([gain, gain[0, 0], torch.eye(2)])
    assert isinstance(groups, list)
    assert torch.equal(groups[0], p)
    assert torch.equal(groups[1], p[0, 0])
    assert groups[2].tolist() == [0, 1]
    assert assignment(()) == []
    assert assignment(torch.zeros(0, 3, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_assignment_of_any_type_needs_no_graph(dtype):
    gain = (4 * draw(6, 6)).to(dtype)
    assert torch.equal(assignment(gain), assignment(gain.double()))
    assert not assignment(draw(3, 3).requires_grad_()).requires_grad
    transposed = draw(5, 5).mT
    assert torch.equal(assignment(transposed), assignment(transposed.contiguous()))


@pytest.mark.parametrize(
    ("gain", "match"),
    [
        (torch.zeros(2, 3), "square"),
        (torch.zeros(3), "square"),
        (torch.tensor([[NAN, 0.0], [0.0, 0.0]]), "NaN"),
        (torch.tensor([[float("inf"), 0.0], [0.0, 0.0]]), "infinity"),
        ([torch.eye(2), torch.zeros(2, 3)], "square"),
    ],
)
def test_assignment_errors(gain, match):
    with pytest.raises(ValueError, match=match):
        assignment(gain)


def masses(size, seed, zeros=0):
    mass = draw(size, seed=seed).abs()
    mass[:zeros] = 0
    return mass / mass.sum()


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 9),
    m=st.integers(2, 9),
    zeros=st.integers(0, 1),
    scale=st.sampled_from([0.0, 1e-30, 0.01, 1.0, 100.0]),
)
def test_rounding_reaches_the_masses_and_moves_little(seed, n, m, zeros, scale):
    plan, a, b = scale * draw(n, m, seed=seed).abs() / (n * m), masses(n, seed + 1, zeros), masses(m, seed + 2, zeros)
    plan[-1] = 0  # a row that scaling can not mend
    rounded = round_to_polytope(plan, a, b)
    assert (rounded >= 0).all()
    torch.testing.assert_close(rounded.sum(1), a, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(rounded.sum(0), b, rtol=1e-10, atol=1e-15)
    off = (plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()
    assert (rounded - plan).abs().sum() <= 2 * off + 1e-14
    torch.testing.assert_close(round_to_polytope(rounded, a, b), rounded, rtol=1e-10, atol=1e-14)


def test_rounding_fills_in_masses_as_sinkhorn_does():
    cost, b = draw(3, 6), masses(6, 3)
    for a_, b_ in ((None, None), (3 * masses(3, 1), None), (None, b)):
        plan = sinkhorn(cost, a_, b_, max_iterations=3000, tolerance=1e-12).plan
        torch.testing.assert_close(round_to_polytope(plan, a_, b_), plan, rtol=1e-9, atol=1e-12)
    square = round_to_polytope(torch.rand(5, 5))
    torch.testing.assert_close(square.sum(0), torch.ones(5))
    torch.testing.assert_close(square.sum(1), torch.ones(5))


def test_rounding_of_a_batch_is_one_by_one():
    plan, b = draw(2, 3, 4, 5).abs(), masses(5, 3)
    a = torch.stack([masses(4, seed) for seed in range(3)])
    together = round_to_polytope(plan, a, b)
    assert together.shape == plan.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], round_to_polytope(plan[i, j], a[j], b))


def test_a_rounded_plan_costs_no_less_than_the_best():
    for seed in range(5):
        cost, a, b = draw(8, 6, seed=seed), masses(8, seed + 1, 1), masses(6, seed + 2)
        plan = round_to_polytope(annealed_sinkhorn(cost, a, b, steps=30).plan, a, b)
        assert float((plan * cost).sum()) >= ot.emd2(a.numpy(), b.numpy(), cost.numpy()) - 1e-12


def test_gradient_flows_through_rounding():
    plan, a, b = draw(4, 5).abs().requires_grad_(), masses(4, 1).requires_grad_(), masses(5, 2).requires_grad_()

    def rounded(plan, a, b):  # equal totals, also of the masses that gradcheck moves
        return round_to_polytope(plan, a / a.sum(), b / b.sum())

    assert torch.autograd.gradcheck(rounded, (plan / plan.sum(), a, b))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("row", [0.0, 1e-30])
def test_gradient_of_rounding_stays_finite_and_small(row, dtype):
    nearly = torch.full((3, 3), 1 / 3, dtype=dtype)  # rows that sum to one and columns that do so up to rounding
    nearly[0, 0] += torch.finfo(dtype).eps / 4
    empty = torch.eye(3, dtype=dtype)
    empty[0] = row
    for plan in (nearly, empty, torch.eye(3, dtype=dtype)):
        plan = plan.requires_grad_()
        (gradient,) = torch.autograd.grad((round_to_polytope(plan) * draw(3, 3, dtype=dtype)).sum(), plan)
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(3),), "plan must hold floating point numbers"),
        ((torch.zeros(0, 3),), "plan must hold floating point numbers"),
        ((-EVEN,), "negative"),
        ((EVEN * NAN,), "NaN"),
        ((EVEN, torch.ones(3)), "a must hold"),
        ((EVEN, torch.tensor(1.0)), "a must hold"),
        ((EVEN, None, torch.ones(3)), "b must hold"),
        ((EVEN, torch.tensor([2.0, -1.0])), "a holds a mass that is negative"),
        ((EVEN, torch.tensor([NAN, 1.0])), "a holds a mass that is negative"),
        ((EVEN, torch.ones(2), torch.tensor([1.0, 2.0])), "same total"),
    ],
)
def test_rounding_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        round_to_polytope(*arguments)


def test_entropy():
    assert float(plan_entropy(torch.eye(6)[torch.randperm(6)])) == 0
    assert float(plan_entropy(torch.full((6, 6), 1 / 6, dtype=DOUBLE))) == pytest.approx(6 * math.log(6))
    plan = torch.stack([draw(4, 5, seed=seed).abs() for seed in range(3)])
    plan[0, 1] = 0
    values = plan.numpy()
    expected = -np.sum(values * np.log(np.where(values > 0, values, 1)), axis=(1, 2))
    np.testing.assert_allclose(plan_entropy(plan).numpy(), expected)
    soft = plan[1].requires_grad_()
    assert torch.autograd.gradcheck(plan_entropy, soft)
