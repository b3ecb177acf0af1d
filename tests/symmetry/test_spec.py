import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_rebasin import Axis, Group, PermutationSpec, check_invariance, permutation_spec, permute
from lit_rebasin.symmetry import compose, invert, join

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


@settings(deadline=None, max_examples=50)
@given(
    start=st.integers(0, 3),
    step=st.integers(1, 3),
    before=st.integers(1, 2),
    size=st.integers(1, 4),
    after=st.integers(1, 2),
    rest=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_part_of_a_dimension_equals_index_arithmetic(start, step, before, size, after, rest, seed):
    generator = torch.Generator().manual_seed(seed)
    length = start + step * before * size * after + rest
    w = torch.randn(2, length, generator=generator)
    p = torch.randperm(size, generator=generator)
    expected = w.clone()
    for b in range(before):
        for s in range(size):
            for a in range(after):
                to = start + step * ((b * size + s) * after + a)
                expected[:, to] = w[:, start + step * ((b * size + int(p[s])) * after + a)]
    spec = PermutationSpec({"g": Group("g", size, (Axis("w", 1, before, after, start, step, length),))})
    assert torch.equal(permute({"w": w}, spec, {"g": p})["w"], expected)
    torch.testing.assert_close(permute({"w": w}, spec, {"g": torch.eye(size)[p]})["w"], expected)


def test_planted_permutation_of_a_module_is_undone_exactly():
    model = network()
    model(torch.randn(5, 4))  # statistics of its own
    spec = permutation_spec(model, X)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    p = spec.random(generator=torch.Generator().manual_seed(0))
    there = permute(model, spec, p)
    assert not torch.equal(there[0].weight, model[0].weight)
    back = permute(there, spec, invert(p))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in back.state_dict().items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_copy_of_a_module_keeps_what_it_is():
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4, bias=False), "c": nn.Linear(4, 6)})
    model["c"].weight = model["a"].weight
    model["b"].requires_grad_(False).eval()
    spec = PermutationSpec.from_axes({"a.weight": ("h", None), "c.weight": ("h", None)}, model)
    moved = permute(model, spec, {"h": torch.arange(6).flip(0)})
    assert moved["c"].weight is moved["a"].weight
    assert isinstance(moved["a"].weight, nn.Parameter)
    assert not moved["b"].weight.requires_grad
    assert moved["a"].weight.requires_grad
    assert not moved["b"].training
    assert moved["b"].weight.data_ptr() != model["b"].weight.data_ptr()


def test_composition_is_one_after_the_other():
    model = network()
    spec = permutation_spec(model, X)
    generator = torch.Generator().manual_seed(0)
    first, second = spec.random(generator=generator), spec.random(generator=generator)
    at_once = permute(model.state_dict(), spec, compose(first, second))
    in_turn = permute(permute(model.state_dict(), spec, first), spec, second)
    assert all(torch.equal(at_once[name], in_turn[name]) for name in in_turn)
    identity = compose(first, invert(first))
    assert all(torch.equal(identity[name], p) for name, p in spec.identity().items())
    only = {"0": second["0"]}
    assert torch.equal(compose(first, only)["3"], first["3"])
    with pytest.raises(ValueError, match=r"Group '0' has 8 neurons in first, and 5 in second"):
        compose(first, {"0": torch.arange(5)})


def test_random_permutations_come_from_their_generator():
    spec = permutation_spec(network(), X)
    draws = [spec.random(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0]["0"], draws[1]["0"])
    assert not torch.equal(draws[0]["0"], draws[2]["0"])


def test_json_keeps_everything():
    model = nn.Sequential(nn.MultiheadAttention(6, 3, batch_first=True))
    spec = permutation_spec(model[0], *[torch.randn(1, 5, 6)] * 3)
    text = spec.to_json()
    assert PermutationSpec.from_json(text) == spec
    assert set(json.loads(text)) == {"groups", "fixed"}


@pytest.mark.parametrize("text", ["", "[]", '{"groups": {}}', '{"groups": {"a": {"name": "a"}}, "fixed": {}}', "nan"])
def test_text_that_is_no_spec(text):
    with pytest.raises(ValueError, match="not a PermutationSpec as to_json writes it"):
        PermutationSpec.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", -3),
        ("size", "3"),
        ("dim", "0"),
        ("dim", -1),
        ("step", 0),
        ("start", True),
        ("tensor", 1),
        ("length", 0),
    ],
)
def test_numbers_that_no_spec_can_have(key, value):
    axis = {"tensor": "w", "dim": 0, "length": None}
    group = {"name": "a", "size": 3, "axes": [axis]}
    assert PermutationSpec.from_json(json.dumps({"groups": {"a": group}, "fixed": {}})).groups["a"].size == 3
    (group if key == "size" else axis)[key] = value
    with pytest.raises(
        ValueError, match=f"not a PermutationSpec as to_json writes it: .*{key} must be .*, got {value!r}"
    ):
        PermutationSpec.from_json(json.dumps({"groups": {"a": group}, "fixed": {}}))


