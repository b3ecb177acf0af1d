"""Connectivity against loss_barrier and planted permutations."""

import copy
import math
import warnings

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy

from lit_rebasin import (
    ConnectivityMonitor,
    LinearPath,
    effective_dimension,
    loss_barrier,
    permutation_spec,
    permute,
)
from lit_rebasin.metrics import width_bound

from .monitored import Plain, X, Y, fit, whole
from .user_code import UserModule, Walk, make_trainer


def test_connectivity_is_measured_where_a_task_ends(tmp_path):
    monitor = ConnectivityMonitor()
    make_trainer(tmp_path, monitor, max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(
        UserModule(), datamodule=Walk()
    )
    assert [(entry["task"], entry["epoch"]) for entry in monitor.history] == [(0, 1), (1, 3)]
    assert "connectivity/barrier" not in monitor.history[0]
    assert "connectivity/barrier" in monitor.history[1]


def test_connectivity_with_a_twin_that_was_permuted(tmp_path):
    module = Plain(rate=0.0)
    spec = permutation_spec(nn.Sequential(module.net, module.head), X[:2])
    drawn = {name: torch.randperm(group.size) for name, group in spec.groups.items()}
    twin = copy.deepcopy(module)
    moved = permute(nn.Sequential(twin.net, twin.head), spec, drawn)
    twin.net, twin.head = moved[0], moved[1]
    monitor = ConnectivityMonitor(reference=twin, examples=60)
    fit(tmp_path, monitor, module)
    found = monitor.history[-1]
    assert found["connectivity_reference/moved"] > 5
    path = LinearPath(nn.Sequential(twin.net, twin.head), nn.Sequential(module.net, module.head))
    measured = loss_barrier(path, [(X, Y)])
    assert found["connectivity_reference/barrier"] == pytest.approx(measured.barrier, rel=1e-4)
    assert found["connectivity_reference/area"] == pytest.approx(measured.area, rel=1e-4)
    assert found["connectivity_reference/train_acc_middle"] == pytest.approx(float(measured.accuracies[10]), abs=1e-6)
    assert measured.barrier > 0.02
    assert found["connectivity_reference/barrier_aligned"] == pytest.approx(0, abs=1e-5)
    for layer in ("net.0", "net.2", "net.4", "head"):
        for distance in ("wasserstein", "energy", "paired"):
            assert found[f"connectivity_reference/{distance}/{layer}"] == pytest.approx(0, abs=1e-3)


def test_connectivity_is_with_the_network_that_the_task_began_with(tmp_path):
    module, monitor = Plain(rate=0.5), ConnectivityMonitor(examples=60)
    fit(tmp_path, monitor, module)
    before = copy.deepcopy(module)
    fit(tmp_path, monitor, module, max_epochs=6)
    path = LinearPath(nn.Sequential(before.net, before.head), nn.Sequential(module.net, module.head))
    measured = loss_barrier(path, [(X, Y)])
    found = monitor.history[-1]
    assert found["connectivity/area"] == pytest.approx(measured.area, rel=1e-3)
    assert monitor._figures()["connectivity/path"]().axes[0].get_xlabel() == "alpha, weight of the previous model"
    gap = torch.cat([module.head.weight - before.head.weight, (module.head.bias - before.head.bias)[:, None]], 1)
    assert found["connectivity/paired/head"] == pytest.approx(float(gap.square().sum(1).mean()) ** 0.5, rel=1e-4)


def test_a_reference_in_any_form(tmp_path):
    module, twin = Plain(rate=0.0), Plain()
    with torch.no_grad():
        twin.head.weight += 1
    state = twin.state_dict()
    torch.save(state, tmp_path / "twin.pt")
    make_trainer(tmp_path, max_epochs=0).fit(twin, whole())
    twin.trainer.save_checkpoint(tmp_path / "twin.ckpt")
    wrapped = {f"model.{name}": tensor for name, tensor in state.items()}
    double = {name: tensor.double() for name, tensor in state.items()}
    given = [twin, state, wrapped, double, tmp_path / "twin.pt", str(tmp_path / "twin.ckpt")]
    for reference in given:
        monitor = ConnectivityMonitor(reference=reference, examples=60)
        fit(tmp_path, monitor, module, max_epochs=1)
        # The neurons of the head are one off in each of 5 weights.
        assert monitor.history[-1]["connectivity_reference/paired/head"] == pytest.approx(5**0.5, rel=1e-5)


def test_a_reference_is_the_network_within_a_lightning_module(tmp_path):
    class Wraps(Plain):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(self.net, self.head)
            del self.net, self.head

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.backbone(batch[0]), batch[1])

    module = Wraps()
    module.rate = 0.0
    monitor = ConnectivityMonitor(reference=copy.deepcopy(module.backbone), examples=60)
    fit(tmp_path, monitor, module)
    assert monitor.history[-1]["connectivity_reference/paired/backbone.1"] == 0


