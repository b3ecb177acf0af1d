"""What the check of a spec must see."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lit_rebasin import Axis, Group, PermutationSpec, check_invariance, permutation_spec
from lit_rebasin.symmetry import rule

from .networks import Of


def wrong(model, tensor, size):
    """A spec that moves one weight alone."""
    return PermutationSpec({"g": Group("g", size, (Axis(tensor, 0),))})


@pytest.mark.parametrize("width", range(2, 10))
def test_check_sees_the_smallest_groups(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2), nn.ReLU(), nn.Linear(2, 3))
    with pytest.raises(RuntimeError, match="Groups at fault: g"):
        check_invariance(model, wrong(model, "0.weight", 2), torch.randn(3, width))


def test_check_tells_groups_of_one_size_apart():
    """Two groups that are right only together."""
    torch.manual_seed(0)
    model = Of(lambda m, x: m.c(m.a(x) * m.b(x)), a=nn.Linear(4, 2), b=nn.Linear(4, 2), c=nn.Linear(2, 3)).float()
    halves = {"a": ("a.weight", "a.bias"), "b": ("b.weight", "b.bias", "c.weight")}
    groups = {
        name: Group(name, 2, tuple(Axis(tensor, int(tensor == "c.weight")) for tensor in tensors))
        for name, tensors in halves.items()
    }
    with pytest.raises(RuntimeError, match=r"Groups at fault: a: .*; b: "):
        check_invariance(model, PermutationSpec(groups), torch.randn(3, 4))


def test_check_sees_into_a_branch_that_is_scaled_away():
    def forward(m, x):
        h = m.stem(x)
        return m.out(h + m.scale * m.down(m.up(h).relu()))

    torch.manual_seed(0)
    scale = nn.Parameter(torch.full((8,), 1e-6))
    model = Of(
        forward, stem=nn.Linear(4, 8), up=nn.Linear(8, 16), down=nn.Linear(16, 8), scale=scale, out=nn.Linear(8, 3)
    )
    with pytest.raises(RuntimeError, match="Groups at fault: g"):
        check_invariance(model, wrong(model, "up.weight", 16), torch.randn(3, 4))


def test_check_sees_the_statistics_of_a_fresh_batch_norm():
    """A spec that leaves the means behind is wrong, though they are all zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    right = permutation_spec(model, torch.randn(3, 4)).groups["0"]
    without = tuple(axis for axis in right.axes if axis.tensor != "1.running_mean")
    with pytest.raises(RuntimeError, match="Groups at fault: 0: "):
        check_invariance(model, PermutationSpec({"0": Group("0", 8, without)}), torch.randn(3, 4))


def test_check_compares_imaginary_parts():
    torch.manual_seed(0)
    model = Of(
        lambda m, x: torch.complex(m.r(x), m.b(m.a(x).relu())), r=nn.Linear(4, 3), a=nn.Linear(4, 8), b=nn.Linear(8, 3)
    )
    with pytest.raises(RuntimeError, match="Groups at fault: g"):
        check_invariance(model, wrong(model, "a.weight", 8), torch.randn(3, 4))


class Answer:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("forward", "x"), [(lambda m, x: m.a(x), torch.zeros(0, 4)), (lambda m, x: Answer(m.a(x)), torch.zeros(2, 4))]
)
def test_check_of_nothing_is_an_error(forward, x):
    model = Of(forward, a=nn.Linear(4, 8))
    with pytest.raises(ValueError, match="gives no tensor with an entry"):
        check_invariance(model, wrong(model, "a.weight", 8), x)


def test_network_that_writes_to_its_input():
    def forward(m, x):
        x += 1
        return m.b(m.a(x).relu())

    x = torch.zeros(3, 4)
    model = Of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    assert check_invariance(model, permutation_spec(model, x, check=False), x) < 1e-5
    assert not x.any()


@torch.library.custom_op("lit_rebasin_tests::steepen", mutates_args=())
def steepen(x: torch.Tensor) -> torch.Tensor:
    return x * torch.arange(x.shape[-1])


steepen.register_fake(torch.empty_like)


def auxiliary(between):
    """A second head that training alone reads, behind dropout."""

    def forward(m, x):
        h = m.a(x).relu()
        if not m.training:
            return m.out(h)
        return m.out(h) + m.last(F.dropout(between(m.side(h)), training=True))

    return Of(forward, a=nn.Linear(4, 8), out=nn.Linear(8, 3), side=nn.Linear(8, 6), last=nn.Linear(6, 3))


def test_what_training_alone_reads_is_compared_too():
    rule(torch.ops.lit_rebasin_tests.steepen)(lambda trace, x: x)  # wrong
    torch.manual_seed(0)
    assert set(permutation_spec(auxiliary(lambda h: h.relu()), torch.randn(3, 4)).groups) == {"a", "side"}
    with pytest.raises(RuntimeError, match="Groups at fault: side: "):
        permutation_spec(auxiliary(torch.ops.lit_rebasin_tests.steepen), torch.randn(3, 4))
