"""RegMean against least squares, its own objective, and networks whose tasks use different inputs."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lit_rebasin.merging import LinearPath, input_moments, regmean


def moment(x):
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    return rows.T @ rows / len(x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (30, 5)),
        (nn.Linear(5, 4), (6, 7, 5)),
        (nn.Linear(5, 4, bias=False), (30, 5)),
        (nn.Conv2d(3, 4, 3), (5, 3, 8, 7)),
        (nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (5, 3, 8, 9)),
        (nn.Conv2d(3, 4, (2, 3), padding="same"), (5, 3, 6, 6)),
    ],
)
def test_moments_give_the_mean_square_of_every_output(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    found = input_moments(layer, layer, x.split(4))["weight"]
    bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight))
    rows = torch.cat([layer.weight.flatten(1), bias[:, None]], 1)
    outputs = layer(x).movedim(1, -1) if isinstance(layer, nn.Conv2d) else layer(x)
    torch.testing.assert_close((rows @ found * rows).sum(1), outputs.square().flatten(0, -2).mean(0))


def test_layers_without_moments():
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    unused = nn.Linear(4, 4)
    plain = nn.Linear(4, 4)
    parts = [shared, tied, plain, weight_norm(nn.Linear(4, 4)), nn.LayerNorm(4)]
    model = nn.ModuleList([*parts, unused])
    found = input_moments(model, lambda x: nn.Sequential(*parts)(x), [torch.randn(3, 4)])
    assert list(found) == ["2.weight"]
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    assert input_moments(grouped, grouped, [torch.randn(2, 4, 5, 5)]) == {}
    assert input_moments(plain, plain, []) == {}


def test_a_layer_that_runs_twice_has_the_moments_of_both():
    layer, x = nn.Linear(3, 3), torch.randn(10, 3)
    found = input_moments(layer, lambda batch: layer(layer(batch)), [x])["weight"]
    torch.testing.assert_close(found, moment(torch.cat([x, layer(x).detach()])))


def test_an_input_may_be_given_by_its_name():
    layer, x = nn.Linear(3, 2), torch.randn(10, 3)
    torch.testing.assert_close(input_moments(layer, lambda batch: layer(input=batch), [x])["weight"], moment(x))


def test_reading_stops_at_enough_rows_for_every_layer():
    model = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2))
    torch.manual_seed(0)
    xs = torch.randn(50, 3).split(5)
    read = iter(xs)
    found = input_moments(model, model, read, rows=2)  # 20 for the ten inputs of the second layer
    assert len(list(read)) == 6
    torch.testing.assert_close(found["0.weight"], moment(torch.cat(xs[:4])))


@pytest.mark.parametrize("bias", [True, False])
def test_regmean_is_the_least_squares_fit_to_both_layers_on_the_inputs_of_each(bias):
    torch.manual_seed(1)
    xs = [torch.randn(50, 6) @ torch.randn(6, 6), torch.randn(40, 6) @ torch.randn(6, 6)]
    layers = [nn.Linear(6, 3, bias=bias).double() for _ in xs]
    xs = [x.double() for x in xs]
    path = LinearPath(layers[0], layers[1])
    moments = [{"weight": moment(x)} for x in xs]
    merged = regmean(path, *moments, alpha=0.7, ridge=1e-12)
    scales = [(share / len(x)) ** 0.5 for share, x in zip((0.7, 0.3), xs, strict=True)]
    ones = [torch.ones(len(x), 1) if bias else torch.ones(len(x), 0) for x in xs]
    inputs = torch.cat([torch.cat([x, one], 1) * scale for x, one, scale in zip(xs, ones, scales, strict=True)])
    targets = torch.cat([layer(x).detach() * scale for layer, x, scale in zip(layers, xs, scales, strict=True)])
    fitted = torch.linalg.lstsq(inputs, targets).solution.T
    torch.testing.assert_close(merged["weight"], fitted[:, :6])
    assert set(merged) == set(dict(layers[0].named_parameters()))
    if bias:
        torch.testing.assert_close(merged["bias"], fitted[:, 6])


def test_tasks_that_use_other_inputs_are_both_kept_whole():
    torch.manual_seed(2)
    xs = [torch.zeros(200, 10), torch.zeros(200, 10)]
    xs[0][:, :4], xs[1][:, 4:] = torch.rand(200, 4), torch.rand(200, 6)
    layers = [nn.Linear(10, 5, bias=False) for _ in xs]
    path = LinearPath(layers[0], layers[1])
    merged = regmean(path, *({"weight": moment(x)} for x in xs), ridge=1e-6)["weight"]
    torch.testing.assert_close(merged[:, :4], layers[0].weight.detach()[:, :4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(merged[:, 4:], layers[1].weight.detach()[:, 4:], rtol=1e-3, atol=1e-4)


def test_equal_moments_and_what_has_none_are_averaged():
    torch.manual_seed(3)
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)) for _ in range(2)]
    path = LinearPath(models[0], models[1])
    same = {"0.weight": moment(torch.randn(30, 4))}
    merged = regmean(path, same, same, alpha=0.8)
    for name, tensor in path.at(0.8).items():
        torch.testing.assert_close(merged[name], tensor)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_are_the_networks_themselves(alpha):
    path = LinearPath(nn.Linear(3, 2), nn.Linear(3, 2))
    moments = ({"weight": moment(torch.randn(9, 3))}, {"weight": moment(torch.randn(9, 3))})
    for name, tensor in regmean(path, *moments, alpha=alpha).items():
        assert torch.equal(tensor, (path.previous if alpha else path.new)[name])


def test_a_convolution_is_merged_as_the_layer_on_its_patches():
    torch.manual_seed(4)
    convolutions = [nn.Conv2d(2, 3, 2, stride=2) for _ in range(2)]
    xs = [torch.randn(20, 2, 4, 4), torch.randn(20, 2, 4, 4)]
    patches = [x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 8) for x in xs]
    moments = [input_moments(layer, layer, [x]) for layer, x in zip(convolutions, xs, strict=True)]
    torch.testing.assert_close(moments[0]["weight"], moment(patches[0]))
    linear = [{"weight": c.weight.detach().flatten(1), "bias": c.bias.detach()} for c in convolutions]
    merged = regmean(LinearPath(convolutions[0], convolutions[1]), *moments)
    flat = regmean(LinearPath(*linear), *({"weight": moment(patch)} for patch in patches))
    torch.testing.assert_close(merged["weight"].flatten(1), flat["weight"])
    torch.testing.assert_close(merged["bias"], flat["bias"])


def test_errors():
    path = LinearPath(nn.Linear(3, 2), nn.Linear(3, 2))
    good = {"weight": moment(torch.randn(9, 3))}
    with pytest.raises(ValueError, match="alpha is the weight of the previous model"):
        regmean(path, good, good, alpha=1.5)
    with pytest.raises(ValueError, match="ridge must be a positive number, got 0"):
        regmean(path, good, good, ridge=0)
    with pytest.raises(ValueError, match="new_moments has the tensor 'other', which the path lacks"):
        regmean(path, good, {"other": good["weight"]})
    with pytest.raises(ValueError, match=r"has shape \(3, 3\), but the layer has 3 inputs: \(4, 4\)"):
        regmean(path, {"weight": torch.eye(3)}, good)
    with pytest.raises(ValueError, match=r"previous_moments\['weight'\] must be finite"):
        regmean(path, {"weight": good["weight"] * float("nan")}, good)
