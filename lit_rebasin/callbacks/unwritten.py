"""Keep a training step from writing to its loggers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from typing_extensions import override


@contextmanager
def unwritten(module: pl.LightningModule) -> Iterator[None]:
    """Let what the module writes to its loggers itself, such as pictures of a batch, go nowhere for a while."""
    trainer = module._trainer
    if trainer is None:
        yield
        return
    loggers = trainer.loggers
    trainer.loggers = [_Unwritten(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


class _Unwritten(DummyLogger):
    """Says what a logger says of itself, and writes nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    @override
    def name(self) -> Any:
        return self._logger.name

    @property
    @override
    def version(self) -> Any:
        return self._logger.version

    @property
    @override
    def save_dir(self) -> str | None:
        return self._logger.save_dir

    @property
    @override
    def root_dir(self) -> str | None:
        return self._logger.root_dir

    @property
    @override
    def log_dir(self) -> str | None:
        return self._logger.log_dir