def test_spec_by_hand_equals_the_traced_one():
    model = network()
    found = permutation_spec(model, X)
    vectors = {f"1.{name}": ("h",) for name in ("weight", "bias", "running_mean", "running_var")}
    by_hand = PermutationSpec.from_axes(
        {
            "0.weight": ("h", None),
            "0.bias": ("h",),
            **vectors,
            "3.weight": ("k", "h"),
            "3.bias": ("k",),
            "5.weight": (None, "k"),
        },
        model,
    )
    sets = [{frozenset(group.axes) for group in spec.groups.values()} for spec in (found, by_hand)]
    assert sets[0] == sets[1]
    assert set(found.fixed) == set(by_hand.fixed)
    assert check_invariance(model, by_hand, X) < 1e-5


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        (
            {"0.weight": ("h",)},
            r"axes\['0.weight'\] is \('h',\), one group or None a dimension, but the tensor has shape \(8, 4\)",
        ),
        ({"0.weight": "hk"}, "one group or None a dimension"),
        ({"0.weight": ("h", "h")}, r"Group 'h' has size 8, but 0.weight\[1\] is 4 long"),
        ({"9.weight": ("h", None)}, r"is not among \['0.bias', '0.weight'"),
    ],
)
def test_errors_of_a_spec_by_hand(axes, match):
    with pytest.raises(ValueError, match=match):
        PermutationSpec.from_axes(axes, network())


def test_coverage_counts_elements_on_movable_axes():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    spec = permutation_spec(model, X)
    assert spec.coverage(model) == pytest.approx(1 - 2 / (4 * 8 + 8 + 8 * 2 + 2))  # only the last bias lies on none
    part = PermutationSpec(
        {"g": Group("g", 2, (Axis("0.weight", 0, start=3, length=8), Axis("0.weight", 1, before=2)))}
    )
    assert part.coverage(model) == pytest.approx(32 / 58)  # both halves of dimension 1 cover all of the first weight
    rows = PermutationSpec({"g": Group("g", 2, (Axis("0.weight", 0, start=3, length=8),))})
    assert rows.coverage(model) == pytest.approx(2 * 4 / 58)
    assert PermutationSpec().coverage(nn.ReLU()) == 0.0


def spec_of(groups, fixed=()):
    found = {
        name: Group(name, 4, tuple(Axis(*axis.rsplit(":")[:1], int(axis.rsplit(":")[1])) for axis in axes.split()))
        for name, axes in groups.items()
    }
    return PermutationSpec(found, dict(fixed))


def test_join_moves_the_inputs_of_heads_that_other_traces_read():
    unread, output = "not used in the forward pass", "the network's output"
    first = spec_of({"t": "t.w:0 h1.w:1"}, {"t.w[1]": "in", "h1.w[0]": output, "h2.w[0]": unread, "h2.w[1]": unread})
    second = spec_of({"t": "t.w:0 h2.w:1"}, {"t.w[1]": "in", "h2.w[0]": output, "h1.w[0]": unread, "h1.w[1]": unread})
    both = join([first, second])
    (group,) = both.groups.values()
    assert {str(axis) for axis in group.axes} == {"t.w[0]", "h1.w[1]", "h2.w[1]"}
    assert both.fixed == {"t.w[1]": "in", "h1.w[0]": output, "h2.w[0]": output}


def test_join_fixes_what_one_trace_tells_apart_or_moves_otherwise():
    free = spec_of({"a": "a.w:0 b.w:1", "b": "b.w:0 c.w:1"}, {"a.w[1]": "in", "c.w[0]": "out"})
    held = spec_of({"a": "a.w:0 b.w:1"}, {"a.w[1]": "in", "c.w[0]": "out", "b.w[0]": "sorted", "c.w[1]": "sorted"})
    tied = spec_of({"a": "a.w:0 b.w:1 b.w:0 c.w:1"}, {"a.w[1]": "in", "c.w[0]": "out"})
    for order in ([free, held], [held, free]):
        both = join(order)
        assert set(both.groups) == {"a"}
        assert both.fixed["b.w[0]"] == both.fixed["c.w[1]"] == "sorted"
    assert not join([free, tied]).groups
    assert join([free, free]) == free
