import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from lit_rebasin import Axis, Group, PermutationSpec, check_invariance, permute
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


def test_error_of_a_long_permutation_is_short():
    with pytest.raises(ValueError, match=r"0 \.\. 4095 once, got 4096 entries: \[0, 0, 0, 0, 0, 0, 0, 0, \.\.\.\]\.$"):
        permute({"w": torch.zeros(4096)}, spec_with(Axis("w", 0), 4096), {"g": torch.zeros(4096, dtype=torch.long)})


@pytest.mark.parametrize(
    ("source", "permutations", "match"),
    [
        ({"w": torch.zeros(3)}, {"g": [1, 2, 0]}, r"permutations\['g'\] must be a tensor, got a list"),
        ([1], {"g": torch.arange(3)}, "needs a module or its weights by name, got a list"),
        ({"w": torch.zeros(3)}, None, "must be tensors by group name, got a NoneType"),
    ],
)
def test_arguments_of_another_type(source, permutations, match):
    with pytest.raises(TypeError, match=match):
        permute(source, spec_with(Axis("w", 0), 3), permutations)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("computed", [pruned, nn.utils.weight_norm])
def test_a_module_with_computed_weights_is_copied(computed):
    model = nn.Sequential(computed(nn.Linear(3, 6)), nn.ReLU(), nn.Linear(6, 2))
    axes = {"0.bias": ("h",), "2.weight": (None, "h")}
    axes |= {name: ("h", None) for name, tensor in model.state_dict().items() if name[0] == "0" and tensor.ndim == 2}
    spec = PermutationSpec.from_axes(axes, model)
    x, before = torch.randn(5, 3), model[0].weight
    moved = permute(model, spec, {"h": torch.tensor([3, 1, 0, 2, 5, 4])})
    torch.testing.assert_close(moved(x), model(x))
    assert not torch.equal(moved[0].weight, before)
    assert moved[0].weight.grad_fn is not None
    assert check_invariance(model, spec, x) < 1e-5
