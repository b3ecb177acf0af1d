"""Where a Trainer stands in the stream of tasks."""

import lightning.pytorch as pl


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
