import copy
import math

import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath
from lit_rebasin.merging import repair

from .channels import goals, outputs_of, pair


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
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.5"):
        repair(merged, path, 1.5, merged, [inputs.nan_to_num()])
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.state_dict().items())
    with pytest.raises(ValueError, match=r"merged holds the very tensor '0.weight' of an endpoint"):
        repair(new, path, 0.5, new, [inputs])
    with pytest.raises(ValueError, match="has shape"):
        repair(nn.Sequential(nn.Linear(4, 7)), path, 0.5, merged, [inputs])
