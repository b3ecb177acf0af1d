import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lit_rebasin.merging import diagonal_fisher, fisher


class Network(nn.Module):
    """A small convolutional network; with ``branch`` it looks at its data, which ``vmap`` cannot follow."""

    def __init__(self, branch=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head, self.unused = nn.Linear(16, 3), nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(4, 1, 1), requires_grad=False)
        self.branch = branch
        self.double()
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x):
        h = self.drop(self.norm(self.conv(x) * self.frozen).relu())
        if self.branch and h.sum() > 0:
            h = 2 * h
        return self.head(h.flatten(1))


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(11, 1, 4, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (11,), generator=generator)


def loop(model, inputs, targets, loss):
    """Mean of squared gradients, one example at a time, by autograd on the module's own parameters."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    totals = [torch.zeros_like(p) for p in parameters]
    for example, target in zip(inputs, targets, strict=True):
        value = loss(model(example[None]), target[None])
        for total, g in zip(totals, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
            total += g.square() if g is not None else 0
    return {name: total / len(inputs) for name, total in zip(names, totals, strict=True)}


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("held", [2**23, 300])
def test_targets_of_the_data_against_a_loop_over_examples(branch, held, monkeypatch):
    monkeypatch.setattr(fisher, "_HELD", held)
    model, (inputs, targets) = Network(branch), data()
    batches = [(inputs[:9], targets[:9]), (inputs[9:], targets[9:])]
    found = diagonal_fisher(model, batches, loss=cross_entropy)
    expected = loop(model.eval(), inputs, targets, cross_entropy)
    assert found.keys() == expected.keys()
    assert "frozen" not in found
    for name, diagonal in found.items():
        torch.testing.assert_close(diagonal, expected[name], rtol=1e-10, atol=1e-14)
    assert not found["unused.weight"].any()


def test_one_by_one_only_where_vmap_cannot_follow(monkeypatch):
    calls = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or original(*a, **k))
    diagonal_fisher(Network(), [data()[0]])
    assert len(calls) <= 1  # for all examples at once
    diagonal_fisher(Network(branch=True), [data()[0]])
    assert len(calls) >= 11


def softmax_regression():
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


def test_drawn_labels_approach_the_closed_form_of_softmax_regression():
    """F of w[c, j] is E p_c (1 - p_c) x_j^2; its Monte Carlo error falls as the root of the draws."""
    model = softmax_regression()
    inputs = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    shares = model(inputs).softmax(1).detach()
    spread = shares * (1 - shares)
    expected = {"weight": spread.T @ inputs.square() / len(inputs), "bias": spread.mean(0)}
    found = diagonal_fisher(model, [inputs] * 100, seed=5)
    for name, diagonal in found.items():
        torch.testing.assert_close(diagonal, expected[name], rtol=0.08, atol=0)
    few = diagonal_fisher(model, [inputs] * 4, seed=5)
    error = [max(float((some[n] / expected[n] - 1).abs().max()) for n in expected) for some in (few, found)]
    assert error[1] < error[0]


def test_targets_of_the_data_in_closed_form():
    """F of w[c, j] is mean (p_c - y_c)^2 x_j^2."""
    model, inputs = softmax_regression(), torch.randn(50, 3, dtype=torch.float64)
    targets = torch.randint(4, (50,))
    residual = (model(inputs).softmax(1).detach() - nn.functional.one_hot(targets, 4)).square()
    found = diagonal_fisher(model, [(inputs, targets)], loss=cross_entropy)
    torch.testing.assert_close(found["weight"], residual.T @ inputs.square() / 50)
    torch.testing.assert_close(found["bias"], residual.mean(0))


def test_labels_are_the_seeds_alone_and_targets_play_no_part():
    model, (inputs, targets) = Network(), data()
    torch.manual_seed(1)
    found = diagonal_fisher(model, [(inputs, targets)], seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = diagonal_fisher(model, [inputs], seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[name], again[name]) for name in found)
    other = diagonal_fisher(model, [inputs], seed=4)
    assert not torch.equal(found["head.weight"], other["head.weight"])


def test_the_network_is_left_as_it_was():
    model, (inputs, targets) = Network(), data()
    model.norm.eval()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    diagonal_fisher(model, [(inputs, targets)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dense_predictions_and_regression():
    model = nn.Conv2d(1, 3, 1).double()
    images = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    assert diagonal_fisher(model, [images])["weight"].shape == (3, 1, 1, 1)
    regression, inputs, targets = nn.Linear(2, 1).double(), torch.randn(6, 2).double(), torch.randn(6, 1).double()
    found = diagonal_fisher(regression, [(inputs, targets)], loss=mse_loss)
    slope = 2 * (regression(inputs) - targets).detach()
    torch.testing.assert_close(found["weight"], (slope * inputs).square().mean(0, keepdim=True))


def test_bad_arguments():
    model, (inputs, targets) = Network(), data()
    for loss in (None, cross_entropy):
        with pytest.raises(ValueError, match="dataloader gave no batches"):
            diagonal_fisher(model, [], loss=loss)
    with pytest.raises(TypeError, match="must begin with an input and a target"):
        diagonal_fisher(model, [inputs], loss=cross_entropy)
    with pytest.raises(TypeError, match=r"no tensor of logits .*: give a loss"):
        diagonal_fisher(nn.Sequential(model, nn.Flatten(0)), [inputs])
    with pytest.raises(RuntimeError, match="shape"):  # the network's own error, not one of vmap
        diagonal_fisher(nn.Linear(3, 2), [(torch.randn(4, 5), targets[:4])], loss=cross_entropy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(60, 4)
    targets = model(inputs).argmax(1)
    expected = diagonal_fisher(copy.deepcopy(model).double(), [(inputs.double(), targets)], loss=cross_entropy)
    half = copy.deepcopy(model).to(dtype)
    found = diagonal_fisher(half, [(inputs.to(dtype), targets)], loss=cross_entropy)
    for name, diagonal in found.items():
        assert diagonal.dtype == torch.float32
        assert float((diagonal - expected[name]).norm() / expected[name].norm()) < 0.05


def test_networks_of_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x, z):
            return self.a(x) + self.b(z).tanh()

    torch.manual_seed(0)
    model, x, z = Two().double(), torch.randn(9, 3).double(), torch.randn(9, 2).double()
    targets = torch.arange(9) % 4
    found = diagonal_fisher(model, [((x, z), targets)], loss=cross_entropy)
    total = torch.zeros_like(model.b.weight)
    for k in range(9):
        loss = cross_entropy(model(x[k : k + 1], z[k : k + 1]), targets[k : k + 1])
        total += torch.autograd.grad(loss, model.b.weight)[0].square() / 9
    torch.testing.assert_close(found["b.weight"], total)
    assert diagonal_fisher(model, [((x, z), targets)]).keys() == found.keys()
