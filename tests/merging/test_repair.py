import copy
import math

import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath
from lit_rebasin.merging import loss_barrier, repair

from .digits import accuracy, aligned_pair, digits

KINDS = ["mlp", "convnet"]


def outputs_of(model, names, inputs):
    """Return what layers put out, as (channels, everything else)."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: found.update({name: out}))
        for name in names
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return {name: out.movedim(1, 0).flatten(1) for name, out in found.items()}


def goals(values_previous, values_new, alpha):
    mean = alpha * values_previous.mean(1) + (1 - alpha) * values_new.mean(1)
    return mean, alpha * values_previous.std(1, correction=0) + (1 - alpha) * values_new.std(1, correction=0)


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


def pair(build):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build().double().eval())
    return models


def corrected(build, inputs, alpha=0.3, **options):
    previous, new = pair(build)
    path = LinearPath(previous, new)
    merged = path.module_at(alpha)
    names = repair(merged, path, alpha, merged, [inputs], **options)
    return previous, new, merged, names


LAYERS = {
    "linear on sequences": (lambda: nn.Linear(4, 6), (5, 7, 4), -1),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (5, 4, 7), 1),
    "conv3d": (lambda: nn.Conv3d(4, 6, 1), (5, 4, 3, 3, 3), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 6), 1),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (5, 4, 6, 6), 1),
    "grouped and transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (5, 4, 6), 1),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 9), 0),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind):
    build, shape, dim = LAYERS[kind]
    inputs = torch.randn(shape).double()
    previous, new, merged, names = corrected(lambda: Ending(build()), inputs)
    assert names == ["layer"]
    rows = [model.layer(inputs).movedim(dim, 0).flatten(1).detach() for model in (previous, new, merged)]
    mean, std = goals(rows[0], rows[1], 0.3)
    torch.testing.assert_close(rows[2].mean(1), mean)
    torch.testing.assert_close(rows[2].std(1, correction=0), std)


class Ending(nn.Module):
    """A layer, and one behind it whose output leaves the network."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(1, 2)

    def forward(self, x):
        return self.head(self.layer(x).relu().flatten()[:, None]).sigmoid()


def test_a_layer_without_a_bias_is_scaled_and_gets_none():
    inputs = torch.randn(50, 4).double() + 1
    previous, new, merged, names = corrected(
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
        inputs,
    )
    assert names == ["0", "2"]
    assert merged.state_dict().keys() == new.state_dict().keys()
    before, after, own = (outputs_of(model, names, inputs) for model in (previous, new, merged))
    for name in names:
        mean, std = goals(before[name], after[name], 0.3)
        torch.testing.assert_close(own[name].std(1, correction=0), std)
        assert torch.allclose(own[name].mean(1), mean) == (name == "2")


def test_channels_that_are_constant_stay_finite():
    """In the merge, in an endpoint, and in both; weights of rounding size count as none."""
    previous, new = pair(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    with torch.no_grad():
        new[0].weight[0] = -previous[0].weight[0]  # cancels half-way
        new[0].weight[1] = 0
        for model in (previous, new):
            model[0].weight[2] = 1e-17
            model[0].bias[2] = 1.0 + model[0].bias[3]
    path, inputs = LinearPath(previous, new), torch.randn(50, 4).double()
    merged = path.module_at(0.5)
    repair(merged, path, 0.5, merged, [inputs])
    before, after, own = (outputs_of(model, ["0"], inputs)["0"] for model in (previous, new, merged))
    mean, std = goals(before, after, 0.5)
    torch.testing.assert_close(own.mean(1), mean)
    torch.testing.assert_close(own.std(1, correction=0)[[1, 3, 4, 5]], std[[1, 3, 4, 5]])
    assert float(own.std(1, correction=0)[0]) == 0
    assert merged(inputs).isfinite().all()


class Mixed(nn.Module):
    """BatchNorm behind one layer, none behind another; one layer twice, two with one weight, and two outputs."""

    def __init__(self):
        super().__init__()
        self.normed, self.norm, self.plain = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.twice, self.tied, self.other, self.behind = (nn.Linear(8, 8) for _ in range(4))
        self.other.weight = self.tied.weight
        self.drop, self.value, self.classes = nn.Dropout(0.5), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x):
        h = self.drop(self.plain(self.norm(self.normed(x)).relu())).relu()
        h = self.other(self.tied(self.twice(self.twice(h).relu()).relu()).relu()).relu()
        h = self.behind(h).relu()
        return {"value": self.value(h), "classes": self.classes(h).log_softmax(1)}


