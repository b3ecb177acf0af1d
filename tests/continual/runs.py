"""Tiny runs from plain data: a stream, a network, a learner, a Trainer and a method."""

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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
from lit_rebasin.continual.baselines import REPLAYING as REPLAYING_BASELINES
from lit_rebasin.continual.streams import TaskRecipe, pixel_permutation, rotation

from .walk import walk

OURS = ("rebasin", "no-merge", "mc-sgd", "rebasin-il")
METHODS = (*OURS, *BASELINES)
REPLAYING = ("mc-sgd", *REPLAYING_BASELINES)
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "still": partial(torch.optim.SGD, lr=0.0),
    "exploding": partial(torch.optim.SGD, lr=1e30),
}


@dataclass(frozen=True)
class Case:
    """A run, in arguments of the classes that make it; ``counts`` are examples of each label, for training and test."""

    method: str = "rebasin"
    counts: tuple[tuple[int, int, int], ...] = ((0, 6, 2), (1, 6, 2), (2, 6, 2), (3, 6, 2))
    shape: tuple[int, int, int] = (1, 4, 4)
    dtype: str = "float32"
    data: tuple[tuple[str, Any], ...] = ()
    network: tuple[tuple[str, Any], ...] = ()
    learner: tuple[tuple[str, Any], ...] = ()
    trainer: tuple[tuple[str, Any], ...] = ()
    merge: tuple[tuple[str, Any], ...] = ()

    @property
    def given(self):
        """All arguments by name."""
        return dict([*self.merge, *self.data, *self.network, *self.learner, *self.trainer])


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


NORMS = {
    "none": lambda width: nn.Identity(),
    "batch": nn.BatchNorm1d,
    "cumulative": partial(nn.BatchNorm1d, momentum=None),
    "plain": partial(nn.BatchNorm1d, affine=False),
    "layer": nn.LayerNorm,
}


def network(shape, outputs, kind="mlp", width=3, norm="none", dropout=0.0):
    """Make a small network with so many outputs."""
    pixels = shape[0] * shape[1] * shape[2]
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, outputs))
    if kind == "convolution":
        spatial = {"none": nn.Identity(), "layer": nn.GroupNorm(1, width)}.get(norm, nn.BatchNorm2d(width))
        body = [nn.Conv2d(shape[0], width, 3, padding=1), spatial, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*body, nn.Dropout(dropout), nn.Linear(width, outputs))
    inner = [nn.Linear(width, width), NORMS[norm](width), nn.ReLU(), nn.Dropout(dropout)]
    middle = [Residual(nn.Sequential(*inner))] if kind == "residual" else inner
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), *middle, nn.Linear(width, outputs))


def make_data(case):
    """Write images, each class around a point of its own, to a file and read them as a stream."""
    draws = np.random.default_rng(0)
    arrays = {}
    for part, column in (("train", 1), ("test", 2)):
        labels = np.array([label for label, *counts in case.counts for _ in range(counts[column - 1])], dtype=np.int64)
        centres = {label: draws.random(case.shape) for label, *_ in case.counts}
        images = np.array([(centres[y] + draws.random(case.shape)) / 2 for y in labels.tolist()])
        images = images.reshape(-1, *case.shape)
        arrays |= {
            f"x_{part}": (images * 255 if case.dtype == "uint8" else images).astype(case.dtype),
            f"y_{part}": labels,
        }
    options = dict(case.data)
    transform = RandomShift(1) if options.pop("shifts", False) else None
    recipes = RECIPES.get(options.pop("recipes", None))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        np.savez(path, **arrays)
        data = ContinualDataModule("arrays", data_dir=str(path), replay_transform=transform, **options)
    if recipes is not None and data.stream.scenario == "domain":
        data.stream = replace(data.stream, recipes=tuple(recipes(data.stream, task) for task in range(data.n_tasks)))
    return data


def _uneven(stream, task):
    """All of what is left after the first examples, one for each task before."""
    n = len(stream.base.y_train)
    return TaskRecipe(torch.arange(min(task, n - 1), n if task == len(stream.recipes) - 1 else min(task, n - 1) + 1))


RECIPES = {
    "rotated": lambda stream, task: TaskRecipe(transform=rotation(45.0 * task, smooth=True)),
    "permuted": lambda stream, task: TaskRecipe(
        transform=pixel_permutation(torch.arange(stream.base.x_train[0].numel()).roll(task))
    ),
    "uneven": _uneven,
}


def make_model(case, data):
    options = dict(case.learner)
    optimizer = OPTIMIZERS[options.pop("optimizer", "adamw")]
    features = options.pop("features", None if data.n_heads == 1 else 4)
    outputs = data.n_classes if features is None else features
    backbone = network(data.input_shape, outputs, **dict(case.network))
    heads = {"n_classes": data.n_classes, "n_heads": data.n_heads, "n_features": features}
    return ContinualClassifier(backbone, optimizer=optimizer, **heads, **options)


@dataclass
class Outcome:
    """What a run has come to."""

    matrix: torch.Tensor
    model: pl.LightningModule
    data: ContinualDataModule
    history: list[dict[str, Any]]
    trained: int  # tasks


def train(case):
    """Run a case."""
    data = make_data(case)
    model = make_model(case, data)
    options = dict(case.trainer)
    tasks = max(1, data.n_tasks - options.pop("tasks_left_out", 0))
    if case.method in BASELINES:
        matrix = run_baseline(case.method, model, data, n_tasks=tasks)
        return Outcome(matrix, model, data, [], tasks)
    merge = dict(case.merge)
    if "options" in merge:
        merge["options"] = dict(merge["options"])
    callbacks = {"rebasin": lambda: [RebasinMerge(**merge)], "mc-sgd": lambda: [ModeConnectivity()]}
    merges = callbacks.get(case.method, list)()
    model = RebasinIL(model) if case.method == "rebasin-il" else model
    monitor = ContinualMonitor()
    (fit_each if options.pop("fits", False) else walk)(model, data, *merges, monitor, tasks=tasks, **options)
    return Outcome(monitor.matrix, model, data, getattr(merges[0], "history", []) if merges else [], tasks)


def fit_each(model, data, *callbacks, tasks, **options):
    """Train the first tasks of a stream, each with a Trainer and loaders of its own; validation closes each."""
    for task in range(tasks):
        trainer = pl.Trainer(
            max_epochs=data.epochs_per_task,
            check_val_every_n_epoch=data.epochs_per_task,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            num_sanity_val_steps=0,
            **options,
        )
        new = DataLoader(TensorDataset(*data.new_examples(task)), data.batch_size, shuffle=True)
        trainer.fit(model, new, data.val_dataloader())
