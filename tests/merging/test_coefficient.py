import itertools

import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath
from lit_rebasin.merging import diagonal_fisher, fisher_alpha, layer_fisher_alphas

SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (2, 3), "scale": (2,)}


def drawn(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def squared(weights):
    return {name: tensor.square() for name, tensor in weights.items()}


def joint(path, previous_fisher, new_fisher, alpha):
    """Sum of the two quadratic losses, each lowest at its own end of the path."""
    weights = path.at(alpha)
    return float(
        sum(
            0.5 * (fisher[name] * (weights[name] - end[name]) ** 2).sum()
            for fisher, end in ((previous_fisher, path.previous), (new_fisher, path.new))
            for name in weights
        )
    )


@pytest.mark.parametrize("seed", range(5))
def test_exact_on_quadratics_against_a_fine_grid(seed):
    path = LinearPath(drawn(seed), drawn(seed + 50))
    fishers = squared(drawn(seed + 100)), squared(drawn(seed + 150))
    found = fisher_alpha(path, *fishers)
    low, high = 0.0, 1.0
    for _ in range(4):  # a grid, and a finer one around its best point
        grid = torch.linspace(low, high, 201, dtype=torch.float64).tolist()
        best = min(grid, key=lambda alpha: joint(path, *fishers, alpha))
        assert all(joint(path, *fishers, found) <= joint(path, *fishers, alpha) + 1e-12 for alpha in grid)
        low, high = max(0.0, best - (high - low) / 100), min(1.0, best + (high - low) / 100)
    assert found == pytest.approx(best, abs=1e-6)


def test_every_layer_is_exact_on_quadratics_against_a_grid():
    path = LinearPath(drawn(0), drawn(1))
    fishers = squared(drawn(2)), squared(drawn(3))
    found = layer_fisher_alphas(path, *fishers)
    assert found.keys() == SHAPES.keys()
    assert found["a.weight"] == found["a.bias"]
    assert len(set(found.values())) == 3
    lowest = joint(path, *fishers, found)
    grid = torch.linspace(0, 1, 11, dtype=torch.float64).tolist()
    for a, b, c in itertools.product(grid, repeat=3):
        assert lowest <= joint(path, *fishers, {"a.weight": a, "a.bias": a, "b.weight": b, "scale": c}) + 1e-12
    assert lowest < joint(path, *fishers, fisher_alpha(path, *fishers)) - 1e-3
    for layer in ({"a.weight", "a.bias"}, {"b.weight"}, {"scale"}):
        # Around the found point, a layer by itself on a fine grid.
        fine = torch.linspace(0, 1, 501, dtype=torch.float64).tolist()
        best = min(fine, key=lambda alpha: joint(path, *fishers, {**found, **dict.fromkeys(layer, alpha)}))
        assert found[next(iter(layer))] == pytest.approx(best, abs=2e-3)


def test_alpha_is_the_weight_of_the_previous_model():
    path, fisher = LinearPath(drawn(0), drawn(1)), squared(drawn(2))
    nothing = {name: torch.zeros_like(tensor) for name, tensor in fisher.items()}
    assert fisher_alpha(path, fisher, nothing) == 1
    assert fisher_alpha(path, nothing, fisher) == 0
    assert fisher_alpha(path, fisher, fisher) == pytest.approx(0.5)
    three_times = {name: 3 * tensor for name, tensor in fisher.items()}
    assert fisher_alpha(path, three_times, fisher) == pytest.approx(0.75)


def test_where_neither_fisher_knows_the_direction():
    path = LinearPath(drawn(0), drawn(1))
    previous, new = squared(drawn(2)), squared(drawn(3))
    for fisher in (previous, new):
        fisher["b.weight"].zero_()
    assert layer_fisher_alphas(path, previous, new)["b.weight"] == fisher_alpha(path, previous, new)
    same = LinearPath(drawn(0), drawn(0))
    assert fisher_alpha(same, previous, new) == 1.0
    assert set(layer_fisher_alphas(same, previous, new).values()) == {1.0}


def test_the_statistics_of_a_layer_follow_its_weights():
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))

    previous, new = network(0), network(1)
    nn.init.normal_(new[1].weight)
    path, batches = LinearPath(previous, new), [torch.randn(20, 3)]
    fishers = diagonal_fisher(previous, batches), diagonal_fisher(new, batches)
    alphas = layer_fisher_alphas(path, *fishers)
    assert alphas["1.running_mean"] == alphas["1.running_var"] == alphas["1.weight"]
    assert alphas["2.running_var"] == fisher_alpha(path, *fishers)
    assert path.module_at(alphas)[1].num_batches_tracked == 0


def test_fishers_that_do_not_fit():
    path, fisher = LinearPath(drawn(0), drawn(1)), squared(drawn(2))
    less = {name: tensor for name, tensor in fisher.items() if name != "a.bias"}
    with pytest.raises(ValueError, match=r"new_fisher lacks the tensor 'a.bias'"):
        fisher_alpha(path, fisher, less)
    with pytest.raises(ValueError, match=r"previous_fisher lacks the tensor 'a.bias'"):
        layer_fisher_alphas(path, less, fisher)
    with pytest.raises(ValueError, match=r"has the tensor 'c', which the path lacks"):
        fisher_alpha(path, {"c": torch.ones(2)}, {"c": torch.ones(2)})
    with pytest.raises(ValueError, match=r"previous_fisher\['scale'\] has shape \(3,\), but the weights have \(2,\)"):
        fisher_alpha(path, {"scale": torch.ones(3)}, {"scale": torch.ones(2)})
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=r"new_fisher\['scale'\] must be finite and not negative"):
            fisher_alpha(path, {"scale": torch.ones(2)}, {"scale": torch.full((2,), bad)})
