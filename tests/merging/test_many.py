from functools import cache
from itertools import pairwise, permutations, product

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

from lit_rebasin import PermutationSpec, permutation_spec, permute, weight_matching
from lit_rebasin.alignment.agreement import in_units, restrict
from lit_rebasin.alignment.frank_wolfe import frank_wolfe_matching
from lit_rebasin.merging.common_frame import Members, pairwise_objective, weighted_sum
from lit_rebasin.merging.many import METHODS, merge_many
from lit_rebasin.symmetry import compose, invert
from lit_rebasin.transport import round_to_polytope


def mlp(*widths):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4)),
    )
    model(100 * torch.randn(8, 3, 9, 9))  # statistics that are not those of a fresh layer
    return model.eval()


@cache
def build(name, seed):
    """Return a network in float64, which no test may change, and an input."""
    torch.manual_seed(seed)
    model, shape = (mlp(6, 16, 16, 16, 16, 3), (2, 6)) if name == "mlp" else (conv_net(), (2, 3, 9, 9))
    return model.double(), torch.randn(shape, dtype=torch.float64)


@cache
def spec_of(name):
    return permutation_spec(*build(name, 0))


def small(seed, widths=(4, 6, 5, 3), count=3):
    """Return the weights of some small networks, and their spec."""
    torch.manual_seed(seed)
    models = [mlp(*widths).double() for _ in range(count)]
    spec = permutation_spec(models[0], torch.randn(2, widths[0], dtype=torch.float64))
    return [{name: tensor.detach() for name, tensor in model.named_parameters()} for model in models], spec


