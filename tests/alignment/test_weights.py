import warnings
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from scipy.optimize import quadratic_assignment
from torch import nn

from lit_rebasin import PermutationSpec, permutation_spec, permute, weight_matching
from lit_rebasin.alignment import l2_cost
from lit_rebasin.alignment.agreement import averaged, restrict
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
    every = [permute(ours, spec, {name: torch.tensor(p)}) for p in permutations(range(5))]
    best = min(float(l2_cost(one, reference)) for one in every)
    assert weight_matching(ours, reference, spec, normalize=False).cost == pytest.approx(best, rel=1e-5)
    best = min(1 - sum(layer_cosines(one, reference)) / 2 for one in every)
    assert weight_matching(ours, reference, spec).cost == pytest.approx(best, rel=1e-5)


def layer_cosines(ours, reference):
    layers = sorted({name.split(".")[0] for name in ours})
    vectors = [
        [torch.cat([w[name].flatten() for name in sorted(w) if name.split(".")[0] == layer]) for layer in layers]
        for w in (ours, reference)
    ]
    return [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in zip(*vectors, strict=True)]


def test_the_size_of_a_layer_plays_no_part_unless_asked():
    """A ReLU network computes the same with one layer ten times as large and the next a tenth."""
    ours, reference = weights(mlp(0, (5, 8, 8, 3))), weights(mlp(1, (5, 8, 8, 3)))
    spec = permutation_spec(mlp(0, (5, 8, 8, 3)), torch.randn(2, 5))
    scaled = {n: t * (100 if n[0] == "0" else 0.01 if n[0] == "2" else 1) for n, t in reference.items()}
    for seed in range(5):
        one, other = (weight_matching(ours, some, spec, seed=seed) for some in (reference, scaled))
        assert all(torch.equal(one.permutations[name], p) for name, p in other.permutations.items())
        assert one.cost == pytest.approx(other.cost)
    one, other = (weight_matching(ours, some, spec, normalize=False) for some in (reference, scaled))
    assert not all(torch.equal(one.permutations[name], p) for name, p in other.permutations.items())


def test_starts_where_it_is_told():
    ours, reference = weights(mlp(0)), weights(mlp(1))
    spec = permutation_spec(mlp(0), torch.randn(2, 5))
    best = weight_matching(ours, reference, spec)
    again = weight_matching(ours, reference, spec, init=best.permutations)
    assert again.history == pytest.approx([best.cost, best.cost])
    assert all(torch.equal(again.permutations[name], p) for name, p in best.permutations.items())
    found = 1 - sum(layer_cosines(permute(ours, spec, best.permutations), reference)) / 3
    assert best.cost == pytest.approx(found, abs=1e-6)


def test_restarts_find_better_optima_and_keep_the_best():
    widths = (5, 12, 12, 12, 3)
    ours, reference = weights(mlp(0, widths)), weights(mlp(1, widths))
    spec = permutation_spec(mlp(0, widths), torch.randn(2, 5))
    once, often = (weight_matching(ours, reference, spec, restarts=k) for k in (0, 20))
    assert often.cost < once.cost
    assert often.history[: len(once.history)] == once.history
    assert len(often.history) == len(once.history) + 20
    assert all(b <= a for a, b in pairwise(often.history))
    found = 1 - sum(layer_cosines(permute(ours, spec, often.permutations), reference)) / 4
    assert often.cost == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("name", ["restarts", "max_sweeps"])
def test_counts_that_are_none(name):
    spec = permutation_spec(mlp(0), torch.randn(2, 5))
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least"):
        weight_matching(weights(mlp(0)), weights(mlp(1)), spec, **{name: -1})


def test_never_worse_than_identity_and_deterministic():
    for seed in range(5):
        ours, reference = weights(mlp(seed)), weights(mlp(seed + 100))
        spec = permutation_spec(mlp(0), torch.randn(2, 5))
        alignment = weight_matching(ours, reference, spec, seed=seed)
        assert alignment.history[0] == pytest.approx(1 - sum(layer_cosines(ours, reference)) / 3, abs=1e-6)
        assert all(b <= a + 1e-9 for a, b in pairwise(alignment.history))
        plain = weight_matching(ours, reference, spec, seed=seed, normalize=False)
        assert plain.history[0] == pytest.approx(float(l2_cost(ours, reference)))
        assert all(b <= a + 1e-9 for a, b in pairwise(plain.history))
        again = weight_matching(ours, reference, spec, seed=seed)
        assert all(torch.equal(alignment.permutations[name], p) for name, p in again.permutations.items())


