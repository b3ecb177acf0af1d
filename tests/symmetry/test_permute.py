import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rebasin import Axis, Group, PermutationSpec, permute
from lit_rebasin.symmetry import invert


def spec_with(axis, size):
    return PermutationSpec({"g": Group("g", size, (axis,))})


@settings(deadline=None, max_examples=50)
@given(
    before=st.integers(1, 3),
    size=st.integers(1, 5),
    after=st.integers(1, 3),
    dim=st.integers(0, 2),
    seed=st.integers(0, 10_000),
)
def test_factored_axis_equals_index_arithmetic(before, size, after, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = [2, 3, 4]
    shape[dim] = before * size * after
    w = torch.randn(shape, generator=generator)
    p = torch.randperm(size, generator=generator)
    index = [(b * size + int(p[s])) * after + a for b in range(before) for s in range(size) for a in range(after)]
    moved = permute({"w": w}, spec_with(Axis("w", dim, before, after), size), {"g": p})["w"]
    assert torch.equal(moved, w.index_select(dim, torch.tensor(index)))


def test_hard_permutation_equals_its_plan():
    spec = PermutationSpec({"g": Group("g", 4, (Axis("w", 0), Axis("v", 1, 1, 3)))})
    tensors = {"w": torch.randn(4, 2), "v": torch.randn(2, 12), "untouched": torch.randn(1)}
    p = torch.tensor([2, 0, 3, 1])
    hard = permute(tensors, spec, {"g": p})
    soft = permute(tensors, spec, {"g": torch.eye(4)[p]})
    for name in tensors:
        torch.testing.assert_close(hard[name], soft[name])
    assert hard["untouched"] is tensors["untouched"]


def test_soft_plan_equals_matrix_product_on_both_sides():
    spec = PermutationSpec({"out": Group("out", 3, (Axis("w", 0),)), "in": Group("in", 4, (Axis("w", 1),))})
    w, left, right = torch.randn(3, 4), torch.rand(3, 3), torch.rand(4, 4)
    moved = permute({"w": w}, spec, {"out": left, "in": right})["w"]
    torch.testing.assert_close(moved, left @ w @ right.T)


def test_inverse_restores_and_inputs_are_not_written_to():
    spec = PermutationSpec({"g": Group("g", 5, (Axis("w", 0), Axis("w", 1)))})
    w = torch.randn(5, 5)
    kept = w.clone()
    p = {"g": torch.randperm(5)}
    there = permute({"w": w}, spec, p)
    assert torch.equal(permute(there, spec, invert(p))["w"], kept)
    assert torch.equal(w, kept)
    assert torch.equal(permute({"w": w}, spec, spec.identity())["w"], kept)


@pytest.mark.parametrize(
    ("tensors", "permutations", "match"),
    [
        ({"w": torch.zeros(3)}, {"h": torch.arange(3)}, "unknown groups"),
        ({"w": torch.zeros(3)}, {"g": torch.tensor([0, 0, 1])}, "each of 0 .. 2 once"),
        ({"w": torch.zeros(3)}, {"g": torch.tensor([0, 1])}, "each of 0 .. 2 once"),
        ({"w": torch.zeros(3)}, {"g": torch.zeros(2, 2)}, "plan of shape"),
        ({"w": torch.zeros(4)}, {"g": torch.arange(3)}, "to be 3 long"),
        ({"v": torch.zeros(3)}, {"g": torch.arange(3)}, "no tensor 'w'"),
        ({"w": torch.zeros(3, dtype=torch.long)}, {"g": torch.eye(3)}, "give a permutation instead"),
    ],
)
def test_errors(tensors, permutations, match):
    with pytest.raises(ValueError, match=match):
        permute(tensors, spec_with(Axis("w", 0), 3), permutations)
