from functools import partial
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lit_rebasin import PermutationSpec, permutation_spec, permute, weight_matching
from lit_rebasin.alignment import l2_cost
from lit_rebasin.alignment.agreement import joint_degree, joint_gain, restrict
from lit_rebasin.alignment.frank_wolfe import best_step, frank_wolfe_matching, interpolation
from lit_rebasin.symmetry import invert
from lit_rebasin.transport import assignment, round_to_polytope


class Encoder(nn.Module):
    """One block of attention: heads, the neurons inside a head and the residual stream meet in one tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(self.up(self.norm(x)).relu()))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


def mlp(widths=(5, 6, 7, 3)):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 4)),
    )


NETWORKS = {
    "mlp": (lambda: mlp((8, 32, 24, 24, 4)), (2, 8)),
    "conv": (conv_net, (2, 3, 12, 12)),
    "attention": (Encoder, (2, 5, 6)),
    "lstm": (Recurrent, (2, 5, 4)),
}


def network(name, seed):
    """Return a network in evaluation mode whose biases and norms are not all the same, and an input."""
    build, shape = NETWORKS[name]
    torch.manual_seed(seed)
    model = build().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(shape)


def parameters(model):
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def pair(seed, widths=(5, 6, 7, 3)):
    torch.manual_seed(seed)
    ours, reference = parameters(mlp(widths)), parameters(mlp(widths))
    return ours, reference, permutation_spec(mlp(widths), torch.randn(2, widths[0]))


def recurrent(size, seed, *, edges=True):
    torch.manual_seed(seed)
    tensors = {"hidden": torch.randn(size, size)}
    axes = {"hidden": ("h", "h")}
    if edges:
        tensors |= {"input": torch.randn(size, 2), "output": torch.randn(2, size)}
        axes |= {"input": ("h", None), "output": (None, "h")}
    return tensors, PermutationSpec.from_axes(axes, tensors)


# What the objective is without the scales of the layers.
matching = partial(frank_wolfe_matching, normalize=False)


def random_plans(spec, generator):
    return {
        name: round_to_polytope(torch.rand(g.size, g.size, generator=generator, dtype=torch.float64) ** 3)
        for name, g in spec.groups.items()
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETWORKS)
def test_recovers_a_planted_permutation(name, seed):
    model, x = network(name, seed)
    spec = permutation_spec(model, x)
    planted = spec.random(generator=torch.Generator().manual_seed(seed))
    moved = permute(model, spec, planted)
    alignment = frank_wolfe_matching(parameters(moved), parameters(model), spec)
    assert alignment.cost == pytest.approx(0, abs=1e-12)
    assert alignment.converged
    assert alignment.moved > 0
    for group, p in invert(planted).items():
        assert torch.equal(alignment.permutations[group], p)
    back = permute(moved, spec, alignment.permutations)
    torch.testing.assert_close(back(x), model(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_function_of_the_permuted_model_is_unchanged(name):
    (model, x), (reference, _) = network(name, 0), network(name, 1)
    spec = permutation_spec(model, x)
    alignment = frank_wolfe_matching(parameters(model), parameters(reference), spec)
    assert alignment.moved > 0
    torch.testing.assert_close(permute(model, spec, alignment.permutations)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_is_that_of_autograd(name):
    (model, x), (reference, _) = network(name, 0), network(name, 1)
    ours, theirs = ({n: t.double() for n, t in parameters(m).items()} for m in (model, reference))
    spec = restrict(permutation_spec(model, x), ours)
    plans = {n: plan.requires_grad_() for n, plan in random_plans(spec, torch.Generator().manual_seed(0)).items()}
    moved = permute(ours, spec, plans)
    sum((moved[n] * theirs[n]).sum() for n in moved).backward()
    for group, gradient in joint_gain(ours, theirs, spec, {n: plan.detach() for n, plan in plans.items()}).items():
        torch.testing.assert_close(gradient, plans[group].grad)


@pytest.mark.parametrize(("name", "expected"), [("mlp", 2), ("conv", 2), ("attention", 3), ("lstm", 2)])
def test_degree_is_that_of_the_agreement_along_a_line(name, expected):
    """The finite difference of an order above the degree vanishes, and that of its order does not."""
    (model, x), (reference, _) = network(name, 0), network(name, 1)
    ours, theirs = ({n: t.double() for n, t in parameters(m).items()} for m in (model, reference))
    spec = restrict(permutation_spec(model, x), ours)
    start, end = (random_plans(spec, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    values = []
    for t in range(5):
        moved = permute(ours, spec, {n: (1 - t) * start[n] + t * end[n] for n in start})
        values.append(float(sum((moved[n] * theirs[n]).sum() for n in moved)))
    degree = joint_degree(spec, ours)
    assert degree == expected
    assert abs(np.diff(values, degree)).max() > 1e-6
    assert abs(np.diff(values, degree + 1)).max() < 1e-9 * abs(np.array(values)).max()


def test_degree_of_parts_that_lie_side_by_side_is_that_of_one():
    tensors = {"joined": torch.randn(8, 3)}
    spec = PermutationSpec.from_axes({"joined": ("a", "b")}, tensors)
    a, b = spec.groups.values()
    halves = [type(a)(n, 4, (type(a.axes[0])("joined", 0, start=s, length=8),)) for n, s in (("a", 0), ("c", 4))]
    assert joint_degree(PermutationSpec({"a": halves[0], "c": halves[1]}), tensors) == 1
    assert joint_degree(PermutationSpec({"a": halves[0], "c": halves[1], "b": b}), tensors) == 2
    assert joint_degree(PermutationSpec(), tensors) == 0


numbers = st.floats(-10, 10).filter(lambda x: x == 0 or abs(x) > 1e-3)


@settings(max_examples=200, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=5), st.floats(1e-3, 10))
@example([-3.0, 0.0], 1.0)  # of a lower degree than its nodes allow
def test_line_search_equals_a_fine_grid(coefficients, slope):
    """Of polynomials that rise at 0, by their slopes at Chebyshev's points."""
    rise = np.polynomial.Polynomial([0, slope, *coefficients])
    nodes = (1 - np.cos(np.linspace(0, np.pi, rise.degree()))) / 2
    found = best_step(nodes, rise.deriv()(nodes))
    grid = rise(np.linspace(0, 1, 10001))
    assert 0 < found <= 1
    assert rise(found) >= grid.max() - 1e-9 * abs(grid).max()