def test_networks_of_another_architecture():
    spec = permutation_spec(mlp(0), torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(6, 5\) in the model and \(8, 5\)"):
        weight_matching(weights(mlp(0)), weights(mlp(0, (5, 8, 7, 3))), spec)
    with pytest.raises(ValueError, match=r"'4.weight' that the reference lacks"):
        weight_matching(weights(mlp(0)), weights(mlp(0, (5, 6, 7))), spec)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
def test_scale_of_the_weights_plays_no_part(scale):
    ours, reference = weights(mlp(0)), weights(mlp(1))
    spec = permutation_spec(mlp(0), torch.randn(2, 5))
    plain = weight_matching(ours, reference, spec)
    scaled = weight_matching(
        *({name: scale * tensor.double() for name, tensor in w.items()} for w in (ours, reference)), spec
    )
    assert plain.moved > 0
    assert scaled.converged
    assert len(scaled.history) == len(plain.history)
    assert all(torch.equal(scaled.permutations[name], p) for name, p in plain.permutations.items())


def test_a_small_layer_beside_a_large_one_is_matched_too():
    """The least gain that counts is relative to the group's own tensors, not to those of the whole network."""
    reference = weights(mlp(0, (4, 6, 6, 6, 3)))
    reference = {n: t.double() * (1e-5 if n[0] in "02" else 1e4 if n[0] == "6" else 1) for n, t in reference.items()}
    spec = permutation_spec(mlp(0, (4, 6, 6, 6, 3)), torch.randn(2, 4))
    first = next(name for name, group in spec.groups.items() if any(axis.tensor == "0.weight" for axis in group.axes))
    planted = {**spec.identity(), first: torch.tensor([3, 1, 5, 0, 2, 4])}
    alignment = weight_matching(permute(reference, spec, planted), reference, spec)
    assert torch.equal(alignment.permutations[first], invert(planted)[first])


def test_order_of_the_groups_is_drawn_from_the_seed():
    """Coordinate descent ends where its order takes it; a fixed order would end in one place."""
    widths = (5, 8, 8, 8, 8, 3)
    ours, reference = weights(mlp(0, widths)), weights(mlp(1, widths))
    spec = permutation_spec(mlp(0, widths), torch.randn(2, 5))
    assert len({round(weight_matching(ours, reference, spec, seed=seed).cost, 9) for seed in range(10)}) > 1


def test_parameters_that_require_gradients_are_read_without_a_warning():
    model, reference = mlp(0), mlp(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight_matching(
            dict(model.named_parameters()),
            dict(reference.named_parameters()),
            permutation_spec(model, torch.randn(2, 5)),
        )


def test_restrict_leaves_out_the_axes_of_tensors_that_are_not_there():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    spec = permutation_spec(model.eval(), torch.randn(3, 4))
    (name,) = spec.groups
    assert "1.running_var" in {axis.tensor for axis in spec.groups[name].axes}
    left = {axis.tensor for axis in restrict(spec, weights(model)).groups[name].axes}
    assert left == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}
    alignment = weight_matching({"other": torch.ones(2)}, {"other": torch.zeros(2)}, spec, normalize=False)
    assert torch.equal(alignment.permutations[name], torch.arange(5))
    assert alignment.cost == 1
    assert weight_matching({"other": torch.ones(2)}, {"other": torch.zeros(2)}, spec).cost == 0


def recurrent(seed, size, *, edges=True):
    """An Elman layer, whose hidden units lie on both dimensions of one matrix, and the spec of it."""
    torch.manual_seed(seed)
    tensors = {"hidden": torch.randn(size, size)}
    axes = {"hidden": ("h", "h")}
    if edges:
        tensors |= {"input": torch.randn(size, 2), "output": torch.randn(2, size)}
        axes |= {"input": ("h", None), "output": (None, "h")}
    return tensors, PermutationSpec.from_axes(axes, tensors)


def test_group_on_both_axes_is_near_the_best_of_all():
    """A step of a linear assignment need not improve there: against all permutations of 6 units."""
    shares, optimal = [], 0
    for seed in range(20):
        (ours, spec), (reference, _) = recurrent(seed, 6), recurrent(seed + 100, 6)
        every = [float(l2_cost(permute(ours, spec, {"h": torch.tensor(p)}), reference)) for p in permutations(range(6))]
        alignment = weight_matching(ours, reference, spec, normalize=False)
        assert all(b <= a for a, b in pairwise(alignment.history))
        found = float(l2_cost(permute(ours, spec, alignment.permutations), reference))
        assert alignment.cost == pytest.approx(found, rel=1e-5)
        assert alignment.converged
        optimal += found <= min(every) + 1e-5
        shares.append((found - min(every)) / (sum(every) / len(every) - min(every)))
    assert optimal >= 5
    assert sum(shares) / len(shares) < 0.2  # of the way from the best to the average permutation


def test_group_on_both_axes_equals_frank_wolfe_of_scipy():
    for seed in range(10):
        (ours, spec), (reference, _) = recurrent(seed, 8, edges=False), recurrent(seed + 100, 8, edges=False)
        theirs = quadratic_assignment(
            reference["hidden"].double().numpy(),
            ours["hidden"].double().numpy(),
            options={
                "maximize": True,
                "P0": torch.eye(8).double().numpy(),
                "tol": 1e-9,
                "rng": np.random.default_rng(0),
            },
        )
        cost = float(l2_cost(permute(ours, spec, {"h": torch.tensor(theirs.col_ind)}), reference))
        assert weight_matching(ours, reference, spec, normalize=False).cost <= cost + 1e-5


def test_recovers_a_planted_permutation_of_a_recurrent_layer():
    reference, spec = recurrent(0, 32)
    planted = spec.random()
    alignment = weight_matching(permute(reference, spec, planted), reference, spec)
    assert torch.equal(alignment.permutations["h"], invert(planted)["h"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_off(mode):
    (ours, spec), (reference, _) = recurrent(0, 8), recurrent(100, 8)
    expected = weight_matching(ours, reference, spec)
    with mode():
        assert weight_matching(ours, reference, spec).history == expected.history


def test_no_step_that_does_not_improve_is_taken():
    """Here the third search ends in a plan whose nearest permutation is worse than where it began."""
    (ours, spec), (reference, _) = recurrent(13, 8), recurrent(113, 8)
    alignment = weight_matching(ours, reference, spec, init=spec.identity())
    assert alignment.converged
    assert len(alignment.history) == 4
    assert all(b <= a for a, b in pairwise(alignment.history))


def test_a_residual_stream_that_touches_many_layers_is_found_from_the_start():
    """From the identity its few fixed axes drown in the noise of all layers that are not in order yet."""
    sizes = {"enter": (16, 4), "leave": (3, 16)}
    axes = {"enter": ("stream", None), "leave": (None, "stream")}
    for block in range(12):
        sizes |= {f"up{block}": (20, 16), f"down{block}": (16, 20)}
        axes |= {f"up{block}": (f"h{block}", "stream"), f"down{block}": ("stream", f"h{block}")}
    found = {True: 0, False: 0}
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        reference = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
        spec = PermutationSpec.from_axes(axes, reference)
        planted = spec.random(generator=generator)
        model = permute(reference, spec, planted)
        for alone in found:
            init = spec.identity() if alone else None
            alignment = weight_matching(model, reference, spec, init=init, seed=seed)
            found[alone] += all(torch.equal(alignment.permutations[n], p) for n, p in invert(planted).items())
    assert found[False] == 8
    assert found[True] < 6
    both = weight_matching(model, reference, spec, seed=seed)
    assert both.history[0] == weight_matching(model, reference, spec, init=spec.identity(), seed=seed).history[0]
    assert both.cost == both.history[-1] == pytest.approx(0, abs=1e-12)


def test_averaged_is_what_an_even_plan_makes():
    ours, spec = recurrent(3, 6)
    for group in spec.groups.values():
        even = torch.full((group.size, group.size), 1 / group.size, dtype=torch.float64)
        exactly = {name: tensor.double() for name, tensor in ours.items()}
        expected = permute(exactly, PermutationSpec({group.name: group}), {group.name: even})
        for name, tensor in averaged(exactly, group).items():
            torch.testing.assert_close(tensor, expected[name])
