import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lit_rebasin import permutation_spec, permute

from .random_networks import networks

IMAGE = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def randomised(model):
    """Give a network weights and statistics that hide nothing, in float64."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(0.6 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        for tensor in model.buffers():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model


def keeps_the_function(model):
    """Compare a network with its permuted copy, by nothing but calling the two."""
    model = randomised(model)
    spec = permutation_spec(model, IMAGE, check=False)
    permutations = spec.random(generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = model(IMAGE), permute(model, spec, permutations)(IMAGE)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_random_networks_keep_their_function(model):
    keeps_the_function(model)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_many_random_networks_keep_their_function(model):
    keeps_the_function(model)
