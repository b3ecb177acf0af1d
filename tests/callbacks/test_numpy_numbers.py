"""Settings that come from NumPy, as those of a sweep do: the checkpoint of such a run must be one that can be read."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_rebasin import ContinualClassifier, ContinualDataModule, RebasinMerge

SINKHORN = {"method": "sinkhorn", "options": {"steps": np.int64(2), "learning_rate": np.float32(0.1)}}


def make(model=None, data=None, learning_rate=0.1):
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16))
    options = {"n_features": 16, "optimizer": lambda p: torch.optim.SGD(p, lr=learning_rate), **(model or {})}
    stream = {"n_tasks": 2, "epochs_per_task": 1, "replay_per_class": 1, **(data or {})}
    return ContinualClassifier(body, **options), ContinualDataModule("rotated-digits", **stream)


def make_trainer(folder, **merge):
    return pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        reload_dataloaders_every_n_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RebasinMerge(**merge), ModelCheckpoint(folder, save_last=True)],
    )


@pytest.mark.parametrize(
    ("made", "merge"),
    [
        ({}, {"alpha": np.float32(0.5), "margin": np.float64(2), "batches": np.int64(3), "seed": np.int64(4)}),
        ({}, SINKHORN),
        ({"learning_rate": np.float64(0.1)}, {}),
        ({"model": {"n_classes": np.int64(10), "n_features": np.int64(16), "lr_decay": np.float64(0.5)}}, {}),
        ({"model": {"distillation": np.float64(0.5), "temperature": np.float32(2)}}, {}),
        ({"data": {"n_tasks": np.int64(2), "epochs_per_task": np.int64(1), "batch_size": np.int32(32)}}, {}),
        ({"data": {"replay_per_class": np.int64(1), "seed": np.int64(3), "validation_fraction": np.float64(0.2)}}, {}),
    ],
)
def test_the_run_can_be_gone_on_with(tmp_path, made, merge):
    model, data = make(**made)
    make_trainer(tmp_path, **merge).fit(model, datamodule=data)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again, data = make(**made)
    make_trainer(tmp_path, **merge).fit(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
