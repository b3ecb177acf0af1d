"""The published incremental re-basin, to the letter: permutations and a residual are all that later tasks train."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lit_rebasin.alignment import SinkhornRebasin, incremental_cost
from lit_rebasin.continual.classifier import ContinualClassifier
from lit_rebasin.continual.single_examples import check_single_examples
from lit_rebasin.merging import has_batch_norm, reestimate_batch_norm
from lit_rebasin.symmetry import permutation_spec, permute
from lit_rebasin.transport.arguments import check_positive


class RebasinIL(LightningModule):
    """Learn a stream as RebasinIL does (Pena et al., CVPR 2023, section 4.3, and their public code, fagp/rebasin-IL).

    The first task is trained as usual. From then on a task leaves the network as it is and trains what is done to it: soft permutations,
    with logits that AdamW moves, and a residual ``delta`` that SGD moves, its gradient clipped elementwise, by the loss at the midpoint,
    ``C(1/2 (theta + P theta) + delta)``. The task ends with ``theta <- alpha theta + (1 - alpha) pi_P(theta) + delta``, the permutation hard
    (eq. 12). Defaults are theirs.

    BatchNorm, of which they say nothing, uses the statistics of the batch while permutations are trained; its running statistics are estimated
    anew on the last batches of the task.

    Needs a :class:`~lit_rebasin.ContinualDataModule` in the same Trainer. A fit cannot be resumed from a checkpoint after the first task.

    Args:
        classifier: The network and the optimizer of the first task.
        alpha: Weight of the network as it is in the merge.
        learning_rate: Of the logits; they start at ``I + 0.1 N(0, 1)``.
        residual_learning_rate: Of ``delta``; it starts at ``1e-4 N(0, 1)``.
        residual_weight_decay: Of ``delta``.
        residual_clip: Largest absolute gradient of an entry of ``delta``.
        seed: Of the logits and ``delta`` at their start.

    Raises:
        ValueError: If a number is out of range.
        MisconfigurationException: In ``fit``, if the network has nothing to permute, or if a task has a batch of one example and the network
            has BatchNorm that needs more.
        RuntimeError: In ``fit``, if training a task leaves NaN or infinity.
    """

    def __init__(
        self,
        classifier: ContinualClassifier,
        *,
        alpha: float = 0.8,
        learning_rate: float = 0.1,
        residual_learning_rate: float = 0.05,
        residual_weight_decay: float = 0.1,
        residual_clip: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is the weight of the network as it is and must lie in [0, 1], got {alpha}.")
        check_positive(
            learning_rate=learning_rate, residual_learning_rate=residual_learning_rate, residual_clip=residual_clip
        )
        if not residual_weight_decay >= 0:
            raise ValueError(f"residual_weight_decay must be 0 or more, got {residual_weight_decay}.")
        self.automatic_optimization = False
        self.classifier = classifier
        self.alpha, self.seed, self.residual_clip = alpha, seed, residual_clip
        self.learning_rate = learning_rate
        self.residual_learning_rate, self.residual_weight_decay = residual_learning_rate, residual_weight_decay
        self.rebasin: SinkhornRebasin | None = None
        self.residual = nn.ParameterDict()
        self._spec: Any = None
        self._recent: list[Any] = []  # batches, for the statistics of the merge

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return the logits of the network as it is."""
        found: Tensor = self.classifier(x, task)
        return found

    def configure_optimizers(self) -> Any:
        """Make the optimizers of a task; called again whenever the stream moves to its next one."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.task == 0:  # of an earlier fit nothing is left
            self.rebasin, self.residual = None, nn.ParameterDict()
            self._spec = permutation_spec(self.classifier, *self._example(data))
            return self.classifier.optimizer(self.classifier.parameters())
        seed = self.seed + data.task
        generator = torch.Generator().manual_seed(seed)
        self.rebasin = SinkhornRebasin(self._spec, sharpness=1.0, noise=0.1, seed=seed).to(self.device)
        self.residual = nn.ParameterDict()
        for name, parameter in self.classifier.named_parameters():
            start = 1e-4 * torch.randn(parameter.shape, generator=generator)
            self.residual[_key(name)] = nn.Parameter(start.to(parameter))
        return [
            torch.optim.AdamW(self.rebasin.parameters(), lr=self.learning_rate),
            torch.optim.SGD(
                self.residual.parameters(), lr=self.residual_learning_rate, weight_decay=self.residual_weight_decay
            ),
        ]

    def on_fit_start(self) -> None:
        """Refuse a network without permutations, and a datamodule with batches that it does not take."""
        if not self._spec.groups:
            reasons = "; ".join(sorted(set(self._spec.fixed.values())))
            raise MisconfigurationException(
                f"RebasinIL trains permutations, but the network has no permutable group. Why its axes are fixed: {reasons}."
            )
        check_single_examples(self.classifier.backbone, getattr(self.trainer, "datamodule", None))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Take a step: of the network in the first task, of permutations and residual in later ones."""
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        try:
            loss = self._loss(batch)
        except ValueError:  # of a soft permutation of NaN
            self._check_finite(int(batch[2].max()))
            raise
        self.manual_backward(loss)
        if self.rebasin is not None:
            nn.utils.clip_grad_value_(self.residual.parameters(), self.residual_clip)
        for optimizer in optimizers:
            optimizer.step()
        self.log("train_loss", loss, prog_bar=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that this module has no place for."""
        if any(name.startswith(("rebasin.", "residual.")) for name in checkpoint["state_dict"]):
            raise RuntimeError("RebasinIL cannot go on from a checkpoint after the first task: begin the stream again.")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Merge at the end of a task, before its validation."""
        self._recent = [*self._recent[-9:], batch]
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        ends = self.trainer.is_last_batch and (self.trainer.current_epoch + 1) % data.epochs_per_task == 0
        if not ends:
            return
        self._check_finite(data.task)
        if self.rebasin is not None:
            self._merge(self.rebasin)
            if has_batch_norm(self.classifier):
                reestimate_batch_norm(self.classifier, self._run, self._recent)
        self._recent = []

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy on one task of the stream."""
        x, y, task = batch
        logits = self(x, task)
        self.log("val_loss", cross_entropy(logits, y), batch_size=len(y), sync_dist=True)
        self.log("val_acc", self.classifier.accuracy(logits, y), batch_size=len(y), sync_dist=True)

    def _check_finite(self, task: int) -> None:
        """Refuse to go on with weights that training has broken."""
        for name, tensor in self.named_parameters():
            if not tensor.isfinite().all():
                raise RuntimeError(
                    f"Training left NaN or infinity in {name!r} after task {task}: lower the learning rates, of the classifier's optimizer too."
                )

    def _example(self, data: Any) -> list[Tensor]:
        """Return the inputs of a pass through the classifier."""
        x = self.trainer.precision_plugin.convert_input(torch.zeros(2, *data.input_shape, device=self.device))
        return [x] if data.n_heads == 1 else [x, torch.zeros(2, dtype=torch.long, device=self.device)]

    def _run(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        found: Tensor = self(batch[0], batch[2])
        return found

    def _loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, task = batch
        if self.rebasin is None:
            return cross_entropy(self(x, task), y)
        fixed = {name: tensor.detach() for name, tensor in self._weights().items()}

        buffers = {name for name, _ in self.classifier.named_buffers()}

        def loss(weights: Mapping[str, Tensor]) -> Tensor:
            # BatchNorm writes to its buffers, and takes none that carry a gradient: it must get copies.
            given = {name: t.detach().clone() if name in buffers else t for name, t in weights.items()}
            return cross_entropy(functional_call(self.classifier, given, (x, task)), y)

        return incremental_cost(self.rebasin(fixed), fixed, loss, 0.5, self._residual())

    @torch.no_grad()
    def _merge(self, rebasin: SinkhornRebasin) -> None:
        weights, residual = self._weights(), self._residual()
        moved = permute(weights, self._spec, rebasin.permutations())
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                merged = self.alpha * tensor + (1 - self.alpha) * moved[name]
                tensor.copy_(merged + residual[name] if name in residual else merged)

    def _weights(self) -> dict[str, Tensor]:
        return {**dict(self.classifier.named_parameters()), **dict(self.classifier.named_buffers())}

    def _residual(self) -> dict[str, Tensor]:
        return {name: self.residual[_key(name)] for name, _ in self.classifier.named_parameters()}


def check_rebasin_il(options: Mapping[str, Any]) -> None:
    """Raise what :class:`RebasinIL` raises for arguments that it does not take, before there is a network."""
    RebasinIL(ContinualClassifier(nn.Identity()), **options)


def _key(name: str) -> str:
    """Return a parameter's name without dots, which a ParameterDict does not take."""
    return name.replace(".", "/")
