"""A small network, and tasks that it is trained and merged on."""

import copy

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from .user_code import make_trainer

X = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, :3].argmax(1), X[:, 3:].argmax(1)])


class Net(nn.Sequential):
    def __init__(self, norm=False):
        super().__init__(
            nn.Linear(6, 14),
            nn.BatchNorm1d(14) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Linear(14, 11),
            nn.ReLU(),
            nn.Linear(11, 3),
        )


class Plain(pl.LightningModule):
    def __init__(self, norm=False):
        super().__init__()
        self.net = Net(norm)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Held(Callback):
    """Keeps copies of the network as it was trained, and of the one before it; every task begins with fresh weights."""

    def on_train_start(self, trainer, module):
        self.previous = copy.deepcopy(module.net).eval()
        for layer in module.net:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def on_train_batch_end(self, trainer, module, *args):
        self.trained = copy.deepcopy(module.net).eval()


def batches(task):
    return DataLoader(TensorDataset(X, Y[task % 2]), batch_size=30)


def merged(tmp_path, merge, tasks=2, norm=False):
    """Train and merge; returns the module, and what the last merge began with."""
    torch.manual_seed(0)
    module, held = Plain(norm), Held()
    for task in range(tasks):
        make_trainer(tmp_path, held, merge, max_epochs=5).fit(module, batches(task))
    module.net.eval()
    return module, held


def tensors(network):
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