def test_monitors_with_and_without_a_reference_have_tags_of_their_own(tmp_path):
    given, begun = ConnectivityMonitor(reference=Plain()), ConnectivityMonitor()
    for _ in range(2):
        make_trainer(tmp_path, given, begun).fit(Plain(), whole())
    tags = [{tag for tag in monitor.history[-1] if "/" in tag} for monitor in (given, begun)]
    assert tags[1]
    assert not tags[0] & tags[1]


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("nowhere.ckpt", ValueError, "checkpoint nowhere.ckpt cannot be read: No such file"),
        (3, TypeError, "reference must be a module, its state dict or the path of a checkpoint, got a int"),
    ],
)
def test_a_reference_that_is_none(reference, error, message):
    with pytest.raises(error, match=message):
        ConnectivityMonitor(reference=reference)


def test_a_reference_of_another_architecture(tmp_path):
    wide = Plain()
    wide.head = nn.Linear(5, 4)
    for reference, message in (
        (nn.Linear(3, 2), "reference does not hold the weights of Plain: it lacks 'net.0.weight'"),
        ({**Plain().state_dict(), "head.bias": torch.full((3,), math.nan)}, "reference holds NaN in 'head.bias'"),
        (wide, r"'head.weight' has shape \(4, 5\) in it and \(3, 5\) in the network"),
    ):
        module = Plain()
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, ConnectivityMonitor(reference=reference), module)
        assert module.trainer.global_step == 0


def planted(module):
    """A copy of a module with its neurons in another order, which computes the same."""
    spec = permutation_spec(nn.Sequential(module.net, module.head), X[:2])
    drawn = {name: torch.randperm(group.size) for name, group in spec.groups.items()}
    twin = copy.deepcopy(module)
    moved = permute(nn.Sequential(twin.net, twin.head), spec, drawn)
    twin.net, twin.head = moved[0], moved[1]
    return twin


