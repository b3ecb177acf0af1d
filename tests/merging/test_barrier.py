import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import LinearPath
from lit_rebasin.merging import loss_barrier, repair

from .digits import aligned_pair, digits


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)).double()


def data(examples=23):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(examples, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(4, (examples,), generator=generator)


def test_losses_and_accuracies_are_means_over_examples():
    """The oracle writes the weights into a copy and sums over single examples."""
    previous, new = network(0), network(1)
    inputs, targets = data()
    found = loss_barrier(LinearPath(previous, new), DataLoader(TensorDataset(inputs, targets), batch_size=10), 7)
    for index, alpha in enumerate(torch.linspace(0, 1, 7, dtype=torch.float64).tolist()):
        model = copy.deepcopy(new)
        model.load_state_dict(LinearPath(previous.state_dict(), new.state_dict()).at(alpha))
        outputs = model.eval()(inputs)
        assert float(found.losses[index]) == pytest.approx(cross_entropy(outputs, targets).item(), rel=1e-12)
        assert float(found.accuracies[index]) == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))
    excess = [float(found.losses[i] - found.losses[-1] * i / 6 - found.losses[0] * (6 - i) / 6) for i in range(1, 6)]
    assert found.barrier == pytest.approx(max(excess))
    assert len(loss_barrier(LinearPath(previous, new), [(inputs, targets)]).alphas) == 21


def test_modules_are_left_as_they_were():
    previous, new = network(0), network(1)
    new[3].eval()
    modes = [part.training for part in new.modules()]
    before = copy.deepcopy((previous.state_dict(), new.state_dict()))
    loss_barrier(
        LinearPath(previous, new), [data()], 3, statistics=lambda model, alpha: nn.init.zeros_(model[0].weight)
    )
    assert [part.training for part in new.modules()] == modes
    assert all(part.training for part in previous.modules())
    for model, state in zip((previous, new), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_statistics_are_taken_between_the_ends_and_change_what_is_measured():
    previous, new = network(0), network(1)
    path, seen = LinearPath(previous, new), []

    def zeros(model, alpha):
        seen.append(alpha)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)

    plain, found = loss_barrier(path, [data()], 5), loss_barrier(path, [data()], 5, statistics=zeros)
    assert seen == [0.25, 0.5, 0.75]
    torch.testing.assert_close(found.losses[1:-1], torch.full((3,), math.log(4), dtype=torch.float64))
    assert torch.equal(found.losses[[0, -1]], plain.losses[[0, -1]])


def test_own_statistics_lower_the_barrier_of_networks_with_batch_norm():
    inputs, _, test_inputs, test_targets = digits()
    path = LinearPath(*aligned_pair("convnet with BatchNorm"))
    plain, own = (
        loss_barrier(path, [(test_inputs, test_targets)], 3, statistics=statistics)
        for statistics in (None, lambda model, alpha: repair(model, path, alpha, model, [inputs]))
    )
    assert own.barrier < plain.barrier - 0.3
    assert own.accuracy_barrier < 0.6 * plain.accuracy_barrier


def test_a_loss_that_is_not_finite_is_reported():
    previous, new = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(previous.weight, 3e38)
    nn.init.constant_(new.weight, 1.0)
    found = loss_barrier(LinearPath(previous, new), [(torch.ones(2, 1), torch.zeros(2, 1))], 3, loss=mse_loss)
    assert found.losses[0] == 1
    assert found.losses[1:].isinf().all()
    assert found.accuracies is None
    assert not math.isfinite(found.barrier)


def test_accuracy_of_dense_predictions_and_none_of_regressions():
    previous, new = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
    images, labels = torch.randn(4, 1, 5, 5), torch.randint(3, (4, 5, 5))
    found = loss_barrier(LinearPath(previous, new), [(images, labels)], 3)
    assert float(found.accuracies[-1]) == pytest.approx(float((previous(images).argmax(1) == labels).double().mean()))
    regression = loss_barrier(LinearPath(previous, new), [(images, torch.randn(4, 3, 5, 5))], 3, loss=mse_loss)
    assert regression.accuracies is None


def test_bad_arguments():
    path = LinearPath(network(0), network(1))
    inputs, targets = data()
    with pytest.raises(TypeError, match="give LinearPath two modules"):
        loss_barrier(LinearPath(network(0).state_dict(), network(1).state_dict()), [(inputs, targets)])
    with pytest.raises(ValueError, match="dataloader gave no batches"):
        loss_barrier(path, [])
    with pytest.raises(ValueError, match="can be read only once"):
        loss_barrier(path, iter([(inputs, targets)]))
    with pytest.raises(TypeError, match="must begin with an input and a target, got a Tensor"):
        loss_barrier(path, [inputs])
    with pytest.raises(ValueError, match="at least 3"):
        loss_barrier(path, [(inputs, targets)], 2)


def test_networks_of_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x, z):
            return self.a(x) + self.b(z)

    torch.manual_seed(0)
    ends, x, z, targets = [Two(), Two()], torch.randn(9, 3), torch.randn(9, 2), torch.arange(9) % 4
    found = loss_barrier(LinearPath(*ends), [((x, z), targets)], 3)
    for k, end in ((0, ends[1]), (2, ends[0])):
        assert float(found.losses[k]) == pytest.approx(float(cross_entropy(end(x, z), targets)), rel=1e-5)
