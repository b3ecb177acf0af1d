"""A LightningModule for the common case: classify images, task after task."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy


class ContinualClassifier(LightningModule):
    """Classify a stream of tasks with any backbone, through one head or a head a task.

    Batches are ``(x, y, task)`` as :class:`~lit_rebasin.continual.ContinualDataModule` gives them. Logs ``train_loss``, ``train_acc``,
    ``val_loss`` and ``val_acc`` (one value a validation loader).

    Args:
        backbone: Maps images ``(B, C, H, W)`` to logits ``(B, n_classes)``, or to features ``(B, n_features)`` if ``n_features`` is given.
        n_classes: Number of classes of each head.
        n_features: Width of the backbone's output. ``None``: the backbone ends in logits, and there is no head of ours.
        n_heads: 1, or the number of tasks for a head a task (then ``n_features`` is needed).
        optimizer: Makes the optimizer from the parameters. Default: AdamW with learning rate 1e-3.

    Raises:
        ValueError: If ``n_classes`` or ``n_heads`` is below 1, or several heads are asked for without ``n_features``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        n_classes: int = 10,
        n_features: int | None = None,
        n_heads: int = 1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        if n_classes < 1 or n_heads < 1:
            raise ValueError(f"n_classes and n_heads must be at least 1, got n_classes={n_classes}, n_heads={n_heads}.")
        if n_heads > 1 and n_features is None:
            raise ValueError(
                f"n_heads={n_heads} needs n_features, the width of the backbone's output that every head reads: "
                "pass a backbone without its last layer and n_features=<its width>."
            )
        self.save_hyperparameters(ignore=["backbone", "optimizer"])
        self.backbone = backbone
        heads = [] if n_features is None else [nn.Linear(n_features, n_classes) for _ in range(n_heads)]
        self.heads = nn.ModuleList(heads)
        self.optimizer = optimizer
        self.accuracy = MulticlassAccuracy(n_classes, average="micro")

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return the logits ``(B, n_classes)`` of images ``x``; ``task`` (B,) picks the head of each where there are several."""
        features = self.backbone(x)
        if len(self.heads) == 0:
            return self._logits(features)
        if len(self.heads) == 1:
            return self.heads[0](features)
        if task is None:
            raise ValueError(f"This model has {len(self.heads)} heads: pass `task`, the task index of every example.")
        if (
            torch.compiler.is_exporting()
        ):  # a loop over the tasks present depends on data, which an export cannot follow
            every = torch.stack([head(features) for head in self.heads], dim=1)
            return every[torch.arange(len(x)), task]
        logits = features.new_empty(len(x), int(self.hparams["n_classes"]))
        # Only the heads of tasks present are called: the others get no gradient, so no optimizer moves them.
        for t in task.unique().tolist():
            chosen = task == t
            logits[chosen] = self.heads[t](features[chosen]).to(logits.dtype)
        return logits

    def _logits(self, output: Tensor) -> Tensor:
        n_classes = int(self.hparams["n_classes"])
        if output.ndim != 2 or output.shape[1] != n_classes:
            raise ValueError(
                f"The backbone {type(self.backbone).__name__} returns outputs of shape {tuple(output.shape)}, but the stream has n_classes="
                f"{n_classes}: let it return one output a class, or pass n_features=<width of its output> to have a head put on it."
            )
        return output

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch ``(x, y, task)``."""
        x, y, task = batch
        logits = self(x, task)
        loss = cross_entropy(logits, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", (logits.argmax(1) == y).float().mean())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy on one task of the stream."""
        x, y, task = batch
        logits = self(x, task)
        self.log("val_loss", cross_entropy(logits, y), batch_size=len(y))
        self.log("val_acc", self.accuracy(logits, y), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        """Make a fresh optimizer; called again whenever the stream moves to its next task."""
        return self.optimizer(self.parameters())
