import math

import numpy as np
import ot
import pytest
import torch
from scipy import stats
from torch import nn

from lit_rebasin.metrics import effective_dimension, layer_neurons, neuron_distances, width_bound


def random_points(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(spectrum, n):
    """Points whose covariance has just these eigenvalues, in a turned frame."""
    d = len(spectrum)
    points = random_points(n, d)
    points = points - points.mean(0)
    white = torch.linalg.qr(points).Q * math.sqrt(n)  # the covariance of these is the identity
    turn = torch.linalg.qr(random_points(d, d, seed=1)).Q
    return white * torch.tensor(spectrum, dtype=torch.float64).sqrt() @ turn


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("spectrum", [[4.0, 1.0, 1.0], [1.0, 1.0, 1.0], [9.0, 0.0, 0.0]])
def test_effective_dimension_of_a_known_spectrum(spectrum, n):
    points = with_spectrum(spectrum, n) + 5
    assert effective_dimension(points) == pytest.approx(sum(spectrum) ** 2 / sum(s**2 for s in spectrum))
    wider = torch.cat([points, torch.zeros(n, 50)], 1)  # more coordinates than points
    assert effective_dimension(wider) == pytest.approx(effective_dimension(points))


def test_effective_dimension_is_that_of_numpys_covariance():
    points = random_points(30, 7) @ random_points(7, 7, seed=2)
    covariance = np.cov(points.T.numpy())
    assert effective_dimension(points) == pytest.approx(np.trace(covariance) ** 2 / np.trace(covariance @ covariance))
    assert effective_dimension(torch.ones(4, 3)) == 0
    assert math.isnan(effective_dimension(torch.full((4, 3), float("nan"))))
    with pytest.raises(ValueError, match="at least two of them"):
        effective_dimension(torch.ones(1, 3))


@pytest.mark.parametrize("scale", [1e-300, 1e-85, 1e80, 1e300])
def test_the_effective_dimension_knows_no_scale(scale):
    points = random_points(12, 4) @ torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.5], dtype=torch.float64))
    assert effective_dimension(scale * points) == pytest.approx(effective_dimension(points))
    assert effective_dimension(torch.full((4, 3), scale, dtype=torch.float64)) == 0


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1, bias=False))


def test_neurons_are_what_comes_in():
    model = network(0)
    neurons = layer_neurons(model, dict(model.named_parameters()))
    assert {name: tuple(points.shape) for name, points in neurons.items()} == {"0": (4, 19), "4": (1, 16)}
    assert torch.equal(neurons["0"][2, :-1], model[0].weight[2].flatten())
    assert neurons["0"][2, -1] == model[0].bias[2]
    assert layer_neurons(nn.Linear(2, 3), dict(nn.Linear(2, 3).named_parameters()))[""].shape == (3, 3)


def test_neurons_without_the_bias_that_was_not_given():
    layer = nn.Linear(2, 3)
    neurons = layer_neurons(layer, {"weight": layer.weight})
    assert torch.equal(neurons[""], layer.weight)


def test_the_widest_layer_whose_neurons_are_paired():
    layers = nn.Sequential(nn.Linear(1, 4096, bias=False), nn.Linear(1, 4097, bias=False))
    weights = layers.state_dict()
    found = neuron_distances(layers, weights, weights)
    assert list(found) == ["0"]
    assert found["0"].wasserstein == found["0"].paired == 0


def test_distances_are_those_of_pot_and_scipy():
    model, reference = (dict(network(seed).named_parameters()) for seed in (0, 1))
    found = neuron_distances(network(0), model, reference)
    ours, theirs = (layer_neurons(network(0), weights)["0"].double().numpy() for weights in (model, reference))
    assert found["0"].wasserstein == pytest.approx(ot.emd2([], [], ot.dist(ours, theirs)) ** 0.5)
    between, a, b = (np.sqrt(ot.dist(*pair)).mean() for pair in ((ours, theirs), (ours, ours), (theirs, theirs)))
    assert found["0"].energy == pytest.approx((2 * between - a - b) ** 0.5, rel=1e-6)
    assert found["0"].paired == pytest.approx(np.sqrt(np.square(ours - theirs).sum(1).mean()), rel=1e-6)
    assert found["0"].wasserstein < found["0"].paired


