"""What a Trainer must be like to walk a stream of tasks."""

from typing import Any

from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def forgets(trainer: Any) -> bool:
    """Return whether a Trainer trains in processes of which nothing but the weights comes back, as ``ddp_spawn`` and ``ddp_notebook`` do."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def check_trainer(trainer: Any, n_tasks: int, epochs_per_task: int) -> None:
    """Refuse a Trainer that would not train whole tasks of a stream, each for its epochs.

    Raises:
        MisconfigurationException: If it is so; the message says what to pass.
    """
    max_epochs, every = trainer.max_epochs, trainer.reload_dataloaders_every_n_epochs
    if trainer.overfit_batches:
        raise MisconfigurationException(
            "Trainer(overfit_batches) would replace the replay of this datamodule by batches of its own: "
            "use limit_train_batches for a short trial."
        )
    if trainer.fast_dev_run or max_epochs is None:
        return
    whole = (
        f"pass max_epochs={n_tasks * epochs_per_task} for the whole stream, or a smaller multiple of epochs_per_task."
    )
    if max_epochs == -1 and trainer.max_steps != -1:
        raise MisconfigurationException(
            f"Trainer(max_steps={trainer.max_steps}) does not say how many tasks to train, because a task lasts epochs_per_task epochs: {whole}"
        )
    if max_epochs % epochs_per_task or not 0 < max_epochs <= n_tasks * epochs_per_task:
        raise MisconfigurationException(
            f"Trainer(max_epochs={max_epochs}) does not fit epochs_per_task={epochs_per_task} and n_tasks={n_tasks}: {whole}"
        )
    if max_epochs > epochs_per_task and (every == 0 or epochs_per_task % every):
        raise MisconfigurationException(
            f"Trainer(reload_dataloaders_every_n_epochs={every}) would not move on to the next task after "
            f"epochs_per_task={epochs_per_task} epochs: pass reload_dataloaders_every_n_epochs=1."
        )
