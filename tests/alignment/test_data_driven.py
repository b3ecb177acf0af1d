from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from lit_rebasin import PermutationSpec, align, permutation_spec, permute
from lit_rebasin.alignment import weight_matching
from lit_rebasin.symmetry import invert


def mlp(seed, widths=(6, 12, 10, 3)):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    6, 6, generator=torch.Generator().manual_seed(1)
)
SPEC = permutation_spec(mlp(0), X)
BATCHES = [(X[:80],), (X[80:150],), (X[150:],)]


def activation_matching(model, reference, spec, batches, **options):
    return align(model, reference, method="activations", spec=spec, data=batches, **options)


def covariance_matching(model, reference, spec, batches, **options):
    return align(model, reference, method="covariance", spec=spec, data=batches, **options)


def hidden(model):
    with torch.no_grad():
        return {"0": model[:2](X).double(), "2": model[:4](X).double()}


@pytest.mark.parametrize("similarity", ["correlation", "cosine"])
def test_activations_are_matched_as_by_scipy_on_all_data_at_once(similarity):
    model, reference = mlp(0), mlp(1)
    found = activation_matching(model, reference, SPEC, BATCHES, similarity=similarity)
    total = 0.0
    for name, theirs in hidden(reference).items():
        ours = hidden(model)[name]
        if similarity == "correlation":
            matrix = torch.from_numpy(np.corrcoef(theirs.T.numpy(), ours.T.numpy()))[
                : theirs.shape[1], theirs.shape[1] :
            ]
        else:
            matrix = (theirs / theirs.norm(dim=0)).T @ (ours / ours.norm(dim=0))
        rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
        assert found.permutations[name].tolist() == columns.tolist()
        total += float(matrix[rows, columns].sum())
    assert found.cost == pytest.approx(1 - total / 22, abs=1e-5)
    assert found.history[-1] < found.history[0]


def test_planted_permutations_are_found_by_activations_and_by_covariance():
    reference = mlp(0)
    for seed in range(5):
        planted = SPEC.random(generator=torch.Generator().manual_seed(seed))
        model = permute(reference, SPEC, planted)
        for match in (activation_matching, covariance_matching):
            found = match(model, reference, SPEC, BATCHES)
            assert all(torch.equal(found.permutations[name], p) for name, p in invert(planted).items())
            torch.testing.assert_close(permute(model, SPEC, found.permutations)(X), reference(X))


