import pytest
import torch
from torch.func import functional_call

from lit_rebasin import permutation_spec, permute

from .networks import OTHERS, TABLE, Network
from .test_random_networks import randomised

NETWORKS = {**TABLE, **OTHERS}
SMALL = [name for name in NETWORKS if not name.startswith("torchvision") or "ViT" in name]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def traced(network: Network):
    model = randomised(network.build())
    return model, permutation_spec(model, *network.inputs, check=False, **network.kwargs)


def outputs(network, model, tensors=None):
    with torch.no_grad():
        result = functional_call(model, tensors or {}, network.inputs, network.kwargs)
    return leaves(result)


def leaves(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [leaf for part in (output.values() if isinstance(output, dict) else output) for leaf in leaves(part)]


def equal(found, expected):
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, rtol=1e-7, atol=1e-10 * float(b.abs().max())) for a, b in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_symmetries_of_a_network_and_nothing_else(name):
    """The count says that nothing is missing; calling the network and its permuted copy says that nothing is too much."""
    network = NETWORKS[name]
    model, spec = traced(network)
    assert len(spec.groups) == network.groups
    permutations = spec.random(generator=torch.Generator().manual_seed(2))
    assert equal(outputs(network, permute(model, spec, permutations)), outputs(network, model))


@pytest.mark.parametrize("name", SMALL)
def test_every_group_is_a_symmetry_by_itself_and_at_work(name):
    network = NETWORKS[name]
    model, spec = traced(network)
    expected = outputs(network, model)
    for group in spec.groups.values():
        rolled = {group.name: torch.arange(group.size).roll(1)}
        assert equal(outputs(network, permute(model, spec, rolled)), expected)
        for axis in group.axes:
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            if axis.tensor not in tensors:  # the second name of a tied weight
                continue
            entries = axis.entries(group.size)
            order = torch.arange(tensors[axis.tensor].shape[axis.dim])
            order[entries.flatten()] = entries.roll(1, 1).flatten()
            wrong = {axis.tensor: tensors[axis.tensor].index_select(axis.dim, order)}
            if not equal(outputs(network, model, wrong), expected):
                break
        else:
            pytest.fail(f"{group} has no part in what the network gives")
