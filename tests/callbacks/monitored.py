"""A small network that monitors watch, and how it is trained."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import (
    ConnectivityMonitor,
    FeatureLearningMonitor,
    GeodesicMonitor,
    SharpnessMonitor,
)
from lit_rebasin.callbacks.monitor import Monitor

from .user_code import make_trainer

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


class Seen(Monitor):
    """Keeps what it is given to measure on."""

    def __init__(self, examples=7):
        super().__init__(every_n_epochs=1, examples=examples)
        self.seen = []

    def _measure(self, trainer, step, batch):
        self.seen.append(batch)
        return {"seen/loss": float(step.loss(batch).detach())}
