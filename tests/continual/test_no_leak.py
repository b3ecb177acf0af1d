"""Test data is for the reported accuracy alone: with poisoned test data, nothing else changes."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_rebasin import (
    ContinualClassifier,
    ContinualDataModule,
    ContinualMonitor,
    ModeConnectivity,
    RandomShift,
    RebasinMerge,
)
from lit_rebasin.continual import RebasinIL
from lit_rebasin.continual.baselines import BASELINES, run_baseline

from .walk import walk

OURS = {
    "residual": lambda: [RebasinMerge(alpha=0.5, method="sinkhorn", start="fresh", options={"steps": 3})],
    "regmean": lambda: [RebasinMerge(alpha=0.5, combine="regmean")],
    "rebasin": lambda: [RebasinMerge(alpha="line-search", statistics="repair", start="fresh")],
    "fisher": lambda: [RebasinMerge(alpha="fisher", method="covariance")],
    "clewi": lambda: [RebasinMerge(alpha=0.5, method="activations", examples="kept")],
    "mc-sgd": lambda: [ModeConnectivity()],
    "rebasin-il": lambda: [],
}


def stream(poisoned, **options):
    data = ContinualDataModule(
        "rotated-digits", n_tasks=3, epochs_per_task=1, replay_per_class=2, replay_transform=RandomShift(1), **options
    )
    if poisoned:
        base = data.stream.base
        poison = replace(base, y_test=9 - base.y_test, x_test=torch.randn_like(base.x_test))
        data.stream = replace(data.stream, base=poison)
    return data


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return ContinualClassifier(body, distillation=1.0, mixup=True, lr_decay=0.9, lr_schedule="linear")


def train(name, poisoned, **options):
    """Return the weights, the accuracy matrix, and what the merges have noted."""
    data, model = stream(poisoned, **options), network()
    if name in BASELINES:
        pl.seed_everything(1, verbose=False)
        return model, run_baseline(name, model, data), []
    model = RebasinIL(model) if name == "rebasin-il" else model
    callbacks, monitor = OURS[name](), ContinualMonitor()
    walk(model, data, *callbacks, monitor, tasks=3)
    history = getattr(callbacks[0], "history", []) if callbacks else []
    return model, monitor.matrix, [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


@pytest.mark.parametrize("name", [*OURS, *BASELINES])
def test_poisoned_test_data_changes_the_reported_accuracy_alone(name):
    (model, matrix, history), (other, poisoned, noted) = (train(name, poisoned) for poisoned in (False, True))
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert history == noted
    assert not torch.equal(matrix[-1], poisoned[-1])


@pytest.mark.parametrize("name", ["rebasin", "mc-sgd", "replay"])
def test_poisoned_test_data_changes_nothing_that_settings_are_chosen_by(name):
    """A sweep ranks by the accuracy on held-back training data."""
    (model, matrix, _), (other, same, _) = (
        train(name, poisoned, validation_fraction=0.3) for poisoned in (False, True)
    )
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(matrix, same, rtol=0, atol=0, equal_nan=True)


def test_what_is_held_back_is_neither_trained_on_nor_kept():
    data = stream(False, validation_fraction=0.3)
    held = {tuple(image.flatten().tolist()) for image in data.val_dataloader()[1].dataset.new[0]}
    new = {tuple(image.flatten().tolist()) for image in data.new_examples(1)[0]}
    kept = {tuple(image.flatten().tolist()) for image in data.kept_examples(2)[0]}
    test = {tuple(image.flatten().tolist()) for image in data.stream.test(1)[0]}
    assert len(held) > 100
    assert not held & (new | kept | test)