def agreement_of_pairs(models, shares):
    pairs = [(i, j) for i in range(len(models)) for j in range(i)]
    return sum(shares[i] * shares[j] * (models[i][n] * models[j][n]).sum() for i, j in pairs for n in models[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_permuted_copies_of_one_network_merge_to_it(name, method):
    for seed in range(3):
        (model, x), spec = build(name, seed), spec_of(name)
        generator = torch.Generator().manual_seed(seed)
        planted = [spec.random(generator=generator) for _ in range(2)]
        merged = merge_many([model, *(permute(model, spec, own) for own in planted)], spec, method=method)
        assert min(merged.history) < 1e-28 < merged.history[0]
        assert merged.converged
        for own, found in zip(planted, merged.permutations[1:], strict=True):
            assert all(torch.equal(found[group], back) for group, back in invert(own).items())
        for tensor_name, tensor in model.state_dict().items():
            torch.testing.assert_close(merged.weights[tensor_name], tensor, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(functional_call(model, merged.weights, x), model(x), rtol=1e-9, atol=1e-9)


def test_barycenter_goes_from_the_ends_inwards():
    """Not in the order of the spec: a group in the middle has next to nothing to go by before its neighbours."""
    models, spec = small(0, (6, 12, 12, 12, 12, 3))
    shuffled = PermutationSpec({name: spec.groups[name] for name in ("4", "2", "6", "0")})
    first, second = (merge_many(models, order, method="barycenter", max_steps=1) for order in (spec, shuffled))
    assert first.history == second.history
    assert first.history[1] < first.history[0]


def test_attention_is_brought_into_one_frame_too():
    """There heads, the neurons inside a head and the residual stream meet in one tensor."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 12), block, nn.Linear(12, 3)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    spec = permutation_spec(model, x)
    merged = merge_many([model, *(permute(model, spec, spec.random()) for _ in range(2))], spec)
    assert min(merged.history) < 1e-28 < merged.history[0]
    torch.testing.assert_close(functional_call(model, merged.weights, x), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_members_keep_their_function_and_the_ways_between_them_agree(method):
    models = [build("conv", seed)[0] for seed in range(3)]
    spec, x = spec_of("conv"), build("conv", 0)[1]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    merged = merge_many(models, spec, method=method)
    moved = [permute(model, spec, own) for model, own in zip(models, merged.permutations, strict=True)]
    for model, member, own, old in zip(models, moved, merged.permutations, before, strict=True):
        torch.testing.assert_close(member(x), model(x))
        assert set(own) == set(spec.groups)
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p, spec.identity()[name]) for name, p in merged.permutations[0].items())
    assert any(not torch.equal(p, spec.identity()[name]) for name, p in merged.permutations[1].items())
    way = {
        (i, j): compose(merged.permutations[i], invert(merged.permutations[j])) for i, j in product(range(3), repeat=2)
    }
    for i, j, k in permutations(range(3)):
        through = compose(way[i, j], way[j, k])
        assert all(torch.equal(through[name], p) for name, p in way[i, k].items())
    for name, tensor in merged.weights.items():
        average = torch.stack([member.state_dict()[name].double() for member in moved]).mean(0)
        torch.testing.assert_close(tensor.double(), average if tensor.is_floating_point() else before[0][name].double())


@pytest.fixture(scope="module")
def digits():
    """Four classifiers of digits that differ in their seed, and their test loss as a function of weights."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    members = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = mlp(64, 64, 64, 64, 10)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(15):
            for batch in torch.randperm(1300).split(100):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        members.append(model)

    def loss(weights):
        with torch.no_grad():
            logits = functional_call(members[0], weights, images[1300:])
        return float(nn.functional.cross_entropy(logits, labels[1300:]))

    return members, loss


@pytest.mark.parametrize("method", METHODS)
def test_merged_classifiers_are_far_better_than_their_naive_average(digits, method):
    members, loss = digits
    naive = {name: torch.stack([m.state_dict()[name] for m in members]).mean(0) for name in members[0].state_dict()}
    spec = permutation_spec(members[0], torch.randn(2, 64))
    merged = merge_many(members, spec, method=method)
    assert loss(merged.weights) < 0.3 * loss(naive)
    assert min(merged.history) < 0.7 * merged.history[0]
    again = merge_many(members, spec, method=method)
    assert again.history == merged.history
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in merged.weights.items())


@pytest.mark.parametrize("count", [2, 3])
def test_gradient_of_the_pairs_is_that_of_autograd(count):
    models, spec = small(0, count=count)
    shares = [0.5, 0.3, 0.2][:count]
    objective = pairwise_objective(Members(models, shares, spec))
    plans = {
        (i, name): round_to_polytope(torch.rand(group.size, group.size, dtype=torch.float64) ** 3).requires_grad_()
        for i in range(1, count)
        for name, group in spec.groups.items()
    }
    moved = [models[0]]
    moved += [permute(models[i], spec, {name: plans[i, name] for name in spec.groups}) for i in range(1, count)]
    agreement_of_pairs(moved, shares).backward()
    gradient = objective.gradient({key: plan.detach() for key, plan in plans.items()})
    assert gradient.keys() == plans.keys()
    for key, plan in plans.items():
        torch.testing.assert_close(gradient[key], plan.grad)


def test_spread_falls_as_the_pairs_agree():
    """For permutations, ``spread * count = const - 2 * agreement``."""
    models, spec = small(0)
    shares = [0.5, 0.3, 0.2]
    members = Members(models, shares, spec)
    count = sum(tensor.numel() for tensor in models[0].values())
    sums = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        own = [spec.random(generator=generator) for _ in models]
        agreement = float(agreement_of_pairs([permute(m, spec, p) for m, p in zip(models, own, strict=True)], shares))
        sums.append(members.spread(own) * count + 2 * agreement)
    assert sums == pytest.approx([sums[0]] * 4)


def test_two_models_are_matched_as_by_frank_wolfe():
    for seed in range(5):
        (reference, model), spec = small(seed, (5, 12, 12, 3), count=2)
        expected = frank_wolfe_matching(model, reference, spec)
        merged = merge_many([reference, model], spec)
        assert expected.moved > 0
        assert all(torch.equal(merged.permutations[1][name], p) for name, p in expected.permutations.items())
        # The same but for the units: here of both models together, there of each.
        assert len(merged.history) == len(expected.history)


def test_merge_many_ends_where_no_model_moves():
    models, spec = small(0, (5, 12, 12, 3), count=4)
    merged = merge_many(models, spec, method="merge-many")
    assert merged.converged
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(merged.history))
    moved = [permute(model, spec, own) for model, own in zip(models, merged.permutations, strict=True)]
    moved = in_units(moved)
    for index, model in enumerate(moved):
        rest = [other for j, other in enumerate(moved) if j != index]
        average = {name: sum(other[name] for other in rest) / 3 for name in model}
        assert weight_matching(model, average, spec, normalize=False).moved == 0


@pytest.mark.parametrize("method", METHODS)
def test_history_holds_spreads_and_few_steps_are_never_worse_than_the_start(method):
    for steps in (0, 1, 50):
        models, spec = small(1, (5, 12, 12, 3))
        merged = merge_many(models, spec, method=method, max_steps=steps)
        moved = [permute(model, spec, own) for model, own in zip(models, merged.permutations, strict=True)]
        spreads = []
        for some in (models, moved):
            squares = 0.0
            for layer in {name.split(".")[0] for name in some[0]}:
                stacked = [torch.stack([m[name] for m in some]) for name in some[0] if name.split(".")[0] == layer]
                unit = sum(float(tensor.square().sum()) for tensor in stacked) / len(some)
                squares += sum(float(tensor.var(0, unbiased=False).sum()) for tensor in stacked) / unit
            spreads.append(squares / sum(tensor.numel() for tensor in some[0].values()))
        assert merged.history[0] == pytest.approx(spreads[0])
        assert min(merged.history) == pytest.approx(spreads[1])
    assert spreads[1] < spreads[0]


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_the_shares_of_the_average_and_of_what_is_maximised(method):
    models, spec = small(2, (5, 12, 12, 3))
    merged = merge_many(models, spec, method=method, weights=[2, 5, 3])
    moved = [permute(model, spec, own) for model, own in zip(models, merged.permutations, strict=True)]
    for name, tensor in merged.weights.items():
        torch.testing.assert_close(tensor, weighted_sum([m[name] for m in moved], [0.2, 0.5, 0.3]))
    # The third model has next to no say: the second is matched to the first as if they were alone.
    two = merge_many(models[:2], spec, method=method)
    three = merge_many(models, spec, method=method, weights=[1, 1, 1e-7])
    if method != "barycenter":  # whose particles are drawn anew for three
        assert all(torch.equal(three.permutations[1][name], p) for name, p in two.permutations[1].items())


def test_seed_draws_the_order_of_the_models():
    models, spec = small(3, (5, 12, 12, 12, 3), count=4)
    found = {min(merge_many(models, spec, method="merge-many", seed=seed).history) for seed in range(6)}
    assert len(found) > 1


def test_statistics_are_averaged_but_play_no_part_in_the_matching():
    models, spec = [build("conv", seed)[0] for seed in range(3)], spec_of("conv")
    parameters = [dict(model.named_parameters()) for model in models]
    of_modules = merge_many(models, spec)
    of_states = merge_many([model.state_dict() for model in models], spec)
    of_parameters = merge_many(parameters, restrict(spec, parameters[0]))
    for other in (of_states, of_parameters):
        for own, same in zip(of_modules.permutations, other.permutations, strict=True):
            assert all(torch.equal(own[name], p) for name, p in same.items())
    assert "1.running_var" in of_modules.weights
    assert all(torch.equal(tensor, of_modules.weights[name]) for name, tensor in of_states.weights.items())


def test_what_all_models_share_is_exact_and_dtypes_are_kept():
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = mlp(4, 6, 3).bfloat16()
        model.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.1]))
        model.register_buffer("count", torch.tensor(seed + 7))
        models.append(model)
    spec = permutation_spec(mlp(4, 6, 3), torch.randn(2, 4))
    merged = merge_many(models, spec)
    assert torch.equal(merged.weights["mask"], models[0].mask)
    assert merged.weights["count"] == 7
    assert {merged.weights[name].dtype for name in models[0].state_dict()} == {
        torch.bfloat16,
        torch.float32,
        torch.int64,
    }
    merged.weights["count"] += 1
    assert models[0].count == 7