def test_connectivity_of_what_is_aligned(tmp_path):
    """A permuted twin that was moved a little: aligned it is on a path of its own, as loss_barrier measures it."""
    module = Plain(rate=0.0)
    near = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    logger = TensorBoardLogger(tmp_path)
    monitor = ConnectivityMonitor(reference=planted(near), examples=60)
    fit(tmp_path, monitor, module, logger=logger)
    found = monitor.history[-1]
    path = LinearPath(nn.Sequential(near.net, near.head), nn.Sequential(module.net, module.head))
    measured = loss_barrier(path, [(X, Y)])
    assert found["connectivity_reference/area_aligned"] == pytest.approx(measured.area, abs=1e-6)
    assert found["connectivity_reference/train_acc_middle_aligned"] == pytest.approx(
        float(measured.accuracies[10]), abs=1e-6
    )
    assert found["connectivity_reference/energy/net.0"] != pytest.approx(
        found["connectivity_reference/wasserstein/net.0"], rel=0.05
    )
    figures = {tag: draw() for tag, draw in monitor._figures().items()}
    loss, accuracy = figures["connectivity_reference/path"].axes
    before, after = (line.get_ydata() for line in loss.lines[:2])
    assert max(after) < max(before)
    assert loss.get_xlabel() == "alpha, weight of the reference model"
    middle, middle_aligned = (line.get_ydata()[10] for line in accuracy.lines)
    assert middle == pytest.approx(found["connectivity_reference/train_acc_middle"])
    assert middle_aligned == pytest.approx(found["connectivity_reference/train_acc_middle_aligned"])
    axes = figures["connectivity_reference/plane"].axes[0]
    corners = {text.get_text(): line.get_xydata()[0] for text, line in zip(axes.texts, axes.lines, strict=True)}
    gap = math.dist(corners["reference"], corners["aligned"])
    wanted = (
        sum(float((p - q).square().sum()) for p, q in zip(near.parameters(), module.parameters(), strict=True)) ** 0.5
    )
    assert gap == pytest.approx(wanted, rel=1e-3)
    logger.finalize("success")
    assert "connectivity_reference/plane" in EventAccumulator(logger.log_dir).Reload().Tags()["images"]


def test_a_twin_that_is_the_same_but_for_its_order_has_no_plane_and_no_error(tmp_path):
    module = Plain(rate=0.0)
    monitor = ConnectivityMonitor(reference=planted(module), examples=60)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not measure.*")
        fit(tmp_path, monitor, module, logger=TensorBoardLogger(tmp_path))
    assert monitor.history
    assert "connectivity_reference/plane" not in monitor._figures()


def test_effective_dimensions_and_bounds_are_those_of_the_layers(tmp_path):
    module, monitor = Plain(), ConnectivityMonitor()
    fit(tmp_path, monitor, module)
    found = monitor.history[0]
    for name, layer in (("net.0", module.net[0]), ("head", module.head)):
        points = torch.cat([layer.weight, layer.bias[:, None]], 1)
        assert found[f"connectivity/effective_dimension/{name}"] == pytest.approx(effective_dimension(points))
    bound = width_bound(found["connectivity/effective_dimension/net.2"], 0.05)
    assert found["connectivity/log10_width_bound/net.2"] == pytest.approx(bound)
    assert "connectivity/log10_width_bound/head" not in found  # its outputs are no neurons

    class OneOutput(Plain):
        def __init__(self):
            super().__init__()
            self.head, self.criterion = nn.Linear(5, 1), nn.BCEWithLogitsLoss()

        def training_step(self, batch, batch_idx):
            return self.criterion(self.head(self.net(batch[0]))[:, 0], (batch[1] == 0).float())

    monitor = ConnectivityMonitor()
    fit(tmp_path, monitor, OneOutput())
    bounds = [tag for tag in monitor.history[0] if "width_bound" in tag]
    assert bounds == [f"connectivity/log10_width_bound/net.{n}" for n in (0, 2, 4)]

    class Other(Plain):
        def __init__(self):
            super().__init__()
            self.net[1] = nn.Sigmoid()  # not 0 at 0

    monitor = ConnectivityMonitor()
    fit(tmp_path, monitor, Other())
    assert not any("bound" in tag for tag in monitor.history[0])


def test_connectivity_goes_on_after_a_resumed_fit(tmp_path):
    monitor, module = ConnectivityMonitor(examples=60), Plain(rate=0.5)
    fit(tmp_path, monitor, module)
    trainer = make_trainer(tmp_path, monitor, max_epochs=2)
    trainer.fit(module, whole())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = make_trainer(tmp_path, monitor, max_epochs=4)
    other = ConnectivityMonitor(examples=60)
    saved = copy.deepcopy(monitor.state_dict())
    other.load_state_dict(saved)
    assert other.state_key == monitor.state_key != ConnectivityMonitor(reference=module).state_key
    assert all(torch.equal(other._begun[name], tensor) for name, tensor in monitor._begun.items())
    assert other._finished == 2
