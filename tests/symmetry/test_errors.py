"""What cannot be traced or compared is said in a sentence, and what cannot move is fixed with its reason."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lit_rebasin import check_invariance, permutation_spec, permute
from lit_rebasin.symmetry import rule

from .networks import Of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def plain(*between):
    return nn.Sequential(nn.Linear(4, 8), *between, nn.Linear(8, 2))


def by_value(m, x):
    return m.a(x) if x.sum() > 0 else m.b(x)


def as_number(m, x):
    return m.a(x)[: int(x.sum().item())]


def two(forward):
    return Of(forward, a=nn.Linear(4, 2), b=nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "inputs", "match"),
    [
        (plain(), (), r"needs an example input of Sequential .*such as permutation_spec\(model, torch.randn"),
        (lambda x: x, (X,), "needs a torch.nn.Module, got function"),
        (nn.DataParallel(plain()), (X,), "network inside DataParallel: give it model.module"),
        (plain(), (torch.randn(3, 5),), r"cannot be exported.*\[3, 5\] X \[4, 8\] \(at aten::mm, in '0' \(Linear\)"),
        (plain(), ("text",), r"must be Tensor, not str \(in '0' \(Linear\)"),
        (two(by_value), (X,), r"Of cannot be exported.*data-dependent.*at aten::item.*from_axes"),
        (nn.Sequential(two(as_number)), (X,), r"data-dependent.*at aten::item, in '0' \(Of\).*from_axes"),
        (two(lambda m, x: m.a(x[x[:, 0] > 0])), (X,), r"aten::index in .* gives an output whose shape depends on data"),
        (plain(nn.Dropout()).to("meta"), (X.to("meta"),), r"meta device.*to_empty.*check=False"),
        (Of(lambda m, x: m.b(F.dropout(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2)), (X,), "when it runs twice"),
        (Of(lambda m, x: m.a(x + torch.rand_like(x)), a=plain()), (X,), "when it runs twice"),
        (Of(lambda m, x: (m.a(x) - 1e9).sqrt(), a=plain()), (X,), "gives NaN on the example inputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_errors(model, inputs, match):
    with pytest.raises(ValueError, match=match) as caught:
        permutation_spec(model, *inputs)
    assert "\n" not in str(caught.value)


def test_without_the_check_what_is_random_or_has_no_values_can_be_traced():
    assert set(permutation_spec(plain().to("meta"), X.to("meta"), check=False).groups) == {"0"}
    noisy = Of(lambda m, x: m.net(x + torch.rand_like(x)), net=plain())
    assert set(permutation_spec(noisy, X, check=False).groups) == {"net.0"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = plain(nn.BatchNorm1d(8), nn.ReLU()).to(dtype)
    spec = permutation_spec(model, X.to(dtype))
    moved = permute(model, spec, spec.random(generator=torch.Generator().manual_seed(0)))
    assert {tensor.dtype for tensor in moved.parameters()} == {dtype}
    assert torch.equal(moved[0].weight.sort(0).values, model[0].weight.sort(0).values)


def test_integer_and_boolean_tensors_move_too():
    model = Of(lambda m, x: m.b(m.a(x) * m.mask * m.level), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    model.register_buffer("mask", torch.tensor([True, False] * 4))
    model.register_buffer("level", torch.arange(8))
    spec = permutation_spec(model, X)
    assert {"mask[0]", "level[0]"} <= {str(axis) for axis in spec.groups["a"].axes}
    moved = permute(model, spec, {"a": torch.arange(8).flip(0)})
    assert torch.equal(moved.mask, model.mask.flip(0))
    assert torch.equal(moved.level, model.level.flip(0))
    torch.testing.assert_close(moved(X), model(X))


def test_every_axis_of_an_output_is_fixed_wherever_it_stands():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1))  # classes are dimension 1 of 4
    spec = permutation_spec(model, torch.randn(2, 3, 6, 6))
    assert spec.fixed["2.weight[0]"] == spec.fixed["2.bias[0]"] == "the network's output"
    assert set(spec.groups) == {"0"}


def test_positions_beyond_the_example_are_not_free():
    def forward(m, x):
        return m.b((m.a(x) + m.position.transpose(0, 1)[:, : x.shape[1]].transpose(0, 1)).relu())

    model = Of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2), position=nn.Parameter(torch.randn(9, 8)))
    spec = permutation_spec(model, torch.randn(2, 5, 4))
    assert "position[0]" in spec.fixed
    longer = torch.randn(2, 9, 4)
    assert check_invariance(model, spec, longer) < 1e-5


def test_branch_on_shapes_that_hides_a_layer_leaves_it_unread():
    model = Of(lambda m, x: m.a(x) if x.shape[0] == 3 else m.b(x), a=plain(), b=plain())
    spec = permutation_spec(model, X)
    assert set(spec.groups) == {"a.0"}
    assert "not used" in spec.fixed["b.0.weight[0]"]


def test_statistics_in_training_mode_are_compared():
    """BatchNorm on two slices that meet again: in evaluation mode any permutation inside the whole would do."""

    class Uneven(nn.BatchNorm1d):
        def forward(self, x):
            if self.training:  # where only the first half is normalised
                self.running_mean[:4] += x[:, :4].mean(0).detach()
            return F.batch_norm(x, self.running_mean, self.running_var)

    model = nn.Sequential(nn.Linear(4, 8), Uneven(8, affine=False), nn.Linear(8, 2))
    with pytest.raises(RuntimeError, match=r"what BatchNorm updates in training mode: 1.running_mean"):
        permutation_spec(model, X)


def test_users_teach_operators():
    @torch.library.custom_op("lit_rebasin_tests::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    double.register_fake(torch.empty_like)
    operator = torch.ops.lit_rebasin_tests.double
    model = Of(lambda m, x: m.b(operator(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    before = permutation_spec(model, X)
    assert not before.groups
    assert before.fixed["a.weight[0]"] == "lit_rebasin_tests::double has no rule for this use"
    rule(operator)(lambda trace, x: x)
    assert set(permutation_spec(model, X).groups) == {"a"}


def test_rule_that_is_wrong_is_caught():
    @torch.library.custom_op("lit_rebasin_tests::ramp", mutates_args=())
    def ramp(x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(x.shape[-1])

    ramp.register_fake(torch.empty_like)
    rule(torch.ops.lit_rebasin_tests.ramp)(lambda trace, x: x)
    model = Of(lambda m, x: m.b(torch.ops.lit_rebasin_tests.ramp(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    with pytest.raises(
        RuntimeError, match=r"Groups at fault: a: a\.weight\[0\], a\.bias\[0\], b\.weight\[1\]\. .*rule"
    ):
        permutation_spec(model, X)


def test_rule_needs_an_operator():
    with pytest.raises(TypeError, match=r"operators of torch.ops, such as torch.ops.aten.linear, got .*function"):
        rule(torch.relu)


def test_rule_that_fails_fixes_what_its_operator_touches():
    @torch.library.custom_op("lit_rebasin_tests::half", mutates_args=())
    def half(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    half.register_fake(torch.empty_like)
    rule(torch.ops.lit_rebasin_tests.half)(lambda trace, x: x[7])
    model = Of(lambda m, x: m.b(torch.ops.lit_rebasin_tests.half(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"rule of lit_rebasin_tests::half fails .*IndexError.* is fixed"):
        spec = permutation_spec(model, X)
    assert not spec.groups
    assert "lit_rebasin_tests::half" in spec.fixed["a.weight[0]"]


class Caching(nn.Module):
    """Keeps what it makes of its weights, as attention biases in evaluation mode often are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.kept = {}
        self.last = None

    def forward(self, x):
        if "weight" not in self.kept:
            self.kept["weight"] = self.a.weight.abs()
        self.last = F.linear(x, self.kept["weight"], self.a.bias)
        return self.b(self.last)


def test_network_that_caches_what_it_makes_of_its_weights():
    model = Caching()
    spec = permutation_spec(model, X)
    assert {str(axis) for axis in spec.groups["a"].axes} == {"a.weight[0]", "a.bias[0]", "b.weight[1]"}
    assert model.kept == {}
    assert model.last is None


def test_hooks_that_a_network_gives_itself_at_its_first_call_are_not_given_twice():
    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.ready, self.seen = plain(nn.ReLU()), False, []

        def forward(self, x):
            if not self.ready:
                self.net[0].register_forward_hook(lambda module, args, output: self.seen.append(output))
                self.ready = True
            self.seen.clear()
            self.net(x)
            (hidden,) = self.seen
            return hidden.sum(-1)

    model = Records()
    assert "net.0" in permutation_spec(model, X).groups
    assert not model.net[0]._forward_hooks
    assert model(X).shape == (3,)
