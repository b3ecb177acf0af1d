import copy

import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath
from lit_rebasin.merging import loss_barrier, repair, repair_many

from .channels import goals, outputs_of
from .digits import accuracy, aligned_pair, digits

KINDS = ["mlp", "convnet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_means_and_spreads_are_the_mix_of_those_of_the_endpoints(kind, alpha):
    previous, new = aligned_pair(kind)
    path, inputs = LinearPath(previous, new), digits()[0]
    merged = path.module_at(alpha)
    names = repair(merged, path, alpha, merged, [inputs])
    weighted = [name for name, m in merged.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert names == weighted[:-1]
    before, after, own = (outputs_of(model, names, inputs) for model in (previous, new, merged))
    for name in names:
        mean, std = goals(before[name], after[name], alpha)
        torch.testing.assert_close(own[name].mean(1), mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own[name].std(1, correction=0), std, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rescale_corrects_spreads_and_multiplies_only(kind):
    previous, new = aligned_pair(kind)
    path, inputs = LinearPath(previous, new), digits()[0]
    merged = path.module_at(0.5)
    plain = copy.deepcopy(merged)
    names = repair(merged, path, 0.5, merged, [inputs], mean=False)
    before, after, own = (outputs_of(model, names, inputs) for model in (previous, new, merged))
    for name in names:
        _, std = goals(before[name], after[name], 0.5)
        torch.testing.assert_close(own[name].std(1, correction=0), std, rtol=1e-9, atol=1e-9)
        layer, was = merged.get_submodule(name), plain.get_submodule(name)
        scale = layer.weight.flatten(1)[:, 0] / was.weight.flatten(1)[:, 0]
        torch.testing.assert_close(layer.weight, was.weight * scale.view(-1, *[1] * (was.weight.ndim - 1)))
        torch.testing.assert_close(layer.bias, was.bias * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_many_members_give_the_mean_of_their_moments(kind):
    members, inputs = [*aligned_pair(kind), aligned_pair(kind)[0]], digits()[0]
    with torch.no_grad():
        for parameter in members[2].parameters():
            parameter.mul_(1.3)
    weights, shares = (3.0, 2.0, 1.0), (1 / 2, 1 / 3, 1 / 6)
    merged = copy.deepcopy(members[0])
    merged.load_state_dict(
        {
            name: sum(share * member.state_dict()[name] for share, member in zip(shares, members, strict=True))
            for name in merged.state_dict()
        }
    )
    names = repair_many(merged, members, merged, [inputs], weights=weights)
    outputs, own = [outputs_of(member, names, inputs) for member in members], outputs_of(merged, names, inputs)
    for name in names:
        mean = sum(share * one[name].mean(1) for share, one in zip(shares, outputs, strict=True))
        std = sum(share * one[name].std(1, correction=0) for share, one in zip(shares, outputs, strict=True))
        torch.testing.assert_close(own[name].mean(1), mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own[name].std(1, correction=0), std, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", [True, False])
def test_two_members_are_the_ends_of_a_path(mean):
    previous, new = aligned_pair("convnet")
    path, inputs = LinearPath(previous, new), digits()[0]
    merged, other = path.module_at(0.25), path.module_at(0.25)
    repair(merged, path, 0.25, merged, [inputs], mean=mean)
    repair_many(other, [path.previous, path.new], other, [inputs], weights=(1, 3), mean=mean)
    for one, two in zip(merged.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_members_that_do_not_fit():
    previous, new = aligned_pair("mlp")
    merged, inputs = copy.deepcopy(new), [digits()[0]]
    with pytest.raises(ValueError, match="members is empty"):
        repair_many(merged, [], merged, inputs)
    with pytest.raises(ValueError, match="one positive number for each of the 2 models"):
        repair_many(merged, [previous, new], merged, inputs, weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="merged holds the very tensor"):
        repair_many(merged, [previous, merged], merged, inputs)
    with pytest.raises(ValueError, match="different architectures"):
        repair_many(merged, [previous, aligned_pair("convnet")[0]], merged, inputs)


def test_layers_that_all_ends_share_are_left_alone():
    previous, new = aligned_pair("mlp")
    with torch.no_grad():
        layers = [[m for m in model.modules() if isinstance(m, nn.Linear)] for model in (previous, new)]
        layers[1][1].load_state_dict(layers[0][1].state_dict())
    path, inputs = LinearPath(previous, new), [digits()[0]]
    merged = path.module_at(0.5)
    names = repair(merged, path, 0.5, merged, inputs)
    assert len(names) == len(layers[0]) - 2
    corrected = [m for m in merged.modules() if isinstance(m, nn.Linear)][1]
    assert torch.equal(corrected.weight, layers[0][1].weight)
    assert torch.equal(corrected.bias, layers[0][1].bias)


@pytest.mark.parametrize("kind", [*KINDS, "deep mlp"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_path_stay_what_they_are(kind, mean, alpha):
    path, (inputs, _, test_inputs, _) = LinearPath(*aligned_pair(kind)), digits()
    end, merged = path.module_at(alpha), path.module_at(alpha)
    repair(merged, path, alpha, merged, [inputs], mean=mean)
    torch.testing.assert_close(merged(test_inputs), end(test_inputs), rtol=1e-9, atol=1e-9)


def test_many_batches_come_near_to_one():
    """Batches normalise by their own moments on the way, so that the result differs by what batches differ from the whole."""
    path, inputs = LinearPath(*aligned_pair("mlp")), digits()[0]
    results = []
    for batches in ([inputs], inputs.split(260), iter(inputs.split(260))):
        merged = path.module_at(0.5)
        repair(merged, path, 0.5, merged, batches)
        results.append(merged)
    whole, parts, iterator = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in results)
    assert torch.equal(parts, iterator)
    assert 0 < float((parts - whole).norm() / whole.norm()) < 0.01
    torch.testing.assert_close(results[1][0].weight, results[0][0].weight, rtol=1e-9, atol=1e-9)  # no layer before it


def test_a_deep_plain_network_works_again():
    """Eight hidden layers: averaged, little of the input comes through."""
    path, inputs = LinearPath(*aligned_pair("deep mlp")), digits()[0]
    assert min(accuracy(path.module_at(0)), accuracy(path.module_at(1))) > 0.95
    merged = path.module_at(0.5)
    repair(merged, path, 0.5, merged, [inputs])
    assert accuracy(merged) > accuracy(path.module_at(0.5)) + 0.3


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_whose_channels_have_only_shrunk_is_restored(kind, mean):
    """The fading that both methods are against, by itself: every channel times a factor, and for REPAIR with a wrong bias."""
    model, _ = aligned_pair(kind)
    path, (inputs, _, test_inputs, _) = LinearPath(model, model), digits()
    faded = path.module_at(0.5)
    layers = [module for module in faded.modules() if isinstance(module, nn.Linear | nn.Conv2d)][:-1]
    with torch.no_grad():
        for layer in layers:
            factors = torch.empty(len(layer.weight), dtype=torch.float64).uniform_(0.2, 0.8)
            layer.weight *= factors.view(-1, *[1] * (layer.weight.ndim - 1))
            layer.bias *= factors
            if mean:
                layer.bias += torch.randn_like(layer.bias)
    assert not torch.allclose(faded(test_inputs), model(test_inputs), atol=0.1)
    repair(faded, path, 0.5, faded, [inputs], mean=mean)
    torch.testing.assert_close(faded(test_inputs), model(test_inputs), rtol=1e-9, atol=1e-9)


def test_networks_with_batch_norm_get_their_statistics():
    path, inputs = LinearPath(*aligned_pair("convnet with BatchNorm")), digits()[0]
    merged = path.module_at(0.5)
    assert repair(merged, path, 0.5, merged, [inputs]) == []
    convolved = merged[1](inputs.unflatten(1, (1, 8, 8))).detach()
    torch.testing.assert_close(merged[2].running_mean, convolved.mean((0, 2, 3)))
    assert all(torch.equal(p, path.at(0.5)[name]) for name, p in merged.named_parameters())
    assert accuracy(merged) > accuracy(path.module_at(0.5)) + 0.08


def test_weights_by_name_and_half_precision():
    previous, new = aligned_pair("mlp")
    inputs = digits()[0]
    expected = LinearPath(previous, new).module_at(0.5)
    repair(expected, LinearPath(previous, new), 0.5, expected, [inputs])
    by_name = LinearPath(previous.state_dict(), new.state_dict())
    merged = copy.deepcopy(new)
    merged.load_state_dict(by_name.at(0.5))
    repair(merged, by_name, 0.5, merged, [inputs])
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in merged.state_dict().items())
    path = LinearPath(*(copy.deepcopy(model).bfloat16() for model in (previous, new)))
    half = path.module_at(0.5)
    repair(half, path, 0.5, half, [inputs.bfloat16()])
    torch.testing.assert_close(half[0].weight.double(), expected[0].weight, rtol=0.1, atol=0.02)


def test_as_statistics_of_a_barrier():
    inputs, _, test_inputs, test_targets = digits()
    path, test = LinearPath(*aligned_pair("deep mlp")), [(test_inputs, test_targets)]
    repaired = loss_barrier(path, test, 3, statistics=lambda model, alpha: repair(model, path, alpha, model, [inputs]))
    assert repaired.accuracy_barrier < 0.8 * loss_barrier(path, test, 3).accuracy_barrier


def test_half_precision_has_its_spread_restored():
    """Around a mean of ten, bfloat16 has steps of 1/16: too coarse for the rule by which a constant is told in float32."""
    torch.manual_seed(0)
    ends = [nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2)]
    inputs = torch.randn(2000, 6)
    with torch.no_grad():
        for end, spread in zip(ends, (1.0, 3.0), strict=True):
            end[0].weight *= spread / end[0](inputs).std(0)[:, None]
            end[0].bias.fill_(10.0)
    path = LinearPath(*[end.bfloat16().eval() for end in ends])
    merged = path.module_at(0.5)
    assert repair(merged, path, 0.5, merged, [inputs.bfloat16()]) == ["0"]
    torch.testing.assert_close(merged[0](inputs.bfloat16()).float().std(0), torch.full((16,), 2.0), rtol=0.05, atol=0)


def test_forward_of_another_network():
    path, inputs = LinearPath(*aligned_pair("mlp")), [digits()[0]]
    merged, other = path.module_at(0.5), path.module_at(0.5)
    with pytest.raises(ValueError, match="forward ran no layer of the merged network"):
        repair(merged, path, 0.5, other, inputs)


def test_a_layer_behind_an_activation_in_place_does_not_feed_the_batch_norm():
    torch.manual_seed(0)
    found = []
    for inplace in (True, False):
        torch.manual_seed(1)
        ends = [
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=inplace), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
            for _ in range(2)
        ]
        path, inputs = LinearPath(*ends), torch.randn(50, 6)
        merged = path.module_at(0.5)
        found.append((repair(merged, path, 0.5, merged, [inputs]), merged[0].weight.detach()))
    assert found[0][0] == found[1][0] == ["0"]
    torch.testing.assert_close(found[0][1], found[1][1])
