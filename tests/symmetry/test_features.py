import pytest
import torch
from torch import nn
from torch.nn import functional

from lit_rebasin import PermutationSpec, permutation_spec, permute
from lit_rebasin.symmetry import FeatureReader
from lit_rebasin.symmetry.spec import tensors_of


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.last = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x):
        self.seen = functional.relu(self.norm(self.first(x)))
        self.deep = functional.relu(self.grouped(self.seen)).flatten(1)
        return self.last(self.deep)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.last(x + self.attention(x, x, x)[0])


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def test_neurons_are_read_behind_their_activation_function():
    model, x = mlp(), torch.randn(7, 4)
    features = FeatureReader(model, permutation_spec(model, x)).read(tensors_of(model), (x,))
    torch.testing.assert_close(features.groups["0"], [model[:2](x).T])
    torch.testing.assert_close(features.groups["2"], [model[:4](x).T])
    expected = {"0.weight": [x], "2.weight": [model[:2](x)], "4.weight": [model[:4](x)]}
    torch.testing.assert_close(features.layers, expected)


def test_channels_of_convolutions_at_every_position():
    torch.manual_seed(0)
    model, x = Conv().eval(), torch.randn(2, 3, 6, 6)
    spec = permutation_spec(model, x)
    features = FeatureReader(model, spec).read(tensors_of(model), (x,))
    model(x)
    assert features.layers["first.weight"][0].shape == (2 * 6 * 6, 3)
    torch.testing.assert_close(features.layers["grouped.weight"][0], model.seen.movedim(1, -1).flatten(0, -2))
    torch.testing.assert_close(features.layers["last.weight"][0], model.deep)
    for name, values in features.groups.items():
        assert values
        assert all(len(value) == spec.groups[name].size for value in values)


@pytest.mark.parametrize("make", [mlp, Attention])
def test_features_move_as_the_groups_do(make):
    """Of the permuted network they are the same rows in another order, where no group lies inside another."""
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(3, 4) if make is mlp else torch.randn(3, 5, 6)
    spec = permutation_spec(model, x)
    permutations = spec.random(generator=torch.Generator().manual_seed(1))
    reader = FeatureReader(model, spec)
    before, after = (
        reader.read(tensors_of(model), (x,)).groups,
        reader.read(tensors_of(permute(model, spec, permutations)), (x,)).groups,
    )
    assert set(before) == set(spec.groups)
    for name, values in before.items():
        assert values
        for value, moved in zip(values, after[name], strict=True):
            expected, found = value[permutations[name]], moved
            # The samples of a head are its features, whose order another group decides.
            torch.testing.assert_close(found.sort(-1).values, expected.sort(-1).values, rtol=1e-4, atol=1e-5)


def test_other_weights_and_other_sizes_of_batches():
    model, other = mlp(0), mlp(1)
    reader = FeatureReader(model, permutation_spec(model, torch.randn(3, 4)))
    for size in (3, 8, 3):
        x = torch.randn(size, 4)
        torch.testing.assert_close(reader.read(tensors_of(other), (x,)).groups["0"], [other[:2](x).T])


def test_the_network_is_left_alone():
    torch.manual_seed(0)
    model, x = Conv().train(), torch.randn(2, 3, 6, 6)
    reader = FeatureReader(model, permutation_spec(model, x))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reader.read(tensors_of(model), (x,))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_network_that_cannot_be_exported_says_so():
    class Branch(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = Branch(4, 4)
    with pytest.raises(ValueError, match="cannot be exported"):
        FeatureReader(model, PermutationSpec()).read(tensors_of(model), (torch.randn(2, 4),))


def test_values_are_those_before_a_later_node_writes_to_them():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            hidden = self.a(x)
            other = self.b(hidden)
            hidden += other
            return self.c(hidden)

    torch.manual_seed(0)
    model, x = Writes(), torch.randn(6, 4)
    read = FeatureReader(model, permutation_spec(model, x)).read(tensors_of(model), (x,))
    torch.testing.assert_close(read.layers["b.weight"], [model.a(x)])
    torch.testing.assert_close(read.layers["c.weight"], [model.a(x) + model.b(model.a(x))])