def test_only_layers_that_one_correction_fits():
    inputs = torch.randn(60, 4).double()
    previous, new, merged, names = corrected(Mixed, inputs)
    assert names == ["plain", "behind"]
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, LinearPath(previous, new).at(0.3)[n])}
    assert changed == {"plain.weight", "plain.bias", "behind.weight", "behind.bias"}
    before = merged.normed(inputs).detach()
    torch.testing.assert_close(merged.norm.running_mean, before.mean(0))
    torch.testing.assert_close(merged.norm.running_var, before.var(0))


def test_networks_with_batch_norm_get_their_statistics():
    path, inputs = LinearPath(*aligned_pair("convnet with BatchNorm")), digits()[0]
    merged = path.module_at(0.5)
    assert repair(merged, path, 0.5, merged, [inputs]) == []
    convolved = merged[1](inputs.unflatten(1, (1, 8, 8))).detach()
    torch.testing.assert_close(merged[2].running_mean, convolved.mean((0, 2, 3)))
    assert all(torch.equal(p, path.at(0.5)[name]) for name, p in merged.named_parameters())
    assert accuracy(merged) > accuracy(path.module_at(0.5)) + 0.08


def test_goals_of_a_layer_take_the_alpha_of_its_weight():
    previous, new = pair(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    path, inputs = LinearPath(previous, new), torch.randn(50, 4).double()
    alphas = {name: 0.2 if name.startswith("0") else 0.9 for name in path.new}
    merged = path.module_at(alphas)
    repair(merged, path, alphas, merged, [inputs])
    before, after, own = (outputs_of(model, ["0", "2"], inputs) for model in (previous, new, merged))
    for name, alpha in (("0", 0.2), ("2", 0.9)):
        mean, std = goals(before[name], after[name], alpha)
        torch.testing.assert_close(own[name].mean(1), mean)
        torch.testing.assert_close(own[name].std(1, correction=0), std)


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


def test_endpoints_and_modes_are_left_and_no_hook_stays():
    previous, new = pair(Mixed)
    path, inputs = LinearPath(previous, new), torch.randn(60, 4).double()
    merged = path.module_at(0.5).train()
    merged.norm.eval()
    modes, states = (
        [part.training for part in merged.modules()],
        [copy.deepcopy(m.state_dict()) for m in (previous, new)],
    )
    repair(merged, path, 0.5, merged, [inputs])
    assert [part.training for part in merged.modules()] == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in merged.modules())
    for model, state in zip((previous, new), states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("at", range(1, 7))
def test_a_failure_leaves_the_network_as_it_was(at):
    path, inputs = LinearPath(*pair(Mixed)), torch.randn(60, 4).double()
    merged = path.module_at(0.5)
    state = copy.deepcopy(merged.state_dict())
    calls = []

    def forward(batch):
        calls.append(batch)
        if len(calls) == at:
            raise RuntimeError("out of memory")
        return merged(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        repair(merged, path, 0.5, forward, inputs.split(30))
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in merged.modules())


def test_bad_arguments():
    previous, new = pair(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    path, inputs = LinearPath(previous, new), torch.randn(20, 4).double()
    merged = path.module_at(0.5)
    state = copy.deepcopy(merged.state_dict())
    with pytest.raises(ValueError, match="batches is empty"):
        repair(merged, path, 0.5, merged, [])
    inputs[3, 2] = math.nan
    with pytest.raises(ValueError, match=r"outputs of layer '0' have a NaN or infinite"):
        repair(merged, path, 0.5, merged, [inputs])
    with pytest.raises(ValueError, match=r"alpha has no number for the tensor '0.weight'"):
        repair(merged, path, {}, merged, [inputs.nan_to_num()])
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.state_dict().items())
    with pytest.raises(ValueError, match=r"merged holds the very tensor '0.weight' of an endpoint"):
        repair(new, path, 0.5, new, [inputs])
    with pytest.raises(ValueError, match="has shape"):
        repair(nn.Sequential(nn.Linear(4, 7)), path, 0.5, merged, [inputs])


def test_as_statistics_of_a_barrier():
    inputs, _, test_inputs, test_targets = digits()
    path, test = LinearPath(*aligned_pair("convnet")), [(test_inputs, test_targets)]
    repaired = loss_barrier(path, test, 3, statistics=lambda model, alpha: repair(model, path, alpha, model, [inputs]))
    assert repaired.accuracy_barrier < 0.8 * loss_barrier(path, test, 3).accuracy_barrier
