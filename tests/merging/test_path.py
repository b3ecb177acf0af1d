import copy

import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath
from lit_rebasin.merging import PathLosses


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).eval()


def test_modules_and_their_weights_give_the_same_path():
    previous, new = network(0), network(1)
    new[1].num_batches_tracked.fill_(7)
    path = LinearPath(previous, new)
    expected = LinearPath(previous.state_dict(), new.state_dict()).at(0.3)
    found = path.at(0.3)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_a_module_on_the_path_is_a_copy_with_the_weights_there():
    previous, new = network(0), network(1)
    new(torch.randn(5, 3)).sum().backward()
    new[2].train()
    before = copy.deepcopy((previous.state_dict(), new.state_dict()))
    path = LinearPath(previous, new)
    merged = path.module_at(0.25)
    expected = path.at(0.25)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    assert [part.training for part in merged] == [False, False, True, False]
    assert all(p.grad is None and p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    for model, state in zip((previous, new), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    inputs = torch.randn(5, 3)
    new.eval()
    assert torch.equal(path.module_at(1.0)(inputs), previous(inputs))
    assert torch.equal(path.module_at(0)(inputs), new(inputs))


def test_tied_weights_stay_tied():
    def tied(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    merged = LinearPath(tied(0), tied(1)).module_at(0.5)
    assert merged[0].weight is merged[1].weight
    torch.testing.assert_close(merged[0].weight, (tied(0)[0].weight + tied(1)[0].weight) / 2)


def test_every_tensor_may_have_an_alpha_of_its_own():
    previous, new = network(0), network(1)
    path = LinearPath(previous, new)
    alphas = {name: index / 10 for index, (name, t) in enumerate(path.new.items()) if t.is_floating_point()}
    for merged in (path.at(alphas), dict(path.module_at(alphas).state_dict())):
        for name, alpha in alphas.items():
            torch.testing.assert_close(merged[name], alpha * path.previous[name] + (1 - alpha) * path.new[name])
        assert len(merged) == len(alphas) + 1  # the counter needs none
    same = dict.fromkeys(alphas, 0.4)
    assert all(torch.equal(tensor, path.at(0.4)[name]) for name, tensor in path.at(same).items())


def test_alphas_that_do_not_fit():
    path = LinearPath(network(0), network(1))
    alphas = {name: 0.5 for name, tensor in path.new.items() if tensor.is_floating_point()}
    with pytest.raises(ValueError, match=r"alpha has no number for the tensor '3.weight'"):
        path.at({name: alpha for name, alpha in alphas.items() if name != "3.weight"})
    with pytest.raises(ValueError, match=r"'4.weight', but the models have no tensor of that name"):
        path.at({**alphas, "4.weight": 0.5})
    with pytest.raises(ValueError, match=r"alpha\['0.bias'\] is the weight of the previous model .* got 1.5"):
        path.at({**alphas, "0.bias": 1.5})


def test_ends_that_do_not_fit():
    with pytest.raises(TypeError, match="got a Sequential and a OrderedDict"):
        LinearPath(network(0), network(1).state_dict())
    with pytest.raises(ValueError, match=r"'3.weight' has shape"):
        LinearPath(network(0), nn.Sequential(*network(0)[:3], nn.Linear(4, 5)))
    with pytest.raises(TypeError, match="give LinearPath two modules"):
        LinearPath(network(0).state_dict(), network(1).state_dict()).module_at(0.5)


def test_a_lazy_layer_without_shapes_is_named():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0.weight' of Sequential is of a lazy layer: call the network once"):
        LinearPath(lazy, lazy)


def test_accuracy_barrier_of_a_known_curve():
    alphas = torch.linspace(0, 1, 5, dtype=torch.float64)
    found = PathLosses(alphas, torch.zeros(5), torch.tensor([0.8, 0.9, 0.5, 0.95, 1.0], dtype=torch.float64))
    assert found.accuracy_barrier == pytest.approx(0.9 - 0.5)
    assert PathLosses(alphas, torch.zeros(5), 1 - (alphas - 0.5) ** 2).accuracy_barrier == pytest.approx(-0.1875)
    with pytest.raises(ValueError, match="No accuracies were measured"):
        _ = PathLosses(alphas, torch.zeros(5)).accuracy_barrier
