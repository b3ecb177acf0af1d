from itertools import pairwise, permutations

import pytest
import torch
from torch import nn

from lit_rebasin import permutation_spec, permute, weight_matching
from lit_rebasin.alignment import l2_cost
from lit_rebasin.symmetry import invert


def mlp(seed, widths=(5, 6, 7, 3)):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def weights(model):
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def test_recovers_a_planted_permutation():
    model = mlp(0, (8, 32, 24, 4))
    spec = permutation_spec(model, torch.randn(2, 8))
    generator = torch.Generator().manual_seed(1)
    planted = {name: torch.randperm(group.size, generator=generator) for name, group in spec.groups.items()}
    alignment = weight_matching(permute(weights(model), spec, planted), weights(model), spec)
    for name, p in invert(planted).items():
        assert torch.equal(alignment.permutations[name], p)
    assert alignment.cost == pytest.approx(0, abs=1e-12)
    assert alignment.converged
    assert alignment.moved > 0


def test_one_hidden_layer_equals_brute_force():
    ours, reference = weights(mlp(0, (3, 5, 2))), weights(mlp(1, (3, 5, 2)))
    spec = permutation_spec(mlp(0, (3, 5, 2)), torch.randn(2, 3))
    (name,) = spec.groups
    best = min(float(l2_cost(permute(ours, spec, {name: torch.tensor(p)}), reference)) for p in permutations(range(5)))
    assert weight_matching(ours, reference, spec).cost == pytest.approx(best, rel=1e-5)


def test_never_worse_than_identity_and_deterministic():
    for seed in range(5):
        ours, reference = weights(mlp(seed)), weights(mlp(seed + 100))
        spec = permutation_spec(mlp(0), torch.randn(2, 5))
        alignment = weight_matching(ours, reference, spec, seed=seed)
        assert alignment.history[0] == pytest.approx(float(l2_cost(ours, reference)))
        assert all(b <= a + 1e-9 for a, b in pairwise(alignment.history))
        again = weight_matching(ours, reference, spec, seed=seed)
        assert all(torch.equal(alignment.permutations[name], p) for name, p in again.permutations.items())


def test_networks_of_another_architecture():
    spec = permutation_spec(mlp(0), torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(6, 5\) in the model and \(8, 5\)"):
        weight_matching(weights(mlp(0)), weights(mlp(0, (5, 8, 7, 3))), spec)
    with pytest.raises(ValueError, match=r"'4.weight' that the reference lacks"):
        weight_matching(weights(mlp(0)), weights(mlp(0, (5, 6, 7))), spec)
