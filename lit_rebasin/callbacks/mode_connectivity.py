"""The callback of MC-SGD: a network that lies on straight low-loss lines to its previous self and to the one that a task trained."""

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lit_rebasin.alignment.costs import interpolate
from lit_rebasin.callbacks.merge_state import check_merge_state
from lit_rebasin.callbacks.step_loss import StepLoss, as_trained
from lit_rebasin.continual.task_end import task_ends
from lit_rebasin.merging import has_batch_norm, reestimate_batch_norm
from lit_rebasin.merging.path import weights_of, write_weights
from lit_rebasin.transport.arguments import check_count, check_positive


class ModeConnectivity(Callback):
    r"""Follow a network trained on one task after another by one that lies on low-loss lines (Mirzadeh et al., ICLR 2021, eq. 5).

    After every task but the first, SGD minimises ``sum_a [L_old(prev + a (w - prev)) + L_new(trained + a (w - trained))]`` over ``w``, ``a``
    on equidistant points of [0, 1], the loss of old tasks on the kept examples, that of the new task on its own. ``prev`` is the ``w`` of the
    task before. The module holds ``w`` from the end of a task until the next one begins, which goes on from ``trained``, as in the authors'
    experiments (imirzadeh/CL-LinearModeConnectivity), not from ``w``, as in their later library (CL-Gym).

    Start, points, momentum and the one pass are those of their experiment on Rotated MNIST. Their steps are not quite these: they leave the
    factor ``a`` out of the gradients and divide each mean loss by the size of its batch once more, which are 10 kept examples of one task
    and 64 new ones, so that old tasks weigh more; and they go on with new batches where there are fewer kept ones. The learning rate here
    is theirs (0.01) over 10, and doubled, because ``a`` is 1/2 in the mean.

    A task is trained on its own examples alone: in a fit the datamodule's ``mixes_replay`` is False.

    Parameters that no task before has trained are taken as they are, and BatchNorm's statistics are estimated anew.

    Needs a datamodule with ``kept_examples``, such as :class:`~lit_rebasin.ContinualDataModule`.

    Args:
        start: Where ``w`` starts between the previous network (0) and the trained one (1).
        points: Intervals between the points on each line.
        learning_rate: Of ``w``.
        momentum: Of ``w``.
        epochs: Passes over the kept examples.
        batch_size: Examples of each of the two losses in a step.
        seed: Of the batches.

    Raises:
        ValueError: If a number is out of range.
        MisconfigurationException: In ``fit``, if the datamodule keeps no examples.
        RuntimeError: In ``fit``, if the search ends in NaN or infinity; the module is left as the task trained it.
    """

    def __init__(
        self,
        start: float = 0.1,
        points: int = 5,
        learning_rate: float = 0.002,
        momentum: float = 0.8,
        epochs: int = 1,
        batch_size: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("points", points)
        check_count("epochs", epochs)
        check_count("batch_size", batch_size)
        check_positive(learning_rate=learning_rate)
        if not 0 <= start <= 1:
            raise ValueError(f"start must lie in [0, 1], got {start}.")
        self.start, self.points, self.epochs, self.batch_size, self.seed = start, points, epochs, batch_size, seed
        self.learning_rate, self.momentum = learning_rate, momentum
        self.previous: dict[str, Tensor] | None = None
        self.trained: dict[str, Tensor] | None = None  # where the next task goes on, while the module holds `previous`
        self.n_tasks = 0
        self._initial: dict[str, Tensor] = {}
        self._learned: set[str] = set()  # parameters that some finished task has trained
        self._mixed: bool | None = None  # what the datamodule did before this fit

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuse a datamodule that keeps nothing, and have it mix nothing kept into the batches of a task."""
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "kept_examples") or data.replay_per_class == 0:
            raise MisconfigurationException(
                "ModeConnectivity needs a datamodule that keeps examples, such as ContinualDataModule(replay_per_class=1)."
            )
        self._mixed, data.mixes_replay = data.mixes_replay, False

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Have the datamodule mix as before."""
        if self._mixed is not None:
            trainer.datamodule.mixes_replay = self._mixed  # type: ignore[attr-defined]
            self._mixed = None

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Do so after a fit that failed, too, for which Lightning calls no teardown."""
        self.teardown(trainer, pl_module, "fit")

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Forget the networks of an earlier fit, if this one begins with the first task and goes on from no checkpoint."""
        if trainer.global_step == 0 and trainer.datamodule.task == 0:  # type: ignore[attr-defined]
            self.previous = self.trained = None
            self.n_tasks, self._initial, self._learned = 0, {}, set()

    @override
    def on_train_batch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        """Go on from the network as the last task trained it, or note what is not trained yet."""
        if self.trained is not None:
            write_weights(pl_module, self.trained)
            self.trained = None
        if self.previous is None and not self._initial:
            self._initial = _copied(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Find the network after the last batch of a task."""
        if not task_ends(trainer):
            return
        if self.previous is not None:
            self.trained = _copied(pl_module)
            self._connect(trainer, pl_module, self.previous)
        before = self.previous or self._initial
        self.previous = _copied(pl_module)
        self._learned |= {name for name, tensor in self.previous.items() if not torch.equal(tensor, before[name].cpu())}
        self._initial = {}
        self.n_tasks += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return both networks, the number of tasks, what they have trained, and where the first one began."""
        return {
            "previous": self.previous or {},
            "trained": self.trained or {},
            "n_tasks": self.n_tasks,
            "learned": sorted(self._learned),
            "initial": self._initial,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds.

        Raises:
            ValueError: If it is damaged.
        """
        check_merge_state(type(self).__name__, state_dict)
        self.previous = dict(state_dict["previous"]) or None
        self.trained = dict(state_dict["trained"]) or None
        self.n_tasks = state_dict["n_tasks"]
        self._learned = set(state_dict["learned"])
        self._initial = dict(state_dict.get("initial", {}))  # which states of older versions lack

    def _connect(self, trainer: "pl.Trainer", module: "pl.LightningModule", previous: Mapping[str, Tensor]) -> None:
        trained = {name: tensor.detach().clone() for name, tensor in weights_of(module).items()}
        # What no task before has trained, such as the head of a new task, is taken as it is.
        previous = {
            name: previous[name].to(module.device) if name in self._learned else tensor
            for name, tensor in trained.items()
        }
        learned = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        between = interpolate(trained, previous, self.start)
        found = {name: between[name].clone().requires_grad_() for name in learned}
        optimizer = torch.optim.SGD(found.values(), lr=self.learning_rate, momentum=self.momentum)
        step = StepLoss(module, trainer.precision_plugin)
        with step.quiet():
            for old, new in self._batches(trainer):
                optimizer.zero_grad()
                for point in torch.linspace(0, 1, self.points + 1).tolist():
                    for begin, batch in ((previous, old), (trained, new)):
                        fixed = {name: begin[name] for name in learned}
                        on_line = interpolate(fixed, found, 1 - point)
                        step.at({**trained, **on_line}, batch).backward()
                optimizer.step()
            if not all(tensor.isfinite().all() for tensor in found.values()):
                raise RuntimeError(
                    f"The line search of ModeConnectivity after task {self.n_tasks} ended in NaN or infinity: "
                    f"lower learning_rate={self.learning_rate}."
                )
            write_weights(module, {**trained, **{name: tensor.detach() for name, tensor in found.items()}})
            if has_batch_norm(module):
                reestimate_batch_norm(module, step, [batch for pair in self._batches(trainer) for batch in pair])

    def _batches(self, trainer: "pl.Trainer") -> Iterator[tuple[Any, Any]]:
        """Yield batches of kept examples, each with one of the new task."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(self.seed + self.n_tasks)
        old, new = data.kept_examples(data.task), data.new_examples(data.task)
        fresh = cycle(_parts(torch.randperm(len(new[1]), generator=generator), self.batch_size))
        for _ in range(self.epochs):
            for chosen in _parts(torch.randperm(len(old[1]), generator=generator), self.batch_size):
                yield as_trained(trainer, _at(old, chosen)), as_trained(trainer, _at(new, next(fresh)))


def _copied(module: "pl.LightningModule") -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in weights_of(module).items()}


def _parts(order: Tensor, size: int) -> list[Tensor]:
    """Cut an order into batches; a rest of one, of which BatchNorm has no statistics, goes into the last."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _at(examples: tuple[Tensor, ...], chosen: Tensor) -> list[Tensor]:
    return [part[chosen] for part in examples]
