"""What all monitors promise, and what each of them measures, against independent computations."""

import collections
import copy
import csv
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import (
    ConnectivityMonitor,
    ContinualMonitor,
    FeatureLearningMonitor,
    GeodesicMonitor,
    LinearPath,
    RebasinMerge,
    SharpnessMonitor,
    effective_dimension,
    hessian_eigenvalues,
    hessian_trace,
    line_shape_scores,
    loss_barrier,
    optimal_transport_score,
    permutation_spec,
    permute,
)
from lit_rebasin.callbacks.monitor import Monitor, first_examples
from lit_rebasin.metrics import width_bound

from .user_code import UserModule, Walk, loader, make_trainer

MONITORS = [GeodesicMonitor, ConnectivityMonitor, SharpnessMonitor, FeatureLearningMonitor]
X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Plain(pl.LightningModule):
    """A small network of tanh units, trained by plain gradient descent on all examples at once."""

    def __init__(self, rate=0.1):
        super().__init__()
        torch.manual_seed(3)
        self.rate = rate
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def training_step(self, batch, batch_idx):
        logits = self.head(self.net(batch[0]))
        self.log("train_acc", (logits.argmax(1) == batch[1]).float().mean())
        return cross_entropy(logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def whole():
    return DataLoader(TensorDataset(X, Y), batch_size=60)


def fit(tmp_path, monitor, module, loaders=None, **options):
    trainer = make_trainer(tmp_path, monitor, **options)
    trainer.fit(module, loaders or whole())
    return trainer


def weights_after(tmp_path, monitors, merges):
    pl.seed_everything(5)
    module = UserModule()
    callbacks = [*monitors, *([RebasinMerge(alpha=0.5, batches=2)] if merges else []), ContinualMonitor()]
    logger = TensorBoardLogger(tmp_path) if monitors else False
    make_trainer(
        tmp_path,
        *callbacks,
        max_epochs=4,
        reload_dataloaders_every_n_epochs=1,
        logger=logger,
        accumulate_grad_batches=2,
    ).fit(module, datamodule=Walk())
    return module


@pytest.mark.parametrize("merges", [False, True])
def test_monitors_change_nothing(tmp_path, merges):
    alone = weights_after(tmp_path, [], merges)
    monitors = [kind() for kind in MONITORS]
    watched = weights_after(tmp_path, monitors, merges)
    state = alone.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in watched.state_dict().items())
    assert all(monitor.history for monitor in monitors)
    assert torch.rand(3).tolist() == (weights_after(tmp_path, [], merges), torch.rand(3))[1].tolist()
    assert "log" not in vars(watched)


@pytest.mark.parametrize("kind", MONITORS)
def test_every_number_is_logged_and_figures_go_to_tensorboard(tmp_path, kind):
    monitor, logger, table = kind(), TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, monitor, max_epochs=4, reload_dataloaders_every_n_epochs=1, logger=[logger, table])
    trainer.fit(UserModule(batch_norm=False), datamodule=Walk())
    for one in (logger, table):
        one.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    numbers = {tag: value for tag, value in monitor.history[-1].items() if tag not in ("task", "epoch")}
    assert numbers
    assert all(math.isfinite(value) for value in numbers.values())
    for tag, value in numbers.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-5)
        assert "/" in tag
    with Path(table.log_dir, "metrics.csv").open() as file:
        assert numbers.keys() <= set(csv.DictReader(file).fieldnames)
    pictures = {
        GeodesicMonitor: {"geodesic/tracks"},
        ConnectivityMonitor: {"connectivity/path"},
        SharpnessMonitor: set(),
        FeatureLearningMonitor: {"feature_learning/speed"},
    }
    assert pictures[kind] <= set(events.Tags()["images"])


@pytest.mark.parametrize("kind", [GeodesicMonitor, SharpnessMonitor, FeatureLearningMonitor])
def test_intervals_and_the_ends_of_tasks(tmp_path, kind):
    monitor = kind(every_n_epochs=2)
    fit(tmp_path, monitor, Plain(), max_epochs=5)
    first = 0 if kind is FeatureLearningMonitor else 1
    expected = [0, 2, 4] if first == 0 else [1, 3, 4]
    assert [entry["epoch"] for entry in monitor.history] == expected
    fit(tmp_path, monitor, Plain(), max_epochs=1)
    assert [entry["task"] for entry in monitor.history] == [0, 0, 0, 1]


