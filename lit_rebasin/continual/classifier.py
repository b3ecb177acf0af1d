"""A LightningModule for the common case: classify images, task after task."""

import copy
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lit_rebasin.continual.single_examples import check_single_examples, is_of_single_example
from lit_rebasin.transport.arguments import check_count, check_function, check_number, plain


class ContinualClassifier(LightningModule):
    """Classify a stream of tasks with any backbone, through one head or a head a task.

    Batches are ``(x, y, task)`` as :class:`~lit_rebasin.ContinualDataModule` gives them. Logs ``train_loss``, ``train_acc``,
    ``val_loss`` and ``val_acc`` (one value a validation loader).

    Args:
        backbone: Maps images ``(B, C, H, W)`` to logits ``(B, n_classes)``, or to features ``(B, n_features)`` if ``n_features`` is given.
        n_classes: Number of classes of each head.
        n_features: Width of the backbone's output. ``None``: the backbone ends in logits, and there is no head of ours.
        n_heads: 1, or the number of tasks for a head a task (then ``n_features`` is needed).
        optimizer: Makes the optimizer from the parameters. Default: AdamW with learning rate 1e-3.
        weighting: ``"examples"``: the loss is the mean over the batch. ``"tasks"``: in the t-th task the new examples of a batch weigh ``1/t``
            in all and the replayed ones ``(t-1)/t``, as if every task had brought as many.
        lr_decay: What the learning rate is multiplied with from one task to the next (Mirzadeh et al., NeurIPS 2020).
        lr_schedule: What it does within a task: ``"constant"``, or ``"linear"``, which falls to 0 over its batches.
        distillation: Weight of how far, over the replayed examples, the network's predictions are from those of the network as it was after
            the last task: the Kullback-Leibler divergence of the softened ones (Hinton et al., 2015). 0 for none. No logits are stored, so
            transformed examples have their own. With a head a task it is the mean over the heads of old tasks, and over new examples too
            (Li and Hoiem, 2017).
        temperature: By which logits are divided to soften them, and its square multiplies the divergence.
        mixup: Distil not on the replayed images but on mixtures of each with a new one (mixup, Zhang et al., ICLR 2018, for distillation as in
            Beyer et al., CVPR 2022). The replayed image's part is spread evenly over [1/2, 1].

    Raises:
        ValueError: If ``n_classes`` or ``n_heads`` is below 1, a number is out of range, or several heads are asked for without
            ``n_features``.
        TypeError: If an argument is of a wrong kind.
        MisconfigurationException: In ``fit``, if there is distillation, decay or a schedule and the datamodule has no tasks, or if a task has a
            batch of one example and the backbone has BatchNorm that needs more.
    """

    _teacher: "ContinualClassifier | None" = None  # the network after the last task
    _taught: int = 0  # the task that it teaches

    def __init__(
        self,
        backbone: nn.Module,
        *,
        n_classes: int = 10,
        n_features: int | None = None,
        n_heads: int = 1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        weighting: Literal["examples", "tasks"] = "examples",
        lr_decay: float = 1.0,
        lr_schedule: Literal["constant", "linear"] = "constant",
        distillation: float = 0.0,
        temperature: float = 2.0,
        mixup: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module, got {backbone!r}.")
        n_classes, n_features, n_heads, lr_decay, distillation, temperature = map(
            plain, (n_classes, n_features, n_heads, lr_decay, distillation, temperature)
        )
        check_function("optimizer", optimizer, "parameters")
        for name, number in {"lr_decay": lr_decay, "distillation": distillation, "temperature": temperature}.items():
            check_number(name, number)
        if n_features is not None:
            check_count("n_features", n_features)
        check_count("n_classes", n_classes)
        check_count("n_heads", n_heads)
        if n_heads > 1 and n_features is None:
            raise ValueError(
                f"n_heads={n_heads} needs n_features, the width of the backbone's output that every head reads: "
                "pass a backbone without its last layer and n_features=<its width>."
            )
        if weighting not in ("examples", "tasks"):
            raise ValueError(f"weighting must be 'examples' or 'tasks', got {weighting!r}.")
        if lr_schedule not in ("constant", "linear"):
            raise ValueError(f"lr_schedule must be 'constant' or 'linear', got {lr_schedule!r}.")
        if not 0 < lr_decay <= 1:
            raise ValueError(f"lr_decay must lie in (0, 1], got {lr_decay}.")
        if not 0 <= distillation < float("inf"):
            raise ValueError(f"distillation must be a number of at least 0, got {distillation}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a number above 0, got {temperature}.")
        if mixup and not distillation:
            raise ValueError(
                "mixup mixes the images of the distillation, which is 0: pass its weight, or leave mixup out."
            )
        self.save_hyperparameters(ignore=["backbone", "optimizer"])
        self.weighting, self.lr_schedule = weighting, lr_schedule
        self.lr_decay, self.distillation, self.temperature = lr_decay, distillation, temperature
        self.mixup = mixup
        self.backbone = backbone
        heads = [] if n_features is None else [nn.Linear(n_features, n_classes) for _ in range(n_heads)]
        self.heads = nn.ModuleList(heads)
        self.optimizer = optimizer
        # torchmetrics refuses a single class, with which tasks of one class and a head each are learned.
        self.accuracy = MulticlassAccuracy(n_classes, average="micro", validate_args=n_classes > 1)

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return the logits ``(B, n_classes)`` of images ``x``; ``task`` (B,) picks the head of each where there are several."""
        return self._read_out(self._features(x), task)

    def _features(self, x: Tensor) -> Tensor:
        """Return what the backbone makes of images."""
        try:
            features: Tensor = self.backbone(x)
        except ValueError as error:
            if len(x) != 1 or not is_of_single_example(error):
                raise
            raise ValueError(
                "The backbone was given a batch of one example, of which its normalization has no statistics: pass a batch_size that leaves no "
                "rest of one, and keep two examples or more for replay."
            ) from error
        return features

    def _read_out(self, features: Tensor, task: Tensor | None) -> Tensor:
        """Return the logits of what the backbone made of images."""
        if len(self.heads) == 0:
            return self._logits(features)
        if len(self.heads) == 1:
            found: Tensor = self.heads[0](features)
            return found
        if task is None:
            raise ValueError(f"This model has {len(self.heads)} heads: pass `task`, the task index of every example.")
        if (
            torch.compiler.is_exporting()
        ):  # a loop over the tasks present depends on data, which an export cannot follow
            every = torch.stack([head(features) for head in self.heads], dim=1)
            return every[torch.arange(len(features)), task]
        logits = features.new_empty(len(features), int(self.hparams["n_classes"]))
        # Only the heads of tasks present are called: the others get no gradient, so no optimizer moves them.
        for t in task.unique().tolist():
            chosen = task == t
            logits[chosen] = self.heads[t](features[chosen]).to(logits.dtype)
        return logits

    def _logits(self, output: Tensor) -> Tensor:
        n_classes = int(self.hparams["n_classes"])
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] != n_classes:
            found = (
                f"outputs of shape {tuple(output.shape)}"
                if isinstance(output, Tensor)
                else f"a {type(output).__name__}"
            )
            raise ValueError(
                f"The backbone {type(self.backbone).__name__} returns {found}, but the stream has n_classes="
                f"{n_classes}: let it return one output a class, or pass n_features=<width of its output> to have a head put on it."
            )
        return output

    def on_fit_start(self) -> None:
        """Refuse a datamodule without tasks, if something depends on them, and one with batches that the backbone does not take."""
        self._check_data()
        check_single_examples(self.backbone, self._data())

    def on_train_epoch_start(self) -> None:
        """Keep a copy of the network as it is when a task begins."""
        if self._teacher is not None:
            self._teacher.to(self.device)  # a checkpoint leaves it on the CPU
        if not self.distillation or self._data().task == self._taught:
            return
        self._forget_teacher()
        if self._data().task > 0:
            self._teach(copy.deepcopy(self))
        self._taught = self._data().task

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch ``(x, y, task)``: cross-entropy, and how far the network is from the one after the last task."""
        x, y, task = batch
        features = self._features(x)
        logits = self._read_out(features, task)
        losses = cross_entropy(logits, y, reduction="none")
        loss = losses.mean() if self.weighting == "examples" else (_shares_of_tasks(task, losses) * losses).sum()
        # A merge evaluates this step on weights of its own, and asks for the loss of the labels alone.
        if self._teacher is not None and self.training:
            loss = loss + self.distillation * self._divergence(x, task, features)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", (logits.argmax(1) == y).float().mean())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy on one task of the stream."""
        x, y, task = batch
        logits = self(x, task)
        self.log("val_loss", cross_entropy(logits, y), batch_size=len(y), sync_dist=True)
        self.log("val_acc", self.accuracy(logits, y), batch_size=len(y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Make a fresh optimizer and scheduler; called again whenever the stream moves to its next task."""
        optimizer = self.optimizer(self.parameters())
        for group in optimizer.param_groups:
            group.update({name: plain(value) for name, value in group.items() if name != "params"})
        if self.lr_decay == 1 and self.lr_schedule == "constant":
            return optimizer
        self._check_data()  # Lightning asks for optimizers before it says that a fit starts
        data = self._data()
        for group in optimizer.param_groups:
            group["lr"] *= self.lr_decay**data.task
        if self.lr_schedule == "constant":
            return optimizer
        steps = self._steps(data.batches_of(data.task)) * data.epochs_per_task
        falling = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network after the last task, which the rest of this one still needs."""
        if self._teacher is not None:
            checkpoint["teacher"] = {"task": self._taught, "weights": self._teacher.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the network after the last task."""
        self._forget_teacher()
        if "teacher" in checkpoint and self.distillation:
            teacher = copy.deepcopy(self)
            teacher.load_state_dict(checkpoint["teacher"]["weights"])
            self._teach(teacher)
            self._taught = checkpoint["teacher"]["task"]

    def _divergence(self, x: Tensor, task: Tensor, features: Tensor) -> Tensor:
        """Return how far softened predictions are from the teacher's, as a mean over what is distilled."""
        assert self._teacher is not None
        old = task < task.max()
        if self.mixup or len(self.heads) <= 1:
            if not old.any():
                return features.new_zeros(())
            if self.mixup:
                x = _mixtures(x[old], x[~old])
                features = self._features(x)
            else:
                x, features = x[old], features[old]
        with torch.no_grad():
            theirs = self._teacher._old_logits(self._teacher.backbone(x), int(task.max()))
        ours = self._old_logits(features, int(task.max()))
        ours, theirs = (log_softmax(logits / self.temperature, -1) for logits in (ours, theirs))
        return self.temperature**2 * kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()

    def _old_logits(self, features: Tensor, n_old: int) -> Tensor:
        """Return the logits ``(B, n_classes)`` of features, or ``(B, n_old, n_classes)`` of every old head."""
        if len(self.heads) <= 1:
            return self._read_out(features, None)
        return torch.stack([head(features) for head in list(self.heads)[:n_old]], dim=1)

    def _teach(self, teacher: "ContinualClassifier") -> None:
        # No part of this module: it is neither trained nor merged.
        object.__setattr__(self, "_teacher", teacher.eval().requires_grad_(False))

    def _forget_teacher(self) -> None:
        object.__setattr__(self, "_teacher", None)
        self._taught = 0  # the first task has none

    def _steps(self, batches: int) -> int:
        """Return how many optimizer steps an epoch of so many batches is."""
        trainer: Any = self.trainer
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        count: int = max(1, -(-batches // trainer.accumulate_grad_batches))
        return count

    def _check_data(self) -> None:
        """Refuse a datamodule without tasks, if something depends on them."""
        asked = self.distillation or self.lr_decay < 1 or self.lr_schedule != "constant"
        if asked and not hasattr(self._data(), "batches_of"):
            raise MisconfigurationException(
                f"ContinualClassifier(distillation={self.distillation}, lr_decay={self.lr_decay}, lr_schedule={self.lr_schedule!r}) needs a "
                "datamodule with tasks, such as ContinualDataModule."
            )

    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)


def _mixtures(replayed: Tensor, new: Tensor) -> Tensor:
    """Return each replayed image mixed with a new one; which ones meet, and how much of each there is, is random as the batch's order is."""
    partners = new[torch.arange(len(replayed), device=new.device) % len(new)]
    share = torch.linspace(0.5, 1, len(replayed), device=new.device, dtype=new.dtype)
    return torch.lerp(partners, replayed, share.reshape(-1, *[1] * (replayed.ndim - 1)))


def _shares_of_tasks(task: Tensor, like: Tensor) -> Tensor:
    """Return weights of the examples that sum to 1: those of the latest task count as one task, the others as all before it."""
    latest = task.max()  # counted from 0, so it is how many tasks there were before
    old = (task < latest).to(like)
    n_old = old.sum()
    share = (n_old > 0) * latest / (latest + 1)
    return share * old / n_old.clamp_min(1) + (1 - share) * (1 - old) / (len(task) - n_old)
