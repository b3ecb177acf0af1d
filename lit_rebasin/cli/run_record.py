"""What is written beside a run: the configuration, the versions and the command."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning.pytorch as pl
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lit_rebasin.cli.app import ContinualCLI, command_line, package_versions
from lit_rebasin.cli.build import Run
from lit_rebasin.cli.errors import UsageError, refusing
from lit_rebasin.cli.former import Former
from lit_rebasin.cli.output_folder import gone_if_empty
from lit_rebasin.cli.report import write_text


class RunRecord(pl.Callback):
    """Writes what is run as soon as its training begins, so that a run that is refused leaves those before it as they are."""

    def __init__(self, cli: ContinualCLI, run: Run, folder: Path, former: Former | None) -> None:
        self.run, self.folder, self.former = run, folder, former
        self.text = cli.parser.dump(run.config, skip_validation=True)
        self.is_written = False

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._log()

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._write()

    def of_other_loops(self) -> None:
        """Record a run that no Trainer fits."""
        self._log()
        self._write()

    def _log(self) -> None:
        """Give the loggers the hyper-parameters."""
        record = self.run.record
        for logger in self.run.trainer.loggers:
            logger.log_hyperparams({"method": record.method, "seed": record.seed, "model": record.config["model"]})

    def _write(self) -> None:
        if self.run.trainer.is_global_zero:
            if self.former is not None:
                self.former.remove()
            write_text(self.folder / "config.yaml", self.text)
            write_text(self.folder / "versions.yaml", yaml.safe_dump(package_versions()))
            write_text(self.folder / "command.txt", f"{command_line()}\n")
        self.is_written = True


@contextmanager
def recorded(cli: ContinualCLI, run: Run, folder: Path, former: Former | None = None) -> Iterator[RunRecord]:
    """Have a run recorded when its training begins, in place of what a former benchmark left, if there was one.

    Of a run that ends in an error before, nothing stays, its event files neither; see `refusing` for the error.
    """
    record = RunRecord(cli, run, folder, former)
    run.trainer.callbacks.append(record)  # type: ignore[attr-defined]
    with gone_if_empty(folder / "tensorboard", folder / "checkpoints"):
        try:
            _begin_loggers(run)
            yield record
        except BaseException as error:
            if record.is_written:
                raise
            _remove_logs(run)
            with refusing():
                raise error


def _begin_loggers(run: Run) -> None:
    """Let each logger of the user's say what it lacks, such as a key of its service."""
    for logger in run.trainer.loggers[1:]:
        try:
            getattr(logger, "experiment", None)
        except Exception as error:  # of any kind that the service has
            raise UsageError(f"{type(logger).__name__} of trainer.logger cannot begin: {error}") from error


def _remove_logs(run: Run) -> None:
    for logger in run.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            with suppress(OSError):
                logger.finalize("failed")
            shutil.rmtree(logger.log_dir, ignore_errors=True)
