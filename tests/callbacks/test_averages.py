"""Merges beside callbacks that average weights: the network of a task is its average."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_rebasin import ContinualClassifier, ContinualDataModule, RandomStates, RebasinMerge

from .monitored import Plain, whole
from .user_code import make_trainer

EPOCHS = 6


class Normed(Plain):
    """With running statistics, which an average of the weights does not fit."""

    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(5))


def averaging(kind):
    return EMAWeightAveraging(decay=0.5) if kind == "ema" else StochasticWeightAveraging(0.1, swa_epoch_start=2)


def parameters(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class Snapshots(pl.Callback):
    """What a SWA takes the mean of: the weights at the start of the second epoch and of those after it."""

    def __init__(self):
        self.taken = []

    def on_train_epoch_start(self, trainer, module):
        if 1 <= trainer.current_epoch < EPOCHS:
            self.taken.append(parameters(module))

    def mean(self):
        return {name: torch.stack([one[name] for one in self.taken]).mean(0) for name in self.taken[0]}


def average_of_a_task(tmp_path, make, kind):
    """Train without a merge; return what is averaged, and the last weights of a training without an average."""
    module, plain, snapshots = make(), make(), Snapshots()
    make_trainer(tmp_path, averaging(kind), snapshots, max_epochs=EPOCHS).fit(module, whole())
    make_trainer(tmp_path, max_epochs=EPOCHS).fit(plain, whole())
    # A SWA averages no buffers.
    return {**module.state_dict()} if kind == "ema" else snapshots.mean(), parameters(plain)


@pytest.mark.parametrize("make", [Plain, Normed])
@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("first", [True, False], ids=["average first", "merge first"])
def test_what_is_merged_is_the_average_and_what_is_left_is_the_merge(tmp_path, make, kind, first):
    expected, last = average_of_a_task(tmp_path, make, kind)
    assert not torch.allclose(expected["head.weight"], last["head.weight"], rtol=1e-3)
    module, merge = make(), RebasinMerge(alpha=0.5)
    for task in range(2):
        callbacks = [averaging(kind), merge]
        make_trainer(tmp_path, *(callbacks if first else callbacks[::-1]), max_epochs=EPOCHS).fit(module, whole())
        now = module.state_dict()
        torch.testing.assert_close(now, merge.previous)
        if task == 0:
            torch.testing.assert_close({name: now[name] for name in expected}, expected)
    assert len(merge.history) == 1


class EpochMean(WeightAveraging):
    """The mean of the weights at the ends of epochs, from one on."""

    def __init__(self, begins):
        super().__init__()
        self.begins = begins

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None and epoch_idx >= self.begins


@pytest.mark.parametrize("first", [True, False], ids=["average first", "merge first"])
def test_an_average_by_epochs_has_the_last_one(tmp_path, first):
    alone, module, merge = Plain(), Plain(), RebasinMerge(alpha=0.5)
    make_trainer(tmp_path, EpochMean(2), max_epochs=EPOCHS).fit(alone, whole())
    for task in range(2):
        callbacks = [EpochMean(2), merge]
        make_trainer(tmp_path, *(callbacks if first else callbacks[::-1]), max_epochs=EPOCHS).fit(module, whole())
        for name, parameter in parameters(module).items():
            torch.testing.assert_close(parameter, merge.previous[name])
            if task == 0:
                torch.testing.assert_close(parameter, parameters(alone)[name])


def test_an_average_that_has_not_begun_is_not_taken(tmp_path):
    plain, module, merge = Plain(), Plain(), RebasinMerge(alpha=0.5)
    make_trainer(tmp_path, max_epochs=EPOCHS).fit(plain, whole())
    make_trainer(tmp_path, EpochMean(2 * EPOCHS), merge, max_epochs=EPOCHS).fit(module, whole())
    for name, parameter in parameters(module).items():
        torch.testing.assert_close(parameter, parameters(plain)[name])


def classifier():
    return ContinualClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))


def stream(n_tasks=3, epochs_per_task=1):
    return ContinualDataModule(
        "rotated-digits", n_tasks=n_tasks, epochs_per_task=epochs_per_task, batch_size=256, replay_per_class=1
    )


def test_in_a_stream_every_task_has_an_average_of_its_own(tmp_path):
    class Counts(pl.Callback):
        """How many networks the average is of after the first step of a task, which begins with fresh weights."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 0:
                counts.append(int(average._average_model.n_averaged))

    torch.manual_seed(0)
    counts, average = [], EMAWeightAveraging(decay=0.9)
    module, merge = classifier(), RebasinMerge(alpha=0.5, start="fresh")
    options = {"reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0, "max_epochs": 3}
    make_trainer(tmp_path, average, merge, Counts(), **options).fit(module, datamodule=stream())
    assert len(merge.history) == 2
    assert counts == [1, 1, 1]
    for name, parameter in parameters(module).items():
        torch.testing.assert_close(parameter, merge.previous[name])


def test_an_average_that_begins_once_a_fit_is_refused_in_a_stream(tmp_path):
    options = {"reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0, "max_epochs": 3}
    trainer = make_trainer(tmp_path, StochasticWeightAveraging(0.1), RebasinMerge(), **options)
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging begins once a fit"):
        trainer.fit(classifier(), datamodule=stream())


def test_an_average_goes_on_where_a_fit_is_resumed_inside_a_task(tmp_path):
    def fitted(folder, checkpoint=None):
        torch.manual_seed(0)
        module, saver = (
            classifier(),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        )
        merge = RebasinMerge(alpha=0.5, start="fresh")
        callbacks = [EMAWeightAveraging(decay=0.9), saver, RandomStates(), merge]
        trainer = make_trainer(
            folder, *callbacks, max_epochs=4, enable_checkpointing=True, reload_dataloaders_every_n_epochs=1
        )
        trainer.fit(module, datamodule=stream(n_tasks=2, epochs_per_task=2), ckpt_path=checkpoint)
        return parameters(module)

    whole_fit = fitted(tmp_path / "whole")
    for epoch in (0, 1, 2):
        resumed = fitted(tmp_path / str(epoch), tmp_path / "whole" / f"epoch={epoch}.ckpt")
        for name, parameter in resumed.items():
            assert torch.equal(parameter, whole_fit[name]), (epoch, name)