def test_connectivity_is_measured_where_a_task_ends(tmp_path):
    monitor = ConnectivityMonitor()
    make_trainer(tmp_path, monitor, max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(
        UserModule(), datamodule=Walk()
    )
    assert [(entry["task"], entry["epoch"]) for entry in monitor.history] == [(0, 1), (1, 3)]
    assert "connectivity/barrier" not in monitor.history[0]
    assert "connectivity/barrier" in monitor.history[1]


@pytest.mark.parametrize("kind", MONITORS)
def test_a_task_that_stops_early_is_measured_at_its_end(tmp_path, kind):
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 1

    logger = TensorBoardLogger(tmp_path)
    monitor = kind(every_n_epochs=7)
    make_trainer(tmp_path, monitor, Stops(), max_epochs=20, logger=logger).fit(Plain(), whole())
    assert [(entry["task"], entry["epoch"]) for entry in monitor.history] == [
        (0, 0 if kind is FeatureLearningMonitor else 1)
    ]
    fit(tmp_path, monitor, Plain(), max_epochs=1)
    assert monitor.history[-1]["task"] == 1
    logger.finalize("success")
    if kind in (GeodesicMonitor, FeatureLearningMonitor):
        assert EventAccumulator(logger.log_dir).Reload().Tags()["images"]


def test_state_goes_on():
    monitor = GeodesicMonitor()
    monitor.history, monitor.task, monitor._finished = [{"task": 0, "epoch": 0, "x": 1.0}], 1, 2
    other = GeodesicMonitor()
    other.load_state_dict(copy.deepcopy(monitor.state_dict()))
    assert (other.history, other.task, other._finished) == (monitor.history, 1, 2)


@pytest.mark.parametrize(("name", "value"), [("every_n_epochs", 0), ("examples", 0), ("examples", 2.5)])
@pytest.mark.parametrize("kind", MONITORS)
def test_arguments_out_of_range(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
        kind(**{name: value})


class Seen(Monitor):
    """Keeps what it is given to measure on."""

    def __init__(self):
        super().__init__(every_n_epochs=1, examples=7)
        self.seen = []

    def _measure(self, trainer, step, batch):
        self.seen.append(batch)
        return {"seen/loss": float(step.loss(batch).detach())}


def test_examples_are_those_of_the_validation(tmp_path):
    monitor, held = Seen(), loader(shift=1, shuffle=False)
    make_trainer(tmp_path, monitor).fit(UserModule(), loader(), held)
    x, y = next(iter(held))
    for batch in monitor.seen:
        assert torch.equal(batch[0], x[:7])
        assert torch.equal(batch[1], y[:7])


@pytest.mark.parametrize("sanity", [0, 2])
def test_examples_are_those_of_the_task_where_every_task_has_a_loader(tmp_path, sanity):
    class Tasks(Walk):
        def train_dataloader(self):
            return loader(shift=self.trainer.current_epoch // 2, shuffle=False)

        def val_dataloader(self):
            return [loader(shift=10 + shift, shuffle=False) for shift in range(3)]

    monitor = Seen()
    make_trainer(
        tmp_path,
        monitor,
        max_epochs=6,
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=sanity,
    ).fit(UserModule(), datamodule=Tasks())
    shifts = (
        [10, 10, 11, 11, 12, 12] if sanity else [0, 0, 11, 11, 12, 12]
    )  # before there was any validation, the training's
    for shift, batch in zip(shifts, monitor.seen, strict=True):
        assert torch.equal(batch[0], next(iter(loader(shift=shift, shuffle=False)))[0][:7])


def test_without_a_validation_they_are_the_first_of_the_training(tmp_path):
    class Shifted(Walk):
        def train_dataloader(self):
            return loader(shift=self.trainer.current_epoch // 2, shuffle=False)

        def val_dataloader(self):
            return []

    monitor = Seen()
    make_trainer(tmp_path, monitor, max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(
        UserModule(), datamodule=Shifted()
    )
    for epoch, batch in enumerate(monitor.seen):
        assert torch.equal(batch[0], next(iter(loader(shift=epoch // 2, shuffle=False)))[0][:7])


def test_validation_examples_of_another_form(tmp_path):
    class Other(UserModule):
        def validation_step(self, batch, batch_idx):
            assert batch["image"].shape == (1, 64)

    monitor = Seen()
    with pytest.warns(
        UserWarning, match="Seen measures on training examples, for training_step cannot work with those"
    ):
        make_trainer(tmp_path, monitor).fit(
            Other(), loader(shuffle=False), DataLoader([{"image": torch.zeros(64)}] * 3)
        )
    assert torch.equal(monitor.seen[0][0], next(iter(loader(shuffle=False)))[0][:7])


def test_a_step_that_skips_its_batch_is_not_measured(tmp_path):
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    for kind in (GeodesicMonitor, SharpnessMonitor, FeatureLearningMonitor):
        monitor = kind()
        fit(tmp_path, monitor, Skips())
        assert monitor.history == []


def test_geodesic_scores_are_those_of_the_trained_network(tmp_path):
    module, monitor = Plain(), GeodesicMonitor(examples=40)
    fit(tmp_path, monitor, module)
    track = [X[:40]]
    with torch.no_grad():
        for layer in module.net:
            track.append(layer(track[-1]))
    through = track[2::2]  # the three tanh layers
    score, matched = optimal_transport_score(through[0], through[-1])
    found = monitor.history[-1]
    assert found["geodesic/line_shape_score/net.1"] == pytest.approx(float(line_shape_scores(through).mean()), rel=1e-5)
    assert found["geodesic/optimal_transport_score/net.1"] == pytest.approx(score, rel=1e-5)
    assert found["geodesic/matched/net.1"] == pytest.approx(matched, abs=1e-6)


def test_geodesic_layers_are_chosen_by_name(tmp_path):
    monitor = GeodesicMonitor(layers=["net.0", "net.2", "head"])
    fit(tmp_path, monitor, Plain())
    assert "geodesic/line_shape_score/net.0" in monitor.history[0]
    with pytest.raises(MisconfigurationException, match=r"names 'nat', which Plain does not have; it has net, net\.0"):
        fit(tmp_path, GeodesicMonitor(layers=["net.0", "nat", "head"]), Plain())


def test_sharpness_is_that_of_the_exact_hessian(tmp_path):
    module, monitor = Plain(rate=0.5), SharpnessMonitor(examples=60)
    fit(tmp_path, monitor, module, max_epochs=3)
    weights = [p.detach().double() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    network = nn.Sequential(module.net, module.head).double()

    def loss(flat):
        parts = flat.split([w.numel() for w in weights])
        renamed = {
            n.replace("net.", "0.").replace("head.", "1."): part.view_as(w)
            for n, part, w in zip(names, parts, weights, strict=True)
        }
        return cross_entropy(torch.func.functional_call(network, renamed, (X.double(),)), Y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([w.flatten() for w in weights]))
    found = monitor.history[-1]
    assert found["sharpness/eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.02)
    assert abs(found["sharpness/trace"] - float(hessian.trace())) < 4 * found["sharpness/trace_error"] + 0.05


def test_sharpness_leaves_frozen_parameters_out(tmp_path):
    module = Plain()
    module.net.requires_grad_(False)
    monitor = SharpnessMonitor(examples=60)
    fit(tmp_path, monitor, module)
    with torch.no_grad():
        shares = module.head(module.net(X)).softmax(1)
        features = torch.cat([module.net(X), torch.ones(60, 1)], dim=1).double()
    shares = shares.double()
    # The Hessian of a linear classifier: the mean of (diag(p) - p p') times (f f').
    curvature = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None, :]
    hessian = torch.einsum("nij,na,nb->iajb", curvature, features, features).reshape(18, 18) / 60
    wanted = float(torch.linalg.eigvalsh(hessian)[-1])
    assert monitor.history[-1]["sharpness/eigenvalue"] == pytest.approx(wanted, rel=0.02)


def test_feature_speed_formula_holds_for_a_small_step(tmp_path):
    """cos * |df| * |b| is what the layers up to it take off the loss: the sum of rate * |gradient|^2 (Chizat and Netrapalli, theorem 2.1)."""
    rate = 1e-4
    module, monitor = Plain(rate).double(), FeatureLearningMonitor(examples=60)
    network = nn.Sequential(copy.deepcopy(module.net), copy.deepcopy(module.head))
    cross_entropy(network(X.double()), Y).backward()
    loaders = DataLoader(TensorDataset(X.double(), Y), batch_size=60)
    fit(tmp_path, monitor, module, loaders, max_epochs=1, precision="64-true")
    decay, found = 0.0, monitor.history[0]
    for name, layer in (
        ("net.0", network[0][0]),
        ("net.2", network[0][2]),
        ("net.4", network[0][4]),
        ("head", network[1]),
    ):
        decay += rate * sum(float(p.grad.square().sum()) for p in layer.parameters())
        speed, cosine, forward, backward = (
            found[f"feature_learning/{one}/{name}"] for one in ("speed", "cosine", "forward", "backward")
        )
        entries = 60 * layer.out_features
        assert cosine * speed * forward * backward * entries == pytest.approx(decay, rel=1e-3)
        assert 0 < cosine <= 1 + 1e-9


def test_feature_learning_sees_the_step_itself(tmp_path):
    """With momentum, weight decay and gradients that are accumulated, what counts is where the optimizer goes."""
    module, monitor = Plain(), FeatureLearningMonitor(examples=60)
    before = copy.deepcopy(module)
    fit(
        tmp_path,
        monitor,
        module,
        DataLoader(TensorDataset(X, Y), batch_size=20),
        max_epochs=1,
        accumulate_grad_batches=3,
    )
    with torch.no_grad():
        features = [net.net[0](X[:20]) for net in (before, module)]
    speed = float((features[1] - features[0]).norm() / features[0].norm())
    assert monitor.history[0]["feature_learning/speed/net.0"] == pytest.approx(speed, rel=1e-4)


def test_a_layer_that_stands_still_is_named(tmp_path):
    class Still(Plain):
        def configure_optimizers(self):
            slow = [{"params": self.net[0].parameters(), "lr": 0.0}]
            rest = [p for name, p in self.named_parameters() if not name.startswith("net.0.")]
            return torch.optim.SGD([*slow, {"params": rest, "lr": 0.1}], lr=0.1)

    monitor = FeatureLearningMonitor()
    with pytest.warns(UserWarning, match=r"Layer net\.0 stands still: .*suggest_scales") as caught:
        fit(tmp_path, monitor, Still(), max_epochs=3)
    assert sum("stands still" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stands still.*")
        fit(tmp_path, FeatureLearningMonitor(), Plain())


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
    assert found["connectivity/moved"] > 5
    path = LinearPath(nn.Sequential(twin.net, twin.head), nn.Sequential(module.net, module.head))
    measured = loss_barrier(path, [(X, Y)])
    assert found["connectivity/barrier"] == pytest.approx(measured.barrier, rel=1e-4)
    assert found["connectivity/area"] == pytest.approx(measured.area, rel=1e-4)
    assert found["connectivity/train_acc_middle"] == pytest.approx(float(measured.accuracies[10]), abs=1e-6)
    assert measured.barrier > 0.02
    assert found["connectivity/barrier_aligned"] == pytest.approx(0, abs=1e-5)
    for layer in ("net.0", "net.2", "net.4", "head"):
        for distance in ("wasserstein", "energy", "paired"):
            assert found[f"connectivity/{distance}/{layer}"] == pytest.approx(0, abs=1e-3)


def test_connectivity_is_with_the_network_that_the_task_began_with(tmp_path):
    module, monitor = Plain(rate=0.5), ConnectivityMonitor(examples=60)
    fit(tmp_path, monitor, module)
    before = copy.deepcopy(module)
    fit(tmp_path, monitor, module, max_epochs=6)
    path = LinearPath(nn.Sequential(before.net, before.head), nn.Sequential(module.net, module.head))
    measured = loss_barrier(path, [(X, Y)])
    found = monitor.history[-1]
    assert found["connectivity/area"] == pytest.approx(measured.area, rel=1e-3)
    gap = torch.cat([module.head.weight - before.head.weight, (module.head.bias - before.head.bias)[:, None]], 1)
    assert found["connectivity/paired/head"] == pytest.approx(float(gap.square().sum(1).mean()) ** 0.5, rel=1e-4)


def test_a_reference_of_another_architecture(tmp_path):
    with pytest.raises(ValueError, match="net"):
        fit(tmp_path, ConnectivityMonitor(reference=nn.Linear(3, 2)), Plain())


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
    assert found["connectivity/area_aligned"] == pytest.approx(measured.area, abs=1e-6)
    assert found["connectivity/train_acc_middle_aligned"] == pytest.approx(float(measured.accuracies[10]), abs=1e-6)
    assert found["connectivity/energy/net.0"] != pytest.approx(found["connectivity/wasserstein/net.0"], rel=0.05)
    figures = {tag: draw() for tag, draw in monitor._figures().items()}
    before, after = (line.get_ydata() for line in figures["connectivity/path"].axes[0].lines[:2])
    assert max(after) < max(before)
    axes = figures["connectivity/plane"].axes[0]
    corners = {text.get_text(): line.get_xydata()[0] for text, line in zip(axes.texts, axes.lines, strict=True)}
    gap = math.dist(corners["reference"], corners["aligned"])
    wanted = (
        sum(float((p - q).square().sum()) for p, q in zip(near.parameters(), module.parameters(), strict=True)) ** 0.5
    )
    assert gap == pytest.approx(wanted, rel=1e-3)
    logger.finalize("success")
    assert "connectivity/plane" in EventAccumulator(logger.log_dir).Reload().Tags()["images"]


def test_a_twin_that_is_the_same_but_for_its_order_has_no_plane_and_no_error(tmp_path):
    module = Plain(rate=0.0)
    monitor = ConnectivityMonitor(reference=planted(module), examples=60)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not measure.*")
        fit(tmp_path, monitor, module, logger=TensorBoardLogger(tmp_path))
    assert monitor.history
    assert "connectivity/plane" not in monitor._figures()


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

    class Other(Plain):
        def __init__(self):
            super().__init__()
            self.net[1] = nn.Sigmoid()  # not 0 at 0

    monitor = ConnectivityMonitor()
    fit(tmp_path, monitor, Other())
    assert not any("bound" in tag for tag in monitor.history[0])


class Diverges(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


@pytest.mark.parametrize("kind", [GeodesicMonitor, ConnectivityMonitor, SharpnessMonitor])
def test_a_training_that_diverges_is_not_ended_by_a_monitor(tmp_path, kind):
    monitor = kind() if kind is not ConnectivityMonitor else kind(reference=Plain())
    with pytest.warns(UserWarning, match=rf"{kind.__name__} could not measure task 0: ") as caught:
        trainer = fit(tmp_path, monitor, Diverges(), max_epochs=3)
    assert trainer.current_epoch == 3
    assert sum("could not measure" in str(warning.message) for warning in caught) == 1


def test_a_network_without_a_track_is_trained_all_the_same(tmp_path):
    class Linear(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Identity()
            self.head = nn.Linear(6, 3)

    with pytest.warns(UserWarning, match="no three layers"):
        assert fit(tmp_path, GeodesicMonitor(), Linear()).current_epoch == 2


def test_a_network_without_layers_is_trained_all_the_same(tmp_path):
    class Bare(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 6))

        def training_step(self, batch, batch_idx):
            return cross_entropy(batch[0] @ self.weight.T, batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="could not measure task 0: training_step calls no nn.Linear"):
        assert fit(tmp_path, FeatureLearningMonitor(), Bare()).current_epoch == 2
    monitor = ConnectivityMonitor(reference=Bare())
    fit(tmp_path, monitor, Bare())
    assert "connectivity/barrier" in monitor.history[0]


def test_manual_optimization_is_refused(tmp_path):
    class ByHand(Plain):
        automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="ByHand optimizes by hand, so SharpnessMonitor cannot run"):
        fit(tmp_path, SharpnessMonitor(), ByHand())


def test_a_step_that_writes_to_a_teacher_or_draws_from_a_generator_is_left_alone(tmp_path):
    class Follows(Plain):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)
            self.draw = torch.Generator().manual_seed(0)
            self.recent = collections.deque(maxlen=3)

        def training_step(self, batch, batch_idx):
            x = batch[0] + 0.1 * torch.randn(batch[0].shape, generator=self.draw)
            with torch.no_grad():
                for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
            self.recent.append(float(x.mean()))
            far = (self.net(x) - self.teacher(x)).square().mean() + sum(self.recent) * self.head.bias.sum()
            return super().training_step((x, batch[1]), batch_idx) + far

    states = []
    for monitors in ([], [kind() for kind in MONITORS]):
        module = Follows()
        make_trainer(tmp_path, *monitors, max_epochs=4).fit(module, whole())
        states.append(module.state_dict())
    assert all(monitor.history for monitor in monitors)
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_dropout_is_off_while_it_is_measured(tmp_path):
    class Drops(Plain):
        def __init__(self):
            super().__init__()
            self.net.insert(0, nn.Dropout(0.5))

    module, monitor = Drops(), SharpnessMonitor(examples=60)
    fit(tmp_path, monitor, module)
    module.eval()
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(one):
        network = nn.ModuleDict({"net": module.net, "head": module.head})
        hidden = torch.func.functional_call(network["net"], {n[4:]: w for n, w in one.items() if n[:4] == "net."}, (X,))
        return cross_entropy(hidden @ one["head.weight"].T + one["head.bias"], Y)

    wanted = hessian_eigenvalues(loss, weights, tolerance=1e-4)
    assert monitor.history[-1]["sharpness/eigenvalue"] == pytest.approx(float(wanted.values[0]), rel=0.02)
    trace = hessian_trace(loss, weights, 4, seed=0)
    assert monitor.history[-1]["sharpness/trace"] == pytest.approx(trace.mean, rel=1e-3)
    assert monitor.history[-1]["sharpness/trace_error"] == pytest.approx(trace.standard_error, rel=1e-2)


def test_a_second_fit_begins_anew(tmp_path):
    seen, speeds = Seen(), FeatureLearningMonitor()
    for shift in range(2):
        make_trainer(tmp_path, seen, speeds, max_epochs=1).fit(UserModule(), loader(shift=shift, shuffle=False))
    for shift, batch in enumerate(seen.seen):
        assert torch.equal(batch[0], next(iter(loader(shift=shift, shuffle=False)))[0][:7])
    assert [(entry["task"], entry["epoch"]) for entry in speeds.history] == [(0, 0), (1, 0)]


def test_only_what_is_of_the_examples_is_cut(tmp_path):
    batch = {"x": torch.arange(10.0)[:, None], "y": torch.arange(10), "class_weights": torch.ones(3), "epoch": 4}
    cut = first_examples(batch, 4)
    batch["x"] += 1
    assert cut["x"].tolist() == [[0.0], [1.0], [2.0], [3.0]]
    assert len(cut["y"]) == 4
    assert cut["class_weights"].tolist() == [1.0, 1.0, 1.0]
    assert cut["epoch"] == 4


def test_numbers_are_logged_at_the_optimizer_step_and_pictures_once_a_task(tmp_path):
    monitor, logger = GeodesicMonitor(), TensorBoardLogger(tmp_path)
    loaders = DataLoader(TensorDataset(X, Y), batch_size=20)  # 3 steps an epoch
    fit(tmp_path, monitor, Plain(), loaders, max_epochs=3, logger=logger)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    steps = [event.step for event in events.Scalars("geodesic/matched/net.1")]
    trained = [event.step for event in events.Scalars("train_acc")]
    assert steps == [trained[2], trained[5], trained[8]]
    assert len(events.Images("geodesic/tracks")) == 1


def test_a_slow_layer_is_not_a_still_one_and_a_still_one_has_its_reason(tmp_path):
    class Rates(Plain):
        def __init__(self, rate_of_first, detached=False):
            super().__init__()
            self.rate_of_first, self.detached = rate_of_first, detached

        def training_step(self, batch, batch_idx):
            if not self.detached:
                return super().training_step(batch, batch_idx)
            return cross_entropy(self.head(self.net(batch[0]).detach()), batch[1])

        def configure_optimizers(self):
            rest = [p for name, p in self.named_parameters() if not name.startswith("net.0.")]
            groups = [{"params": self.net[0].parameters(), "lr": self.rate_of_first}, {"params": rest}]
            return torch.optim.SGD(groups, lr=0.1)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stands still.*")
        fit(tmp_path, FeatureLearningMonitor(), Rates(0.01))
    with pytest.warns(UserWarning, match=r"Layer net\.0 stands still: .*the gradient that comes back to it is \d"):
        fit(tmp_path, FeatureLearningMonitor(), Rates(0.0))
    with pytest.warns(UserWarning, match="stands still") as caught:  # three of four layers
        fit(tmp_path, FeatureLearningMonitor(), Rates(0.1, detached=True))
    texts = [str(warning.message) for warning in caught if "stands still" in str(warning.message)]
    assert sorted(text.split()[1] for text in texts) == ["net.0", "net.2", "net.4"]
    assert all("no gradient comes back to it" in text for text in texts)


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
