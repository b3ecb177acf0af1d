"""A fit over a stream, with nothing but what a test asks for."""

import lightning.pytorch as pl


def walk(model, data, *callbacks, tasks, ckpt_path=None, **options):
    """Train the first tasks of a stream; validation closes each. Returns the trainer."""
    trainer = pl.Trainer(
        max_epochs=tasks * data.epochs_per_task,
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=data.epochs_per_task,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return trainer
