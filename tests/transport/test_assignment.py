from itertools import permutations

import pytest
import torch

from lit_rebasin import assignment


def test_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gain = torch.randn(5, 5, generator=generator)
        best = max(permutations(range(5)), key=lambda p: sum(float(gain[i, j]) for i, j in enumerate(p)))
        assert assignment(gain).tolist() == list(best)


def test_convention_is_row_to_column():
    p = torch.tensor([2, 0, 1])
    matrix = torch.eye(3)[p]  # P[i, p[i]] = 1
    assert torch.equal(assignment(matrix), p)
    w = torch.randn(3, 4)
    assert torch.equal(matrix @ w, w.index_select(0, p))


def test_errors():
    with pytest.raises(ValueError, match="square"):
        assignment(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="NaN"):
        assignment(torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]))
