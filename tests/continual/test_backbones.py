"""The networks of the protocols."""

import torch
from avalanche.models import SlimResNet18

from lit_rebasin import ContinualClassifier
from lit_rebasin.continual.backbones import slim_resnet18


def test_slim_resnet18_is_avalanches_up_to_its_last_layer():
    torch.manual_seed(0)
    features, whole = slim_resnet18(8), SlimResNet18(10, nf=8)
    x = torch.randn(3, 3, 32, 32)
    whole.load_state_dict(features.state_dict() | {k: v for k, v in whole.state_dict().items() if "linear" in k})
    assert features(x).shape == (3, 64)
    torch.testing.assert_close(whole.linear(features(x)), whole(x))


def test_it_takes_a_head_a_task():
    model = ContinualClassifier(slim_resnet18(4), n_classes=5, n_features=32, n_heads=3)
    assert model(torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 1, 1])).shape == (4, 5)
