import pytest
import torch
from torch import nn

from lit_rebasin import Axis, Group, PermutationSpec, check_invariance, permutation_spec
from lit_rebasin.symmetry import spec_of_calls

IMAGE = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def axes(spec, name):
    return {str(axis) for axis in spec.groups[name].axes}


def test_chain_of_linear_and_batch_norm():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)
    )
    spec = permutation_spec(model, IMAGE)
    assert set(spec.groups) == {"1", "4"}
    statistics = {"2.weight[0]", "2.bias[0]", "2.running_mean[0]", "2.running_var[0]"}
    assert axes(spec, "1") == {"1.weight[0]", "1.bias[0]", "4.weight[1]"} | statistics
    assert axes(spec, "4") == {"4.weight[0]", "4.bias[0]", "6.weight[1]"}
    assert "input" in spec.fixed["1.weight[1]"]
    assert "output" in spec.fixed["6.weight[0]"]


def test_flattened_convolution_moves_whole_maps():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3))
    spec = permutation_spec(model, IMAGE)
    assert Axis("4.weight", 1, 1, 25) in spec.groups["0"].axes


def test_every_axis_is_accounted_for_once():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3), nn.Linear(3, 2)
    )
    spec = permutation_spec(model, IMAGE)
    moving = [str(axis) for group in spec.groups.values() for axis in group.axes]
    both = [*model.named_parameters(), *model.named_buffers()]
    every = [f"{name}[{dim}]" for name, tensor in both for dim in range(tensor.ndim)]
    assert sorted([*moving, *spec.fixed]) == sorted(every)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(4, 8), nn.Linear(8, 8)
        self.outer, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = self.first(x).relu()
        h = h + self.outer(self.inner(h).relu())
        return self.last(h * 2)


def test_residual_stream_moves_as_one():
    spec = permutation_spec(Residual(), torch.randn(3, 4))
    assert axes(spec, "inner") == {"inner.weight[0]", "inner.bias[0]", "outer.weight[1]"}
    stream = {
        "first.weight[0]",
        "first.bias[0]",
        "inner.weight[1]",
        "outer.weight[0]",
        "outer.bias[0]",
        "last.weight[1]",
    }
    assert axes(spec, "first") == stream


class Sorting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.inner(self.first(x).relu()).sort(-1).values)


def test_what_has_no_rule_is_fixed_and_named():
    spec = permutation_spec(Sorting(), torch.randn(3, 4))
    assert set(spec.groups) == {"first"}
    assert "aten::sort has no rule" in spec.fixed["inner.weight[0]"]
    assert "aten::sort has no rule" in spec.fixed["last.weight[1]"]


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.twice(self.twice(self.first(x).relu()).relu()).relu())


class Depthwise(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1))


class Reversed(nn.Module):
    """Adds a constant that tells the neurons apart: nothing may move."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(self.a(x) + torch.arange(5.0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Residual(), torch.randn(3, 4)),
        (Reused(), torch.randn(3, 4)),
        (Depthwise(), IMAGE),
        (Reversed(), torch.randn(3, 4)),
        (Tied(), torch.randn(3, 4)),
        (
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Softmax(-1), nn.Linear(6, 2)),
            torch.randn(3, 4),
        ),
        (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2)), torch.randn(3, 4)),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(2), nn.Linear(100, 5), nn.Flatten(), nn.Linear(15, 2)), IMAGE),
        (
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, affine=False), nn.AvgPool1d(2), nn.Conv1d(4, 2, 1)),
            torch.randn(2, 2, 9),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_any_network_is_permuted_rightly_or_not_at_all(model, x):
    for seed in range(3):
        assert check_invariance(model, permutation_spec(model, x), x, seed=seed) < 1e-4


def test_constant_that_tells_neurons_apart_fixes_them():
    assert not permutation_spec(Reversed(), torch.randn(3, 4)).groups


def test_wrong_spec_is_caught_and_named():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    wrong = PermutationSpec({"half": Group("half", 6, (Axis("0.weight", 0), Axis("2.weight", 1)))})  # forgets the bias
    with pytest.raises(RuntimeError, match=r"half: 0\.weight\[0\], 2\.weight\[1\]"):
        check_invariance(model, wrong, torch.randn(3, 4))


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    permutation_spec(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random_state, torch.random.get_rng_state())


def test_branch_on_data_is_a_clear_error():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"Branch cannot be exported with torch.export"):
        permutation_spec(Branch(), torch.randn(3, 4))


class Parts(nn.Module):
    """Has no forward: calls its parts from a step, as a LightningModule does."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
        self.head = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
        self.unused = nn.Linear(2, 2)

    def step(self, x):
        return self.head(self.encoder(x).sort(-1).values)


def test_parts_are_traced_one_by_one():
    model = Parts()
    spec = spec_of_calls(model, lambda: model.step(torch.randn(3, 4)))
    assert set(spec.groups) == {"encoder.0", "head.0"}
    assert axes(spec, "head.0") == {"head.0.weight[0]", "head.0.bias[0]", "head.2.weight[1]"}
    assert "not used" in spec.fixed["unused.weight[0]"]
    assert "output" in spec.fixed["encoder.2.weight[0]"]


def test_part_called_also_from_outside_keeps_its_output():
    model = nn.Module()
    model.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    assert set(spec_of_calls(model, lambda: model.net(x)).groups) == {"net.0"}
    spec = spec_of_calls(model, lambda: (model.net(x), model.net[0](x)))
    assert not spec.groups
    assert "output" in spec.fixed["net.0.weight[0]"]


class Around(nn.Module):
    """A network with a part that others of its size may move beside, or not."""

    def __init__(self, part, forward):
        super().__init__()
        self.first, self.part, self.last = nn.Linear(8, 6), part, nn.Linear(6, 3)
        self.between = forward

    def forward(self, x):
        return self.last(self.between(self.part, self.first(x).relu()))


@pytest.mark.parametrize(
    ("part", "forward"),
    [
        (nn.ParameterList([torch.zeros(0)]), lambda part, h: h + part[0].sum()),
        (nn.ParameterList([torch.zeros(0)]), lambda part, h: torch.cat([h, part[0].expand(len(h), 0)], 1)),
        (nn.ParameterList([torch.zeros(0, 6)]), lambda part, h: h + (part[0] @ torch.ones(6)).sum()),
        (nn.ParameterList([torch.zeros(0, 6), torch.zeros(6, 0)]), lambda part, h: h + h @ part[0].T @ part[1].T),
    ],
)
def test_empty_parameters_do_not_move(part, forward):
    network = Around(part, forward)
    spec = permutation_spec(network, torch.randn(2, 8))
    assert set(spec.groups) == {"first"}
    assert {"first.weight[0]", "first.bias[0]", "last.weight[1]"} <= axes(spec, "first")
    empty = [name for name, tensor in network.named_parameters() if not tensor.numel()]
    assert not any(axis.tensor in empty for group in spec.groups.values() for axis in group.axes)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_fixed_and_the_rest_is_traced():
    network = nn.Sequential(
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.jit.script(nn.Sequential(nn.Linear(4, 3)))
    )
    x = torch.randn(2, 8)
    spec = spec_of_calls(network, lambda: network[1](network[0](x)))
    assert set(spec.groups) == {"0.0"}
    assert "ScriptModule" in spec.fixed["1.0.weight[1]"]