@pytest.mark.parametrize("points", [1, 2, 3, 4, 6])
def test_interpolation_is_exact_for_polynomials(points):
    nodes = np.linspace(0, 1, points)
    polynomial = np.polynomial.Polynomial(np.random.default_rng(0).normal(size=points))
    for t in (0.0, 0.3, 1.0):
        assert np.dot(interpolation(nodes, t), polynomial(nodes)) == pytest.approx(polynomial(t))


def test_two_layers_against_every_pair_of_permutations():
    optimal = 0
    for seed in range(20):
        ours, reference, spec = pair(seed, (3, 4, 4, 2))
        every = [
            float(l2_cost(permute(ours, spec, dict(zip(spec.groups, both, strict=True))), reference))
            for both in product([torch.tensor(p) for p in permutations(range(4))], repeat=2)
        ]
        cost = matching(ours, reference, spec).cost
        assert cost >= min(every) - 1e-6
        assert cost <= float(l2_cost(ours, reference)) + 1e-9
        optimal += cost <= min(every) + 1e-6
    assert optimal >= 10


def test_group_on_both_axes_is_near_the_best_of_all():
    shares = []
    for seed in range(20):
        (ours, spec), (reference, _) = recurrent(6, seed), recurrent(6, seed + 100)
        every = [float(l2_cost(permute(ours, spec, {"h": torch.tensor(p)}), reference)) for p in permutations(range(6))]
        alignment = matching(ours, reference, spec)
        shares.append((alignment.cost - min(every)) / (sum(every) / len(every) - min(every)))
    assert sum(shares) / len(shares) < 0.15  # of the way from the best to the average permutation


def test_a_start_that_prefers_nothing_is_left():
    """Nothing but ``P W P^T``: at even plans the gradient is the same everywhere."""
    (ours, spec), (reference, _) = recurrent(8, 0, edges=False), recurrent(8, 1, edges=False)
    alignment = matching(ours, reference, spec)
    assert alignment.cost < alignment.history[0]


def test_no_group_alone_could_gain():
    for seed in range(5):
        ours, reference, spec = pair(seed, (6, 12, 12, 12, 3))
        alignment = matching(ours, reference, spec)
        assert alignment.converged
        moved, theirs = (
            {n: t.double() for n, t in w.items()} for w in (permute(ours, spec, alignment.permutations), reference)
        )
        for gain in joint_gain(moved, theirs, spec, spec.identity()).values():
            best = gain[torch.arange(len(gain)), assignment(gain)].sum()
            assert best <= gain.diagonal().sum() + 1e-9


def test_higher_than_coordinate_descent_on_average():
    lower = []
    for seed in range(12):
        ours, reference, spec = pair(seed, (8, 24, 24, 24, 24, 3))
        descent = weight_matching(ours, reference, spec, init=spec.identity(), normalize=False)
        lower.append(descent.cost - matching(ours, reference, spec).cost)
    assert sum(lower) > 0


