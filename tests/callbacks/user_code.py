import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class UserModule(pl.LightningModule):
    """A user's module: no forward, batches (x, y) or (x, y, task), dropout, BatchNorm and a metric of its own."""

    def __init__(self, batch_norm=True):
        super().__init__()
        norm = nn.BatchNorm1d(24) if batch_norm else nn.Identity()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 24),
            norm,
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(24, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        )
        self.train_acc = MulticlassAccuracy(10, average="micro")
        self.optimizers_made = 0

    def training_step(self, batch, batch_idx):
        x, y, *_ = batch
        logits = self.net(x)
        self.train_acc(logits, y)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        loss = cross_entropy(logits, y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y, *_ = batch
        self.log("val_loss", cross_entropy(self.net(x), y))
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        self.optimizers_made += 1
        return torch.optim.Adam(self.parameters(), lr=0.01)


def digits(shift=0):
    data = load_digits()
    x = torch.tensor(data.data[:600] / 16, dtype=torch.float32).roll(shift, 1)
    return TensorDataset(x, torch.tensor(data.target[:600]))


def loader(shift=0, shuffle=True):
    return DataLoader(digits(shift), batch_size=100, shuffle=shuffle)


class Walk(pl.LightningDataModule):
    """A user's datamodule that walks a stream by itself: all that is asked is `epochs_per_task`."""

    epochs_per_task = 2

    def train_dataloader(self):
        return loader(shift=self.trainer.current_epoch // self.epochs_per_task)

    def val_dataloader(self):
        return loader(shuffle=False)


def make_trainer(tmp_path, *callbacks, max_epochs=2, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
