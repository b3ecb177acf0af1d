"""The configuration behind both commands, and how a run is built from it."""

import json
import logging
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from platform import python_version
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from typing_extensions import override

from lit_rebasin.callbacks import ContinualMonitor, ModeConnectivity, RebasinMerge
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.methods import METHODS, merge_of
from lit_rebasin.cli.report import write_text
from lit_rebasin.continual import ContinualClassifier, ContinualDataModule, RebasinIL
from lit_rebasin.metrics import average_accuracy, forgetting

PACKAGES = (
    "lit-rebasin",
    "torch",
    "lightning",
    "torchmetrics",
    "torchvision",
    "avalanche-lib",
    "pot",
    "numpy",
    "scipy",
)

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}
FILLED = ("max_epochs", "reload_dataloaders_every_n_epochs", "check_val_every_n_epoch")  # by the stream, unless given


def _as_written(value: Namespace) -> dict[str, Any]:
    """Return what looked like a class, which the parser has made a Namespace, less what an optimizer gets from its model."""
    written: dict[str, Any] = value.as_dict()
    if written.get("init_args", {}).get("params", 0) is None:
        del written["init_args"]["params"]
    return written


class ContinualCLI(LightningCLI):
    """Parse the one YAML file that both commands read; nothing is instantiated until a method and a seed are chosen."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command, self.arguments = command, list(arguments)
        try:
            super().__init__(
                ContinualClassifier,
                ContinualDataModule,
                args=list(arguments),
                run=False,
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs={
                    "prog": f"lit-rebasin {command}",
                    "description": "Continual learning by re-basin.",
                    "exit_on_error": False,
                    "allow_abbrev": False,
                },
            )
        except (ArgumentError, TypeError) as error:
            raise UsageError(str(error)) from None
        except ValueError as error:  # all that is done beside parsing is to seed
            raise UsageError(f"seed_everything: {error}") from None
        self.config.per_method = json.loads(json.dumps(self.config.per_method, default=_as_written))
        self._check_arguments()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a benchmark needs beyond trainer, model and data."""
        names = ", ".join(METHODS)
        parser.add_argument("--method", default="rebasin", help=f"What `fit` trains: {names}.")
        parser.add_argument(
            "--methods", type=list[str] | str, default=["finetune", "replay", "rebasin"], help="What `benchmark` runs."
        )
        parser.add_argument(
            "--seeds", type=list[int] | int | str, default=[0, 1, 2], help="Seeds of `benchmark`, as in 0,1,2."
        )
        parser.add_argument(
            "--data_dir", type=str | None, default=None, help="Folder of the data sets; the same as --data.data_dir."
        )
        parser.add_argument("--output_dir", default="runs", help="Where results, logs and checkpoints go.")
        parser.add_argument(
            "--overwrite", action="store_true", help="Let `benchmark` replace results that are in output_dir already."
        )
        parser.add_argument(
            "--per_method",
            type=dict[str, dict[str, Any]],
            default={},
            help="What differs for a method of `benchmark`: keys of this file with their dots, and options of Avalanche's strategies.",
        )
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint from which `fit` goes on.")
        parser.add_argument(
            "--threads", type=int | None, default=None, help="CPU threads; a small network is fastest with 1."
        )
        parser.add_argument(
            "--parallel_tasks",
            type=int,
            default=1,
            help="Tasks that `benchmark` trains at a time, in processes of their own, where each begins afresh.",
        )
        parser.add_argument(
            "--processes",
            type=int,
            default=1,
            help="Methods and seeds that `benchmark` runs at a time, each in a process of its own.",
        )
        parser.add_class_arguments(RebasinMerge, "merge")
        parser.link_arguments("data.n_classes", "model.n_classes", apply_on="instantiate")
        parser.link_arguments("data.n_heads", "model.n_heads", apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, such that an optimizer of another class has its own defaults and not those of the one in its place."""
        super().parse_arguments(parser, args)
        chosen = self.config.model.optimizer.class_path
        if chosen != parser.get_defaults().model.optimizer.class_path:
            parser.set_defaults({"model.optimizer": {"class_path": chosen}})
            super().parse_arguments(parser, args)

    def for_method(self, method: str) -> "ContinualCLI":
        """Return the configuration of a method of `benchmark`: what ``per_method`` says of it is read like words of the command line."""
        own = self.config.per_method.get(method, {})
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in own.items()}
        words = [f"--{key}={text}" for key, text in texts.items() if "." in key]
        if not words:
            return self
        try:
            return ContinualCLI(self.command, [*self.arguments, *words])
        except (UsageError, ValueError) as error:
            raise UsageError(f"per_method of {method!r}: {error}") from None

    def _check_arguments(self) -> None:
        """Say what classes refuse before any run, also one that does without them."""
        RebasinMerge(**self.config.merge.as_dict())
        names = ("weighting", "lr_decay", "lr_schedule", "distillation", "temperature", "mixup")
        loss = {name: self.config.model[name] for name in names}
        ContinualClassifier(nn.Identity(), **loss)
        transform = self.config.data.replay_transform
        if transform is not None:
            parser = LightningArgumentParser(exit_on_error=False)
            parser.add_argument("--replay_transform", type=nn.Module)
            try:
                parser.instantiate_classes(parser.parse_object({"replay_transform": transform}))
            except (ArgumentError, TypeError, ValueError) as error:
                raise UsageError(f"data.replay_transform: {error}") from None

    def strategy_options(self, method: str) -> dict[str, Any]:
        """Return what ``per_method`` says of a method that is no key of the configuration."""
        return {key: value for key, value in self.config.per_method.get(method, {}).items() if "." not in key}

    def instantiate_classes(self) -> None:
        """Leave it to `build_run`, which does it once a method and seed."""


class MethodRecord(pl.Callback):
    """Puts method and seed into every checkpoint, and refuses to go on from one of another method or seed."""

    def __init__(self, method: str, seed: int) -> None:
        self.method, self.seed = method, seed

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"method": self.method, "seed": self.seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in self.state_dict().items():
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
    """
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
    made = cli.parser.instantiate(config)
    config.data.n_tasks, config.data.scenario = made.data.n_tasks, made.data.stream.scenario
    _fill_trainer(config.trainer, made.data)
    options = {**vars(made.trainer), **{name: config.trainer[name] for name in FILLED}, **trainer_options}
    monitor, record = ContinualMonitor(), MethodRecord(method, seed)
    model, merges = _learner(method, made, cli.strategy_options(method), seed)
    logger = TensorBoardLogger(folder, name="tensorboard", default_hp_metric=False)
    options["callbacks"] = [*_as_list(options.get("callbacks")), *merges, monitor, record, *callbacks]
    trainer = pl.Trainer(**{**options, "logger": logger, "default_root_dir": folder})
    return Run(trainer, model, made.data, monitor, record, config)


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


def write_record(cli: ContinualCLI, run: Run, folder: Path) -> None:
    """Write what is going to run: the configuration, the versions, and the hyper-parameters for the loggers."""
    text = cli.parser.dump(run.config, skip_validation=True)
    write_text(folder / "config.yaml", text)
    write_text(folder / "versions.yaml", yaml.safe_dump(package_versions()))
    for logger in run.trainer.loggers:
        logger.log_hyperparams({**run.record.state_dict(), "model": yaml.safe_load(text)["model"]})


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
    if options.reload_dataloaders_every_n_epochs == 0:
        options.reload_dataloaders_every_n_epochs = 1
    if options.check_val_every_n_epoch == 1:
        options.check_val_every_n_epoch = data.epochs_per_task


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def package_versions() -> dict[str, str]:
    """Return the versions of Python and the packages that a result depends on."""
    return {"python": python_version(), **{name: version(name) for name in PACKAGES}}


def prepare_folder(path: str) -> Path:
    """Make the output folder, and see that it can be written to, before any work is done."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"output_dir {path} cannot be written to ({error.strerror}); choose another") from None
    return folder


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads, if it is given."""
    if threads is None:
        return
    if threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def hush() -> None:
    """Silence what Lightning and its dependencies say about things that a benchmark does on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
