"""Where a Trainer stands in the stream of tasks."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


def epochs_per_task(trainer: "pl.Trainer") -> int | None:
    """Return how many epochs the datamodule spends on each task of a stream; ``None`` where a fit is one task."""
    return getattr(getattr(trainer, "datamodule", None), "epochs_per_task", None)


def task_ends(trainer: "pl.Trainer") -> bool:
    """Return whether the batch just trained is the last of its task, as far as that can be foreseen.

    In a stream only epochs end a task: one that ``max_steps`` cuts short is unfinished.
    """
    every = epochs_per_task(trainer)
    done = trainer.current_epoch + 1
    if every:
        return trainer.is_last_batch and done % every == 0
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return trainer.is_last_batch and done == trainer.max_epochs


def rewrite_last_checkpoints(trainer: "pl.Trainer") -> None:
    """Save the model, and all callbacks, over the last checkpoint of every saver."""
    for checkpoint in trainer.checkpoint_callbacks:
        if not isinstance(checkpoint, ModelCheckpoint):
            continue
        # Without a monitor the "best" is simply the latest.
        latest = [checkpoint.last_model_path, "" if checkpoint.monitor else checkpoint.best_model_path]
        for path in filter(None, latest):
            trainer.save_checkpoint(path, checkpoint.save_weights_only)