def test_a_spec_that_moves_nothing_gives_the_plain_average():
    models, _ = small(0)
    for method in METHODS:
        merged = merge_many(models, PermutationSpec(), method=method)
        for name, tensor in merged.weights.items():
            torch.testing.assert_close(tensor, torch.stack([model[name] for model in models]).mean(0))
        assert merged.converged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_neurons_that_are_all_the_same(method, value):
    models = [{name: torch.full_like(tensor, value) for name, tensor in model.items()} for model in small(0)[0]]
    models[2]["0.weight"][1, 2] = 1.0
    merged = merge_many(models, small(0)[1], method=method)
    assert merged.weights["0.weight"].max() == pytest.approx((1 + 2 * value) / 3)
    assert merged.converged


def test_errors():
    models, spec = small(0)
    with pytest.raises(ValueError, match="at least two modules"):
        merge_many(models[:1], spec)
    with pytest.raises(ValueError, match="at least two modules"):
        merge_many(mlp(4, 6, 5, 3), spec)
    with pytest.raises(ValueError, match=r"models\[2\] does not fit models\[0\].*'2.weight' has shape \(9, 6\)"):
        merge_many([*models[:2], small(0, (4, 6, 9, 3))[0][0]], spec)
    broken = {**models[1], "2.bias": models[1]["2.bias"].clone()}
    for value in (float("nan"), float("inf")):
        broken["2.bias"][0] = value
        with pytest.raises(ValueError, match=r"'2.bias' of models\[1\] holds a NaN or an infinity"):
            merge_many([models[0], broken], spec)
    with pytest.raises(ValueError, match="'average'; choose one of cycle-consistent, merge-many, barycenter"):
        merge_many(models, spec, method="average")
    for wrong in ([1, 1], [1, 1, 0], [1, 1, float("nan")], [1, 1, -1]):
        with pytest.raises(ValueError, match="weights must be one positive number for each of the 3 models"):
            merge_many(models, spec, weights=wrong)
    with pytest.raises(ValueError, match=r"expects dimension 0 of '0\.weight' to be 8 long"):
        merge_many(models, small(0, (4, 8, 5, 3))[1])
    with pytest.raises(ValueError, match=r"there is no tensor '6\.weight'"):
        merge_many(models, small(0, (4, 6, 5, 3, 2))[1])
