"""A stream of tasks as a LightningDataModule."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_rebasin.continual.batches import EvaluationBatches, Examples, MixedBatches, MixedExamples, RankBatches
from lit_rebasin.continual.replay import choose_replay
from lit_rebasin.continual.streams import Stream, make_stream
from lit_rebasin.continual.trainer_checks import check_trainer
from lit_rebasin.transport.arguments import check_function, check_number, plain

EVALUATION_BATCH = 2048
LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one
_MOST, _MOST_TASKS = 2**31 - 1, 100_000  # more is a slip of the keyboard
# What else a user can do where a task has no examples of a kind.
_OTHER_WAYS = {"training": " or validation_fraction", "held-back": " or a larger validation_fraction"}


class ContinualDataModule(LightningDataModule):
    """Walk a stream of tasks in one ``trainer.fit``: the next task every ``epochs_per_task`` epochs.

    Batches are ``(x, y, task)``: images ``(B, C, H, W)`` in float32, labels and task indices ``(B,)``. With replay, every batch from the second
    task on is ``batch_size`` new examples followed by as many replayed ones, drawn evenly from the buffer. The optimizer and its scheduler
    start afresh when a task begins.

    The Trainer must have ``max_epochs = n_tasks * epochs_per_task`` (or fewer whole tasks) and ``reload_dataloaders_every_n_epochs=1``, or any
    divisor of ``epochs_per_task`` where no fit is resumed.

    Args:
        benchmark: ``rotated-digits`` (needs no download), ``rotated-mnist``, ``permuted-mnist``, ``split-mnist``, ``rotated-fashion-mnist``,
            ``split-cifar10``, ``split-cifar100``, or ``arrays``: an ``.npz`` with ``x_train, y_train, x_test, y_test``.
        n_tasks: Number of tasks; the benchmark's own by default.
        epochs_per_task: Epochs spent on each task.
        batch_size: New examples in a batch, of each process.
        replay_per_class: Examples that are kept of each class of each task; 0 for no replay.
        replay_transform: Makes other images of the replayed ones, whose shape it must keep, batch by batch, such as
            :class:`~lit_rebasin.RandomShift`. Images are normalised: 0 is the mean of the data.
        scenario: ``domain`` (same classes in every task), ``class`` (new classes, one head) or ``task`` (new classes, a head a task); the
            benchmark's own by default.
        data_dir: Folder of the data sets (``data`` by default), or the path of the ``.npz``.
        download: Fetch a data set that is missing.
        validation_fraction: Share of each task's training data that is held back from training and replay, and takes the place of the test
            data in validation: for choosing hyper-parameters.
        seed: Of class orders, permutations, splits, batches and the choice of what is replayed.

    Attributes:
        task: Index of the current task.
        first_task: The task that a fit begins with.
        mixes_replay: Whether training batches hold what is kept; a method that uses it in its own way sets this to False.

    Raises:
        ValueError: If an argument is out of range or does not fit the benchmark.
        TypeError: If one is of a wrong kind.
    """

    def __init__(
        self,
        benchmark: str = "rotated-digits",
        *,
        n_tasks: int | None = None,
        epochs_per_task: int = 5,
        batch_size: int = 64,
        replay_per_class: int = 0,
        replay_transform: nn.Module | None = None,
        scenario: Literal["domain", "class", "task"] | None = None,
        data_dir: str | None = None,
        download: bool = False,
        validation_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        n_tasks, epochs_per_task, batch_size, replay_per_class, validation_fraction, seed = map(
            plain, (n_tasks, epochs_per_task, batch_size, replay_per_class, validation_fraction, seed)
        )
        for name, value, least, most in (
            ("n_tasks", 1 if n_tasks is None else n_tasks, 1, _MOST_TASKS),
            ("epochs_per_task", epochs_per_task, 1, _MOST),
            ("batch_size", batch_size, 1, _MOST),
            ("replay_per_class", replay_per_class, 0, _MOST),
            ("seed", seed, 0, LARGEST_SEED),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
            if value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}.")
        check_number("validation_fraction", validation_fraction)
        if replay_transform is not None:
            check_function("replay_transform", replay_transform, "a batch of images")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {validation_fraction}.")
        self.save_hyperparameters(ignore=["replay_transform"])
        self.stream: Stream = make_stream(benchmark, n_tasks, scenario, data_dir, download, seed)
        self.epochs_per_task = epochs_per_task
        self.batch_size = batch_size
        self.replay_per_class = replay_per_class
        self.replay_transform = replay_transform
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.task = 0
        self.first_task = 0
        self.mixes_replay = True
        self._trained_task: int | None = None  # the task of the last training loader
        self._current: tuple[int, Examples, Examples | None] | None = None
        self._replay: dict[int, Examples] = {}
        self._evaluation: dict[tuple[bool, int, int], list[DataLoader[Examples]]] = {}
        if replay_per_class:
            # Once a process group has begun, Avalanche refuses to be imported in any process but the first.
            import avalanche.training.storage_policy  # noqa: F401

    @property
    def n_tasks(self) -> int:
        """Number of tasks of the stream."""
        return len(self.stream.recipes)

    @property
    def n_classes(self) -> int:
        """Outputs of a head."""
        return self.stream.n_classes

    @property
    def n_heads(self) -> int:
        """1, or the number of tasks in the task-incremental scenario."""
        return self.n_tasks if self.stream.scenario == "task" else 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape ``(C, H, W)`` of an image."""
        return self.stream.input_shape

    @override
    def setup(self, stage: str) -> None:
        """Check the tasks, and the Trainer against the stream, before anything is trained."""
        if stage != "fit" or self.trainer is None:
            return
        for task in range(self.n_tasks):
            self._check_not_empty(task, len(self._split(task)[0]), "training")
        self._trained_task = None
        self.task = self.first_task  # Lightning asks for optimizers before it asks for loaders
        check_trainer(self.trainer, self.n_tasks, self.epochs_per_task)

    @override
    def train_dataloader(self) -> DataLoader[Examples]:
        """Return the loader of the current task, replay mixed in; the optimizer starts afresh if the task is a new one."""
        self._check_resumed()
        self.task = self._epoch() // self.epochs_per_task
        if self._trained_task is not None and self._trained_task != self.task and self.trainer is not None:
            self.trainer.strategy.setup_optimizers(self.trainer)
        self._trained_task = self.task
        return self.training_loader(self.task, self._epoch)

    def training_loader(self, task: int, epoch: Callable[[], int]) -> DataLoader[Examples]:
        """Return the loader of a task, replay mixed in, whose order is that of the epoch of the stream that is asked for at each pass."""
        new, replayed = self._training_data(task)
        n_replay = 0 if replayed is None else len(replayed[1])
        batches = MixedBatches(len(new[1]), n_replay, self.batch_size, self.seed, epoch)
        examples = MixedExamples(new, replayed, self.replay_transform)
        return DataLoader(examples, sampler=self._of_rank(batches), batch_size=None)

    @override
    def val_dataloader(self) -> list[DataLoader[Examples]]:
        """Return one loader a task of the whole stream: its test data, or its held-back training data."""
        return self._evaluation_loaders(held_back=self.validation_fraction > 0)

    @override
    def test_dataloader(self) -> list[DataLoader[Examples]]:
        """Return one loader a task of the whole stream: its test data."""
        return self._evaluation_loaders(held_back=False)

    def batches_of(self, task: int) -> int:
        """Return how many batches an epoch of a task has."""
        return -(-len(self._split(task)[0]) // self.batch_size)

    def smallest_batch(self, task: int) -> int:
        """Return how many examples, replayed ones among them, the smallest training batch of a task has."""
        n = len(self._split(task)[0])
        rest = n % self.batch_size
        replays = task > 0 and self.mixes_replay and self.replay_per_class > 0
        return (rest or min(n, self.batch_size)) * (2 if replays else 1)

    def new_examples(self, task: int) -> Examples:
        """Return images, labels and task indices of all that a task brings to train on, nothing replayed."""
        return self._examples(task, self.stream.train(task, self._split(task)[0]), "training")

    def kept_examples(self, task: int) -> Examples | None:
        """Return what is kept of the tasks before one; ``None`` if that is nothing."""
        if not task or not self.replay_per_class:
            return None
        for earlier in range(task):
            if earlier not in self._replay:
                self._keep_for_replay(earlier)
        parts = zip(*(self._replay[earlier] for earlier in range(task)), strict=True)
        x, y, tasks = (torch.cat(part) for part in parts)
        return x, y, tasks

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the index of the task being trained, and which stream it is of."""
        return {"task": self.task, "stream": self._identity()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember which task was trained last, so that a resumed fit knows whether the next one is new.

        Raises:
            MisconfigurationException: If the checkpoint is of another stream.
        """
        trainer: Any = self.trainer
        if trainer is not None and trainer.state.fn is not None and trainer.state.fn != TrainerFn.FITTING:
            return
        for name, value in self._identity().items():
            begun = state_dict["stream"][name]
            if begun != value:
                raise MisconfigurationException(
                    f"The checkpoint is of a stream with {name}={begun!r}, not {value!r}: go on with what it was begun with."
                )
        self._trained_task = self.task = state_dict["task"]

    def _identity(self) -> dict[str, Any]:
        """Return what a fit that is resumed must have in common with the one before."""
        return {
            "benchmark": self.stream.name,
            "scenario": self.stream.scenario,
            "n_tasks": self.n_tasks,
            "epochs_per_task": self.epochs_per_task,
            "replay_per_class": self.replay_per_class,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
        }

    def _epoch(self) -> int:
        # Where a fit resumes, Lightning reads loaders before `current_epoch` catches up with the epochs that are done.
        trainer: Any = self.trainer
        done = 0 if trainer is None else trainer.fit_loop.epoch_progress.current.processed
        done += self.first_task * self.epochs_per_task
        return min(done, self.n_tasks * self.epochs_per_task - 1)

    def _check_resumed(self) -> None:
        trainer: Any = self.trainer
        every = 1 if trainer is None else trainer.reload_dataloaders_every_n_epochs
        if every > 1 and trainer.current_epoch % every:
            raise MisconfigurationException(
                "A fit that is resumed in the middle would change tasks too late: pass Trainer(reload_dataloaders_every_n_epochs=1)."
            )

    def _split(self, task: int) -> tuple[Tensor, Tensor]:
        """Return which training examples of a task are trained on, and which are held back."""
        n = len(self.stream.train_labels(task))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        held = round(self.validation_fraction * n)
        return order[held:].sort().values, order[:held].sort().values

    def _examples(self, task: int, data: tuple[Tensor, Tensor], what: str) -> Examples:
        x, y = data
        self._check_not_empty(task, len(y), what)
        return x, y, torch.full_like(y, task)

    def _check_not_empty(self, task: int, n: int, what: str) -> None:
        if n == 0:
            raise ValueError(
                f"Task {task} of {self.stream.name} has no {what} examples: pass a smaller n_tasks{_OTHER_WAYS.get(what, '')}."
            )

    def _training_data(self, task: int) -> tuple[Examples, Examples | None]:
        if self._current is None or self._current[0] != task:
            self._current = None  # free the last task before the next one is made
            replayed = self.kept_examples(task) if self.mixes_replay else None
            self._current = (task, self.new_examples(task), replayed)
        return self._current[1], self._current[2]

    def _keep_for_replay(self, task: int) -> None:
        """Choose a task's replay examples: a function of seed and task alone, so a resumed run finds the same ones."""
        trained = self._split(task)[0]
        labels = self.stream.train_labels(task)[trained]
        kept = choose_replay(labels, self.replay_per_class, self.seed * 100_003 + task)
        self._replay[task] = self._examples(task, self.stream.train(task, trained[kept]), "training")

    def _evaluation_loaders(self, *, held_back: bool) -> list[DataLoader[Examples]]:
        key = (held_back, *self._processes())
        if key not in self._evaluation:
            loaders = []
            for task in range(self.n_tasks):
                if held_back:
                    data = self._examples(task, self.stream.train(task, self._split(task)[1]), "held-back")
                else:
                    data = self._examples(task, self.stream.test(task), "test")
                batches = EvaluationBatches(len(data[1]), EVALUATION_BATCH, self._processes()[0])
                loaders.append(DataLoader(MixedExamples(data, None), sampler=self._of_rank(batches), batch_size=None))
            self._evaluation[key] = loaders
        return self._evaluation[key]

    def _processes(self) -> tuple[int, int]:
        """Return how many processes the Trainer has, and which of them this is."""
        trainer: Any = self.trainer
        return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)

    def _of_rank(self, batches: MixedBatches | EvaluationBatches) -> MixedBatches | EvaluationBatches | RankBatches:
        """Return what this process has of some batches."""
        processes, rank = self._processes()
        return batches if processes == 1 else RankBatches(batches, processes, rank)
