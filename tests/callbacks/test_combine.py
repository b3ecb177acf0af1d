"""Merges by RegMean, against the least squares fit of every layer on what the networks are given."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy

from lit_rebasin import RebasinMerge, align, permutation_spec, permute

from .plain import Held, Plain, X, batches, merged, tensors
from .user_code import make_trainer

ALPHA = 0.6


def inputs_of(network):
    """What every linear layer of a network takes in on all examples, a 1 behind it."""
    found, x = {}, X
    for number, layer in enumerate(network):
        if isinstance(layer, nn.Linear):
            found[number] = torch.cat([x, torch.ones(len(x), 1)], 1).detach().double()
        x = layer(x)
    return found


def moments_of(network):
    return {number: x.T @ x / len(x) for number, x in inputs_of(network).items()}


def affine(network, number):
    return torch.cat([network[number].weight, network[number].bias[:, None]], 1).detach().double()


def fitted(previous, new, known):
    """The minimiser of both quadratic costs with a ridge, by the normal equations, and the moments of its cost."""
    layers, joint = {}, {}
    for number, measured in moments_of(new).items():
        ridged = [m + 1e-3 * m.diagonal().mean() * torch.eye(len(m)).double() for m in (known[number], measured)]
        curvature = ALPHA * ridged[0] + (1 - ALPHA) * ridged[1]
        slope = ALPHA * affine(previous, number) @ ridged[0] + (1 - ALPHA) * affine(new, number) @ ridged[1]
        layers[number] = slope @ curvature.inverse()
        joint[number] = ALPHA * known[number] + (1 - ALPHA) * measured
    return layers, joint


def test_every_layer_is_the_fit_to_both_aligned_networks(tmp_path):
    _, held = merged(tmp_path, RebasinMerge(ALPHA, combine="regmean"), tasks=1)
    known = moments_of(held.trained)
    merge = RebasinMerge(ALPHA, combine="regmean", seed=0)
    torch.manual_seed(0)
    module, held = Plain(), Held()
    for task in range(3):
        make_trainer(tmp_path, held, merge, max_epochs=5).fit(module, batches(task))
        if task == 0:
            continue
        spec = permutation_spec(held.trained, X[:30])
        alignment = align(held.trained, held.previous, spec=spec, seed=task)
        assert alignment.moved > 0
        new = permute(held.trained, spec, alignment.permutations)
        layers, known = fitted(held.previous, new, known)
        for number, rows in layers.items():
            torch.testing.assert_close(affine(module.net, number), rows, rtol=1e-3, atol=1e-4)
        averaged = ALPHA * affine(held.previous, 3) + (1 - ALPHA) * affine(new, 3)
        assert (layers[3] - averaged).abs().max() > 0.01
        for number, moment in known.items():
            kept = merge.state_dict()["known"][f"net.{number}.weight"].double()
            torch.testing.assert_close(kept, moment, rtol=1e-4, atol=1e-5)
        assert merge.history[-1]["alpha"] == ALPHA


def test_a_run_that_goes_on_from_a_checkpoint_is_the_same(tmp_path):
    whole, _ = merged(tmp_path, RebasinMerge(ALPHA, combine="regmean"), tasks=3)
    torch.manual_seed(0)
    module, held, merge = Plain(), Held(), RebasinMerge(ALPHA, combine="regmean")
    for task in range(3):
        state, merge = merge.state_dict(), RebasinMerge(ALPHA, combine="regmean")
        if task:
            merge.load_state_dict(state)
        make_trainer(tmp_path, held, merge, max_epochs=5).fit(module, batches(task))
    for name, tensor in tensors(module.net).items():
        assert torch.equal(tensor, tensors(whole.net)[name])


def test_a_state_without_moments(tmp_path):
    merge = RebasinMerge(0.5)
    module, _ = merged(tmp_path, merge, tasks=1)
    other = RebasinMerge(0.5, combine="regmean")
    other.load_state_dict(merge.state_dict())
    with pytest.raises(MisconfigurationException, match="needs the input moments of the tasks so far"):
        make_trainer(tmp_path, other).fit(module, batches(1))


def test_a_network_without_such_layers_is_refused_before_it_is_trained(tmp_path):
    class Scaled(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv1d(6, 7, 1), nn.ReLU(), nn.Conv1d(7, 3, 1))

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0][..., None])[..., 0], batch[1])

    module = Scaled()
    before = {name: tensor.clone() for name, tensor in tensors(module.net).items()}
    with pytest.raises(MisconfigurationException, match=r"calls no nn\.Linear or nn\.Conv2d"):
        make_trainer(tmp_path, RebasinMerge(combine="regmean", alpha=0.5)).fit(module, batches(0))
    for name, tensor in tensors(module.net).items():
        assert torch.equal(tensor, before[name])


def test_a_layer_of_which_only_the_weight_is_trained_is_averaged(tmp_path):
    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.net[3].bias.requires_grad_(False)

    class Ends(Callback):
        """Keeps the network as each task begins, and as it was trained."""

        def on_train_start(self, trainer, module):
            self.previous = copy.deepcopy(module.net)

        def on_train_batch_end(self, trainer, module, *args):
            self.trained = copy.deepcopy(module.net)

    torch.manual_seed(0)
    module, ends, merge = Frozen(), Ends(), RebasinMerge(ALPHA, "identity", combine="regmean")
    for task in range(2):
        make_trainer(tmp_path, ends, merge, max_epochs=5).fit(module, batches(task))
    rows = ALPHA * affine(ends.previous, 3) + (1 - ALPHA) * affine(ends.trained, 3)
    torch.testing.assert_close(affine(module.net, 3), rows, rtol=1e-5, atol=1e-6)
    rows = ALPHA * affine(ends.previous, 5) + (1 - ALPHA) * affine(ends.trained, 5)
    assert (affine(module.net, 5) - rows).abs().max() > 0.001


@pytest.mark.parametrize("alpha", ["line-search", "fisher", "layer-fisher"])
def test_an_alpha_of_the_path_is_refused(alpha):
    with pytest.raises(
        ValueError, match=f"combine='regmean' leaves the linear path, on which alpha='{alpha}' is chosen"
    ):
        RebasinMerge(alpha, combine="regmean")
    with pytest.raises(ValueError, match="combine must be one of average, regmean, got 'sum'"):
        RebasinMerge(combine="sum")