class Attention(nn.Module):
    """Heads with features inside them: groups within one dimension of a weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 24), nn.MultiheadAttention(24, 4, batch_first=True)
        self.hidden, self.last = nn.Linear(24, 30), nn.Linear(30, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        return self.last(torch.tanh(self.hidden(x)))


@pytest.mark.parametrize("match", ["activations", "covariance", "weights"])
def test_heads_and_the_features_inside_them(match):
    for seed in range(6):
        torch.manual_seed(seed)
        reference, x = Attention().eval(), torch.randn(40, 7, 6)
        spec = permutation_spec(reference, x[:2])
        planted = spec.random(generator=torch.Generator().manual_seed(seed))
        model = permute(reference, spec, planted)
        if match == "weights":
            found = weight_matching(dict(model.named_parameters()), dict(reference.named_parameters()), spec)
        else:
            found = {"activations": activation_matching, "covariance": covariance_matching}[match](
                model, reference, spec, [(x,)]
            )
        assert found.converged
        assert all(torch.equal(found.permutations[name], p) for name, p in invert(planted).items())


def test_neurons_that_never_respond_have_no_part_in_it():
    model, reference = mlp(0), mlp(1)
    with torch.no_grad():
        for network, dead in ((model, 3), (reference, 7)):
            network[0].weight[dead], network[0].bias[dead] = 0.0, 0.5
    found = activation_matching(model, reference, SPEC, BATCHES)
    assert np.isfinite(found.cost)
    assert sorted(found.permutations["0"].tolist()) == list(range(12))


def test_covariance_with_power_zero_is_weight_matching_without_biases():
    model, reference = mlp(0), mlp(1)
    found = covariance_matching(model, reference, SPEC, BATCHES, power=0.0)
    weights = [{n: p for n, p in net.named_parameters() if n.endswith("weight")} for net in (model, reference)]
    expected = weight_matching(*weights, SPEC)
    assert all(torch.equal(found.permutations[name], p) for name, p in expected.permutations.items())
    assert found.cost == pytest.approx(expected.cost, abs=1e-6)


@pytest.mark.parametrize("power", [0.125, 1.0])
def test_the_cost_is_one_less_the_cosines_in_the_metric_of_the_covariance(power):
    model, reference = mlp(0), mlp(1)
    found = covariance_matching(model, reference, SPEC, BATCHES, power=power)
    moved = permute(model, SPEC, found.permutations)
    cosines = []
    for layer, key in zip((0, 2, 4), (None, "0", "2"), strict=True):
        weighed = []
        for network in (reference, moved):
            x = X.double() if key is None else hidden(network)[key]
            values, vectors = np.linalg.eigh(np.cov(x.T.numpy(), bias=True))
            root = torch.from_numpy((vectors * values.clip(0) ** (power / 2)) @ vectors.T)
            weighed.append((network[layer].weight.double() @ root).flatten())
        cosines.append(torch.cosine_similarity(*weighed, dim=0).item())
    assert found.cost == pytest.approx(1 - sum(cosines) / 3, abs=1e-5)
    assert all(b <= a + 1e-12 for a, b in pairwise(found.history))


def test_covariance_ignores_weights_that_no_input_meets():
    """Where an input never varies its weights are noise; they mislead plain weight matching, but not this."""
    generator = torch.Generator().manual_seed(0)
    reference = mlp(0, (20, 30, 3))
    spec = permutation_spec(reference, torch.randn(2, 20))
    (name,) = spec.groups
    planted = {name: torch.randperm(30, generator=generator)}
    model = permute(reference, spec, planted)
    x = torch.randn(100, 20, generator=generator)
    x[:, 5:] = 1.0
    with torch.no_grad():
        model[0].weight[:, 5:] = 5 * torch.randn(30, 15, generator=generator)
        for network in (model, reference):
            network[2].weight.zero_()
    found = covariance_matching(model, reference, spec, [(x,)], power=1.0)
    plain = weight_matching(dict(model.named_parameters()), dict(reference.named_parameters()), spec)
    right = invert(planted)[name]
    assert torch.equal(found.permutations[name], right)
    assert (plain.permutations[name] == right).sum() < 15


def test_same_seed_same_answer_and_never_worse_than_the_start():
    model, reference = mlp(0, (6, 20, 20, 20, 3)), mlp(1, (6, 20, 20, 20, 3))
    spec = permutation_spec(model, X)
    first, again = (covariance_matching(model, reference, spec, BATCHES, seed=3) for _ in range(2))
    assert all(torch.equal(first.permutations[name], p) for name, p in again.permutations.items())
    onward = covariance_matching(model, reference, spec, BATCHES, init=first.permutations)
    assert onward.history[0] == pytest.approx(first.cost)
    assert onward.cost <= first.cost + 1e-12


@pytest.mark.parametrize("method", ["activations", "covariance"])
def test_a_loader_that_shuffles_shows_both_networks_the_same_examples(method):
    reference = mlp(0)
    planted = SPEC.random(generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(
        [(x,) for x in X], batch_size=40, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    found = align(permute(reference, SPEC, planted), reference, method=method, spec=SPEC, data=loader)
    assert all(torch.equal(found.permutations[name], p) for name, p in invert(planted).items())
    assert found.cost == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", ["activations", "covariance"])
@pytest.mark.parametrize("similarity", ["correlation", "cosine"])
def test_large_means_do_not_drown_what_varies(method, similarity):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        network[0].bias.fill_(3000.0)
    spec = permutation_spec(network, X)
    planted = spec.random(generator=torch.Generator().manual_seed(2))
    options = {"similarity": similarity} if method == "activations" else {}
    found = align(permute(network, spec, planted), network, method=method, spec=spec, data=list(X.split(50)), **options)
    if similarity == "correlation":  # cosines of all these are 1
        assert all(torch.equal(found.permutations[name], p) for name, p in invert(planted).items())


def test_several_values_of_a_group_count_by_the_mean_of_their_similarities():
    """A residual stream is read by two layers, before and after something is added to it."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.inner, self.leave = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 3)

        def forward(self, x, parts=False):
            first = self.enter(x).tanh()
            second = first + self.inner(first)
            return (first, second) if parts else self.leave(second)

    torch.manual_seed(3)
    model, reference = Stream(), Stream()
    spec = permutation_spec(model, X[:2])
    (name,) = spec.groups
    found = activation_matching(model, reference, spec, BATCHES)
    similarity = 0.0
    with torch.no_grad():
        for theirs, ours in zip(reference(X, parts=True), model(X, parts=True), strict=True):
            similarity = similarity + np.corrcoef(theirs.T.numpy(), ours.T.numpy())[:9, 9:] / 2
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    assert found.permutations[name].tolist() == columns.tolist()
    assert found.cost == pytest.approx(1 - similarity[rows, columns].mean(), abs=1e-5)


def test_directions_that_are_rounding_play_no_part():
    """A direction without variance that rounding leaves a little of would weigh in with a power near 0."""
    reference = mlp(0, (20, 30, 3))
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    x[:, 10:] = x[:, :10]  # half of the directions are empty
    spec = permutation_spec(reference, x[:2])
    planted = spec.random(generator=torch.Generator().manual_seed(0))
    model = permute(reference, spec, planted)
    with torch.no_grad():
        noise = 30 * torch.randn(30, 10)
        model[0].weight += torch.cat([noise, -noise], 1)  # along the empty ones
    found = covariance_matching(model, reference, spec, [(x,)], power=0.01)
    assert all(torch.equal(found.permutations[name], p) for name, p in invert(planted).items())


def test_errors():
    model, reference = mlp(0), mlp(1)
    for match in (activation_matching, covariance_matching):
        with pytest.raises(ValueError, match="data holds no batch"):
            match(model, reference, SPEC, [])
        with pytest.raises(ValueError, match="different architectures"):
            match(mlp(0, (6, 12, 11, 3)), reference, SPEC, BATCHES)
    with pytest.raises(ValueError, match="power must lie between 0 and 1"):
        covariance_matching(model, reference, SPEC, BATCHES, power=-0.1)
    with pytest.raises(ValueError, match="similarity must be correlation or cosine"):
        activation_matching(model, reference, SPEC, BATCHES, similarity="l2")
    assert activation_matching(model, reference, PermutationSpec(), BATCHES).permutations == {}
