"""How one method with one seed is built from the configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from lit_rebasin.callbacks import ContinualMonitor, ModeConnectivity, RandomStates
from lit_rebasin.cli.app import ContinualCLI
from lit_rebasin.cli.errors import UsageError, refusing
from lit_rebasin.cli.methods import METHODS, merge_of
from lit_rebasin.continual import ContinualClassifier, ContinualDataModule, RebasinIL, WholeCheckpointIO
from lit_rebasin.continual.trainer_checks import forgets
from lit_rebasin.merging.data import evaluating
from lit_rebasin.metrics import average_accuracy, forgetting

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}
# By the stream, unless given; and one device, for more would change the size of a step.
FILLED = ("max_epochs", "reload_dataloaders_every_n_epochs", "check_val_every_n_epoch", "devices")
# Those, and what the stream says of itself.
_OPEN = (*(f"trainer.{name}" for name in FILLED), "data.n_tasks", "data.scenario", "threads")


def left_open(cli: ContinualCLI) -> list[str]:
    """Return what the configuration leaves for a run to fill in."""
    usual = cli.parser.get_defaults()
    return [key for key in _OPEN if cli.config[key] == usual[key]]


class MethodRecord(pl.Callback):
    """Puts method, seed and configuration into every checkpoint, and refuses to go on from one of another method or seed."""

    def __init__(self, method: str, seed: int, config: Mapping[str, Any]) -> None:
        self.method, self.seed, self.config = method, seed, config
        self.began = False  # whether the training has begun, or gone on

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"method": self.method, "seed": self.seed, "config": self.config}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in {"method": self.method, "seed": self.seed}.items():
            if state_dict[name] != value:
                raise UsageError(
                    f"the checkpoint is of {name} {state_dict[name]}, not {value}; go on with what it was begun with"
                )


@dataclass(frozen=True)
class Run:
    """One method with one seed, ready to be fitted."""

    trainer: pl.Trainer
    model: pl.LightningModule
    data: ContinualDataModule
    monitor: ContinualMonitor
    record: MethodRecord
    config: Namespace  # what the run was built from, defaults filled in

    @property
    def n_tasks(self) -> int:
        """How many tasks are to be trained: all of the stream, or the first ones."""
        return -(-(self.trainer.max_epochs or 0) // self.data.epochs_per_task)  # fast_dev_run ends inside the first


def build_run(
    cli: ContinualCLI, method: str, seed: int, folder: Path, callbacks: Sequence[pl.Callback], **trainer_options: Any
) -> Run:
    """Seed everything, and build model, data and Trainer from the configuration.

    Args:
        cli: The parsed configuration.
        method: A name of `METHODS`.
        seed: Of the initial weights, the stream and everything drawn.
        folder: Where logs go.
        callbacks: Further callbacks.
        **trainer_options: Take the place of the configuration's.

    Raises:
        UsageError: If the configuration, or the data that it names, cannot be used.
    """
    with refusing():
        return _build_run(cli, method, seed, folder, callbacks, trainer_options)


def _build_run(
    cli: ContinualCLI,
    method: str,
    seed: int,
    folder: Path,
    callbacks: Sequence[pl.Callback],
    trainer_options: Mapping[str, Any],
) -> Run:
    chosen = METHODS[method]
    config = cli.config.clone()
    config.seed_everything = config.data.seed = config.merge.seed = seed
    config.method = method
    if not chosen.replay:
        config.data.replay_per_class = 0
    for name, value in merge_settings(cli, method).items():
        if name != "seed":
            config.merge[name] = value
    for key in chosen.unheeded:  # what the method is made of is not for the configuration to change
        if not key.startswith("merge."):
            config[key] = cli.parser.get_defaults()[key]
    if config.data_dir is not None:
        config.data.data_dir = config.data_dir
    pl.seed_everything(seed, verbose=False)
    made = cli.make(config)
    _check_network(made.model, made.data)
    config.data.n_tasks, config.data.scenario = made.data.n_tasks, made.data.stream.scenario
    _fill_trainer(config.trainer, made.data)
    options = {**vars(made.trainer), **{name: config.trainer[name] for name in FILLED}, **trainer_options}
    described = yaml.safe_load(cli.parser.dump(config, skip_validation=True))
    monitor, record = ContinualMonitor(), MethodRecord(method, seed, described)
    model, merges = _learner(method, made, cli.strategy_options(method), seed)
    tensorboard = TensorBoardLogger(folder, name="tensorboard", default_hp_metric=False)
    given = [
        one for one in _as_list(options.get("logger")) if one is not True
    ]  # true is the default: TensorBoard alone
    options["callbacks"] = [*_as_list(options.get("callbacks")), *merges, monitor, record, RandomStates(), *callbacks]
    options["plugins"] = [*_as_list(options.get("plugins")), WholeCheckpointIO()]
    try:
        trainer = pl.Trainer(**{**options, "logger": [tensorboard, *given], "default_root_dir": folder})
    except (TypeError, ImportError) as error:
        raise UsageError(f"trainer: {error}") from None
    if forgets(trainer):
        raise UsageError(
            f"trainer.strategy {config.trainer.strategy} trains in processes that do not say what they have measured; use ddp"
        )
    return Run(trainer, model, made.data, monitor, record, config)


def _check_network(model: ContinualClassifier, data: ContinualDataModule) -> None:
    """See that the network takes the images, and the optimizer its arguments, before anything is written."""
    x, tasks = torch.zeros(2, *data.input_shape), torch.zeros(2, dtype=torch.long)
    try:
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
            model(x, tasks)
    except ValueError:
        raise
    except Exception as error:  # whatever the user's code does
        shape = " x ".join(map(str, data.input_shape))
        kind = "" if isinstance(error, RuntimeError) and str(error) else f"{type(error).__name__} "
        raise UsageError(
            f"model.backbone does not take images of {shape}, as {data.stream.name} has: {kind}{error}"
        ) from error
    try:
        model.optimizer(model.parameters())
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.optimizer: {error}") from None


def merge_settings(cli: ContinualCLI, method: str) -> dict[str, Any]:
    """Return the arguments of a method's merge: the configuration's, but for what makes the method, unless ``per_method`` says otherwise."""
    given = cli.config.per_method.get(method, {})
    own = {
        name: value
        for name, value in merge_of(method, cli.config.merge.as_dict()).items()
        if f"merge.{name}" not in given
    }
    return {**cli.config.merge.as_dict(), **own}


def _learner(
    method: str, made: Namespace, options: dict[str, Any], seed: int
) -> tuple[pl.LightningModule, list[pl.Callback]]:
    """Return what a method trains, and the callback that makes it the method."""
    if method == "rebasin-il":
        return RebasinIL(made.model, seed=seed, **options), []
    if method == "mc-sgd":
        return made.model, [ModeConnectivity(seed=seed, **options)]
    return made.model, [made.merge] if METHODS[method].merge is not None else []


def log_outcome(run: Run, matrix: Tensor) -> None:
    """Put the run's hyper-parameters beside its outcome on TensorBoard's HPARAMS page, which needs both at once."""
    outcome = {"outcome/average_accuracy": average_accuracy(matrix), "outcome/forgetting": forgetting(matrix)}
    outcome = {name: value for name, value in outcome.items() if isfinite(value)}
    for logger in run.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(logger.hparams), outcome, step=len(matrix) - 1)
            logger.finalize("success")


def _fill_trainer(options: Namespace, data: ContinualDataModule) -> None:
    """Fit the Trainer to the stream where the configuration leaves it open."""
    if options.max_epochs is None and options.max_steps == -1:
        options.max_epochs = data.n_tasks * data.epochs_per_task
    if options.devices == "auto":
        options.devices = 1
    if options.reload_dataloaders_every_n_epochs == 0:
        options.reload_dataloaders_every_n_epochs = 1
    if options.check_val_every_n_epoch == 1:
        options.check_val_every_n_epoch = data.epochs_per_task


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
