import copy

import pytest
import torch
from torch import nn

from lit_rebasin import LinearPath
from lit_rebasin.merging import loss_barrier, reestimate_batch_norm, reset_batch_norm

from .digits import aligned_pair, digits


def white(*shape):
    """Return inputs whose features have mean 0 and the identity as their covariance, exactly."""
    features = torch.randn(*shape, dtype=torch.float64)
    flat = (features - features.mean(0)).flatten(1)
    return (torch.linalg.qr(flat).Q * (len(flat) - 1) ** 0.5).view(shape)


def endpoints(build, inputs):
    """Return two networks with the statistics of the inputs."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build().double().train())
        reestimate_batch_norm(models[-1], models[-1], [inputs])
        models[-1].eval()
    return models


LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), (50, 4)),
    "grouped": (lambda: nn.Sequential(nn.Conv1d(4, 6, 1, groups=2, bias=False), nn.BatchNorm1d(6)), (50, 4, 1)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 1, groups=2), nn.BatchNorm1d(6)), (50, 4, 1)),
    "2d": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)), (50, 2, 2, 2)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_exact_for_white_inputs(kind, alpha):
    build, shape = LAYERS[kind]
    inputs = white(*shape)
    path = LinearPath(*endpoints(build, inputs))
    merged, expected = path.module_at(alpha), path.module_at(alpha).train()
    names = reset_batch_norm(merged, path, alpha, merged, torch.zeros(2, *shape[1:], dtype=torch.float64))
    reestimate_batch_norm(expected, expected, [inputs])
    assert names == ["1"]
    torch.testing.assert_close(merged[1].running_mean, expected[1].running_mean)
    torch.testing.assert_close(merged[1].running_var, expected[1].running_var)
    assert not torch.allclose(path.module_at(alpha)[1].running_var, expected[1].running_var, rtol=0.01)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_path_stay_what_they_are(alpha):
    path = LinearPath(*aligned_pair("convnet with BatchNorm"))
    merged, expected = path.module_at(alpha), path.module_at(alpha)
    assert len(reset_batch_norm(merged, path, alpha, merged, digits()[0][:2])) == 3
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_lowers_the_barrier_without_data():
    _, _, inputs, targets = digits()
    path = LinearPath(*aligned_pair("convnet with BatchNorm"))
    plain, reset = (
        loss_barrier(path, [(inputs, targets)], 3, statistics=statistics)
        for statistics in (None, lambda m, alpha: reset_batch_norm(m, path, alpha, m, torch.zeros(1, 64).double()))
    )
    assert reset.barrier < 0.8 * plain.barrier


class Branches(nn.Module):
    """BatchNorm behind a nonlinearity, one that two layers feed, one without statistics, and one that a layer feeds."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = (nn.Linear(4, 4) for _ in range(3))
        self.behind, self.shared, self.fed = (nn.BatchNorm1d(4) for _ in range(3))
        self.without = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        h = self.behind(self.first(x).relu())
        h = self.shared(self.a(h)) + self.shared(self.b(h))
        return self.fed(self.first(self.without(h)))


def test_only_what_one_layer_feeds_directly():
    inputs = torch.randn(50, 4).double()
    path = LinearPath(*endpoints(Branches, inputs))
    merged, before = path.module_at(0.5).train(), path.at(0.5)
    assert reset_batch_norm(merged, path, 0.5, merged, inputs) == ["fed"]
    state = merged.state_dict()
    changed = {name for name, tensor in before.items() if not torch.allclose(tensor, state[name])}
    assert changed == {"fed.running_var"}
    assert all(part.training for part in merged.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in merged.modules())


def test_a_layer_takes_the_alpha_of_its_weight():
    inputs = white(50, 4)
    path = LinearPath(*endpoints(LAYERS["linear"][0], inputs))
    alphas = {name: 0.9 if name.startswith("0") else 0.3 for name in path.new}
    merged, expected = path.module_at(alphas), path.module_at(alphas).train()
    reset_batch_norm(merged, path, alphas, merged, inputs)
    reestimate_batch_norm(expected, expected, [inputs])
    torch.testing.assert_close(merged[1].running_var, expected[1].running_var)
    torch.testing.assert_close(merged[1].running_mean, expected[1].running_mean)


def test_endpoints_that_do_not_fit():
    inputs = white(50, 4)
    previous, new = endpoints(LAYERS["linear"][0], inputs)
    path = LinearPath(dict(previous.named_parameters()), dict(new.named_parameters()))
    with pytest.raises(ValueError, match=r"'1.running_mean' that the reference lacks"):
        reset_batch_norm(copy.deepcopy(new), path, 0.5, new, inputs)
    with pytest.raises(ValueError, match="very tensor"):
        reset_batch_norm(new, LinearPath(previous, new), 0.5, new, inputs)


def test_forward_of_another_network():
    ends = endpoints(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), white(20, 4))
    path = LinearPath(*ends)
    merged, other = path.module_at(0.5), path.module_at(0.5)
    with pytest.raises(ValueError, match="forward ran no BatchNorm layer of the merged network"):
        reset_batch_norm(merged, path, 0.5, other, white(20, 4))


def test_re_estimation_needs_training_mode_and_batches():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    with pytest.raises(ValueError, match=r"No BatchNorm layer is in training mode, .* call model.train\(\)"):
        reestimate_batch_norm(model, model, [torch.randn(6, 4)])
    with pytest.raises(ValueError, match="batches is empty"):
        reestimate_batch_norm(model.train(), model, [])
    assert torch.equal(model[1].running_var, torch.ones(5))