def test_a_layer_of_one_input_is_a_line():
    model, reference = nn.Linear(1, 30, bias=False), nn.Linear(1, 30, bias=False)
    found = neuron_distances(model, dict(model.named_parameters()), dict(reference.named_parameters()))[""]
    weights = [layer.weight[:, 0].detach().double() for layer in (model, reference)]
    assert found.energy == pytest.approx(stats.energy_distance(*weights), rel=1e-6)
    assert found.wasserstein == pytest.approx(
        float((weights[0].sort()[0] - weights[1].sort()[0]).square().mean()) ** 0.5
    )


def test_the_order_of_neurons_counts_for_the_pairs_alone():
    model = network(0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    turned = {**weights, "0.weight": weights["0.weight"].flip(0), "0.bias": weights["0.bias"].flip(0)}
    found = neuron_distances(model, turned, weights)["0"]
    assert found.wasserstein == pytest.approx(0, abs=1e-9)
    assert found.energy == pytest.approx(0, abs=1e-6)
    assert found.paired > 0.1


def test_networks_that_do_not_fit_each_other():
    model = network(0)
    weights = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"4\.weight"):
        neuron_distances(model, weights, {**weights, "4.weight": torch.zeros(2, 16)})
    with pytest.raises(ValueError, match=r"network in weights has a tensor '4\.weight' that the reference lacks"):
        neuron_distances(model, weights, {name: one for name, one in weights.items() if name != "4.weight"})
    with pytest.raises(ValueError, match="No linear layer or convolution"):
        neuron_distances(nn.Tanh(), weights, weights)


def test_the_width_bound_is_a_power_of_the_error():
    assert width_bound(3, 0.01) == pytest.approx(6)  # a million neurons
    assert width_bound(0, 0.5) == 0
    for error in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="error must lie between 0 and 1"):
            width_bound(3, error)
    with pytest.raises(ValueError, match="dimension must be"):
        width_bound(-1, 0.1)


@pytest.mark.parametrize("wrong", [np.ones((3, 2)), None, "points", [[1.0, 2.0]], torch.ones(3, 2).cfloat()])
def test_points_that_are_no_tensor_of_real_numbers(wrong):
    with pytest.raises(TypeError, match="points must be a tensor of real numbers, got "):
        effective_dimension(wrong)


@pytest.mark.parametrize("wrong", [None, "weights", nn.Linear(2, 3), torch.ones(3), np.ones(3)])
def test_networks_that_are_no_tensors_by_name(wrong):
    weights = nn.Linear(2, 3).state_dict()
    for measure, argument in (
        (lambda: layer_neurons(nn.Linear(2, 3), wrong), "weights"),
        (lambda: neuron_distances(nn.Linear(2, 3), wrong, weights), "weights"),
        (lambda: neuron_distances(nn.Linear(2, 3), weights, wrong), "reference"),
    ):
        with pytest.raises(TypeError, match=rf"{argument} must be tensors by name, such as .*state_dict\(\), got a "):
            measure()


def test_neurons_of_what_does_not_fit():
    weights = nn.Linear(2, 3).state_dict()
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got a str"):
        layer_neurons("Linear", weights)
    with pytest.raises(TypeError, match="weights must be tensors by name, got a ndarray for 'weight'"):
        layer_neurons(nn.Linear(2, 3), {**weights, "weight": np.ones((3, 2))})
    with pytest.raises(ValueError, match=r"'weight' has shape \(3, 7\) in the weights and \(3, 2\) in the module"):
        layer_neurons(nn.Linear(2, 3), {**weights, "weight": torch.ones(3, 7)})
    with pytest.raises(ValueError, match="reference: layer '' holds NaN or infinity"):
        neuron_distances(nn.Linear(2, 3), weights, {**weights, "bias": torch.full((3,), math.nan)})


def test_the_width_bound_of_what_is_no_number():
    for dimension, error, argument in (
        ("two", 0.1, "dimension"),
        (2, None, "error"),
        (torch.ones(3), 0.1, "dimension"),
    ):
        with pytest.raises(TypeError, match=f"{argument} must be a number, got a "):
            width_bound(dimension, error)