def test_cost_and_history():
    ours, reference, spec = pair(0)
    alignment = matching(ours, reference, spec)
    assert alignment.method == "frank-wolfe"
    assert alignment.history[0] == pytest.approx(float(l2_cost(ours, reference)))
    assert alignment.cost == min(alignment.history) < alignment.history[0]
    assert alignment.cost == pytest.approx(float(l2_cost(permute(ours, spec, alignment.permutations), reference)))
    again = matching(ours, reference, spec)
    assert again.history == alignment.history
    assert all(torch.equal(alignment.permutations[name], p) for name, p in again.permutations.items())


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_few_steps_are_never_worse_than_the_start(steps):
    for seed in range(5):
        ours, reference, spec = pair(seed, (5, 10, 10, 3))
        start = spec.random(generator=torch.Generator().manual_seed(seed))
        alignment = matching(ours, reference, spec, init=start, max_steps=steps)
        assert alignment.history[0] == pytest.approx(float(l2_cost(permute(ours, spec, start), reference)))
        assert alignment.cost <= alignment.history[0]
    if steps == 0:
        assert all(torch.equal(alignment.permutations[name], p) for name, p in start.items())
        assert not alignment.converged


def test_an_optimum_given_as_the_start_is_kept():
    ours, reference, spec = pair(3, (6, 12, 12, 3))
    best = matching(ours, reference, spec)
    again = matching(ours, reference, spec, init=best.permutations)
    assert again.converged
    assert again.cost == again.history[0] == best.cost


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scale_of_the_weights_plays_no_part(scale):
    ours, reference, spec = pair(0)
    plain = matching(ours, reference, spec)
    scaled = matching(*({n: scale * t.double() for n, t in w.items()} for w in (ours, reference)), spec)
    assert plain.moved > 0
    assert all(torch.equal(scaled.permutations[name], p) for name, p in plain.permutations.items())


def test_a_small_layer_beside_a_large_one_is_matched_too():
    torch.manual_seed(0)
    model = mlp((4, 6, 6, 6, 3))
    reference = {
        n: t.double() * (1e-5 if n[0] in "02" else 1e4 if n[0] == "6" else 1) for n, t in parameters(model).items()
    }
    spec = permutation_spec(model, torch.randn(2, 4))
    planted = spec.random(generator=torch.Generator().manual_seed(0))
    alignment = matching(permute(reference, spec, planted), reference, spec)
    assert all(torch.equal(alignment.permutations[name], p) for name, p in invert(planted).items())


def test_tensors_that_are_not_there_play_no_part():
    model, x = network("conv", 0)
    spec = permutation_spec(model, x)
    alignment = matching({"other": torch.ones(2)}, {"other": torch.zeros(2)}, spec)
    assert alignment.moved == 0
    assert alignment.cost == 1
    assert set(alignment.permutations) == set(spec.groups)


def test_errors():
    ours, reference, spec = pair(0)
    with pytest.raises(ValueError, match=r"'4.weight' has shape \(4, 7\) in the model and \(3, 7\)"):
        matching(pair(0, (5, 6, 7, 4))[0], reference, spec)
    name = next(iter(spec.groups))
    with pytest.raises(ValueError, match="must hold each of 0"):
        matching(ours, reference, spec, init={name: torch.zeros(spec.groups[name].size, dtype=torch.long)})

    with pytest.raises(ValueError, match=r"unknown groups \[.other.\]"):
        matching(ours, reference, spec, init={"other": torch.arange(3)})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_off_and_on_half_precision(mode):
    ours, reference, spec = pair(0)
    expected = matching(ours, reference, spec)
    half = [{n: t.half() for n, t in w.items()} for w in (ours, reference)]
    with mode():
        assert matching(ours, reference, spec).history == expected.history
        assert matching(*half, spec).cost == pytest.approx(expected.cost, rel=1e-2)


def test_layers_count_by_their_cosines():
    (ours, reference), spec = (
        (parameters(network("mlp", seed)[0]) for seed in (0, 1)),
        permutation_spec(*network("mlp", 0)),
    )
    alignment = frank_wolfe_matching(ours, reference, spec)
    layers = sorted({name.split(".")[0] for name in ours})
    moved = permute(ours, spec, alignment.permutations)
    vectors = [
        [torch.cat([w[f"{layer}.weight"].flatten(), w[f"{layer}.bias"]]) for layer in layers]
        for w in (moved, reference)
    ]
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(*vectors, strict=True)]
    assert alignment.cost == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)
    scaled = {name: 100 * tensor if name.startswith("0.") else tensor for name, tensor in reference.items()}
    again = frank_wolfe_matching(ours, scaled, spec)
    assert all(torch.equal(again.permutations[name], p) for name, p in alignment.permutations.items())
