"""What all monitors promise."""

import collections
import copy
import csv
import math
import random
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import (
    ConnectivityMonitor,
    ContinualMonitor,
    FeatureLearningMonitor,
    GeodesicMonitor,
    RebasinMerge,
    SharpnessMonitor,
)

from .monitored import MONITORS, Plain, Seen, X, Y, fit, whole
from .user_code import UserModule, Walk, loader, make_trainer


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


@pytest.mark.parametrize(
    ("name", "value"), [("every_n_epochs", 0), ("examples", 0), ("examples", 2.5), ("examples", None)]
)
@pytest.mark.parametrize("kind", MONITORS)
def test_arguments_out_of_range(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
        kind(**{name: value})


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


@pytest.mark.parametrize("kind", MONITORS)
def test_a_step_that_skips_the_examples_kept_aside_is_said_once(tmp_path, kind):
    class SkipsFirst(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    monitor = kind() if kind is not ConnectivityMonitor else kind(reference=Plain())
    loaders = DataLoader(TensorDataset(X, Y), batch_size=30)
    with pytest.warns(UserWarning, match=r"could not measure task 0: SkipsFirst.training_step returned None") as caught:
        assert fit(tmp_path, monitor, SkipsFirst(), loaders).current_epoch == 2
    assert sum("could not measure" in str(warning.message) for warning in caught) == 1
    assert monitor.history == []


class Diverges(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


@pytest.mark.parametrize("kind", MONITORS)
def test_a_training_that_diverges_is_not_ended_by_a_monitor(tmp_path, kind):
    monitor = kind() if kind is not ConnectivityMonitor else kind(reference=Plain())
    with pytest.warns(UserWarning, match=rf"{kind.__name__} could not measure task 0: ") as caught:
        trainer = fit(tmp_path, monitor, Diverges(), max_epochs=3)
    assert trainer.current_epoch == 3
    assert monitor.history == []
    assert sum("could not measure" in str(warning.message) for warning in caught) == 1


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


NOTES = {
    "tensor": (lambda: torch.zeros(3), lambda note: note.add_(1.0), lambda note: float(note.sum())),
    "array": (lambda: np.zeros(3), lambda note: np.add(note, 1.0, out=note), lambda note: float(note.sum())),
    "counter": (collections.Counter, lambda note: note.update(["n"]), lambda note: note["n"]),
    "nested": (
        lambda: {"a": [{"n": 0}]},
        lambda note: note["a"][0].update(n=note["a"][0]["n"] + 1),
        lambda note: note["a"][0]["n"],
    ),
    "within a tuple": (lambda: (torch.zeros(1),), lambda note: note[0].add_(1.0), lambda note: float(note[0])),
}


@pytest.mark.parametrize("note", NOTES)
def test_what_a_step_notes_down_is_put_back(tmp_path, note):
    make, write, read = NOTES[note]

    class Notes(Plain):
        def __init__(self):
            super().__init__()
            self.note = make()

        def training_step(self, batch, batch_idx):
            write(self.note)
            return super().training_step(batch, batch_idx) * (1 + read(self.note))

    states = []
    for monitors in ([], [kind() for kind in MONITORS]):
        module = Notes()
        make_trainer(tmp_path, *monitors).fit(module, whole())
        assert read(module.note) == pytest.approx(read(make()) + 2 * (3 if note in ("tensor", "array") else 1))
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


@pytest.mark.parametrize("source", [np.random.default_rng, np.random.RandomState, random.Random])
def test_random_generators_of_a_step_are_put_back(tmp_path, source):
    class Draws(Plain):
        def __init__(self):
            super().__init__()
            self.draw = source(0)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1 + self.draw.random())

    states = []
    for monitors in ([], [kind() for kind in MONITORS]):
        module = Draws()
        make_trainer(tmp_path, *monitors).fit(module, whole())
        states.append(module.state_dict())
    assert all(monitor.history for monitor in monitors)
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_what_a_step_writes_to_its_logger_itself_is_written_once(tmp_path):
    folders = []

    class Writes(Plain):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"mine": 1.0}, step=self.global_step)
            self.logger.experiment.log_metrics({"more": 1.0}, step=self.global_step)
            folders.append((self.logger.log_dir, self.logger.name, self.logger.version))
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, *[kind() for kind in MONITORS], logger=logger)
    trainer.fit(Writes(), whole())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [sum(row[name] != "" for row in rows) for name in ("mine", "more")] == [2, 2]
    assert set(folders) == {(logger.log_dir, logger.name, logger.version)}
    assert trainer.loggers == [logger]


def test_hooks_on_the_parameters_are_left_alone(tmp_path):
    class Hooked(Plain):
        def __init__(self):
            super().__init__()
            self.mean = 0.0
            self.head.weight.register_hook(self.smoothed)

        def smoothed(self, gradient):
            self.mean = 0.5 * self.mean + float(gradient.abs().mean())
            return gradient * (1 + self.mean)

    states = []
    for monitors in ([], [kind() for kind in MONITORS]):
        module = Hooked()
        make_trainer(tmp_path, *monitors, max_epochs=3).fit(module, whole())
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_a_second_fit_begins_anew(tmp_path):
    seen, speeds = Seen(), FeatureLearningMonitor()
    for shift in range(2):
        make_trainer(tmp_path, seen, speeds, max_epochs=1).fit(UserModule(), loader(shift=shift, shuffle=False))
    for shift, batch in enumerate(seen.seen):
        assert torch.equal(batch[0], next(iter(loader(shift=shift, shuffle=False)))[0][:7])
    assert [(entry["task"], entry["epoch"]) for entry in speeds.history] == [(0, 0), (1, 0)]


def test_examples_come_from_as_many_batches_as_it_takes(tmp_path):
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            pass

    batches, held = (DataLoader(TensorDataset(x, Y), batch_size=20) for x in (X, X + 1))
    for loaders, expected in (([batches], X), ([batches, held], X + 1)):
        monitor = Seen(examples=50)
        make_trainer(tmp_path, monitor, num_sanity_val_steps=3).fit(Validated(), *loaders)
        for x, y in monitor.seen:
            assert torch.equal(x, expected[:50])
            assert torch.equal(y, Y[:50])


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


@pytest.mark.parametrize("merges", [False, True])
def test_curves_of_fits_that_are_a_task_each_go_on(tmp_path, merges):
    monitor = SharpnessMonitor()
    callbacks = [monitor, *([RebasinMerge(alpha=0.5)] if merges else [])]
    module = Plain()
    for task in range(3):
        logger = CSVLogger(tmp_path, version=task)
        make_trainer(tmp_path, *callbacks, max_epochs=2, logger=logger).fit(
            module, DataLoader(TensorDataset(X, Y), batch_size=20)
        )
        with Path(logger.log_dir, "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("sharpness/trace")]
        assert [int(row["step"]) for row in rows] == [6 * task + 2, 6 * task + 5]
