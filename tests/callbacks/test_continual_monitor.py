import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rebasin import ContinualMonitor

from .user_code import UserModule, Walk, loader, make_trainer


class TwoTasks(Walk):
    def val_dataloader(self):
        return [loader(shift=0, shuffle=False), loader(shift=1, shuffle=False)]


def accuracy(module, shift):
    module.eval()
    correct = [(module.net(x).argmax(1) == y).float().mean() for x, y in loader(shift=shift, shuffle=False)]
    return float(torch.stack(correct).mean())


def test_matrix_of_one_fit_that_walks_the_stream(tmp_path):
    module, monitor = UserModule(), ContinualMonitor()
    make_trainer(tmp_path, monitor, max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(
        module, datamodule=TwoTasks()
    )
    assert monitor.matrix.shape == (2, 2)
    assert not monitor.matrix.isnan().any()
    assert monitor.matrix[1].tolist() == pytest.approx([accuracy(module, 0), accuracy(module, 1)], abs=1e-6)
    assert monitor.matrix[0, 0] > 0.3


def test_one_fit_a_task_with_as_many_loaders_as_tasks_seen(tmp_path):
    module, monitor = UserModule(), ContinualMonitor()
    for task in range(2):
        loaders = [loader(shift=seen, shuffle=False) for seen in range(task + 1)]
        make_trainer(tmp_path, monitor).fit(module, loader(shift=task), loaders)
    matrix = monitor.matrix
    assert matrix[0, 1].isnan()
    assert matrix[1].tolist() == pytest.approx([accuracy(module, 0), accuracy(module, 1)], abs=1e-6)


def test_sanity_check_and_inner_epochs_are_no_rows(tmp_path):
    monitor = ContinualMonitor()
    make_trainer(tmp_path, monitor, max_epochs=3, num_sanity_val_steps=2).fit(UserModule(), loader(), loader())
    assert len(monitor.rows) == 1


def test_state_goes_on(tmp_path):
    monitor = ContinualMonitor()
    make_trainer(tmp_path, monitor).fit(UserModule(), loader(), loader())
    other = ContinualMonitor()
    other.load_state_dict(monitor.state_dict())
    assert torch.equal(other.matrix, monitor.matrix)
    with pytest.raises(ValueError, match="The state of ContinualMonitor is damaged: it lacks rows"):
        other.load_state_dict({"task": 0})
    assert torch.equal(other.matrix, monitor.matrix)


def test_metric_that_is_not_logged(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"found no such metric.*val_acc"):
        make_trainer(tmp_path, ContinualMonitor("accuracy")).fit(UserModule(), loader(), loader())


def test_tasks_that_no_validation_closes_leave_rows_of_nan_and_no_shift(tmp_path):
    """Three tasks of two epochs, validated at the end of epochs 4 only: that is task 1, and a warning says so of the others."""
    monitor = ContinualMonitor()
    trainer = make_trainer(
        tmp_path, monitor, max_epochs=6, reload_dataloaders_every_n_epochs=1, check_val_every_n_epoch=4
    )
    with pytest.warns(UserWarning, match=r"Task [02] ended without a validation.*check_val_every_n_epoch") as caught:
        trainer.fit(UserModule(), datamodule=TwoTasks())
    assert sum("ended without a validation" in str(warning.message) for warning in caught) == 2
    assert [bool(row) for row in monitor.rows] == [False, True, False]
    assert monitor.matrix[[0, 2]].isnan().all()
    assert not monitor.matrix[1, :2].isnan().any()


def test_early_stopping_leaves_a_row_that_validate_fills(tmp_path):
    module, monitor = UserModule(), ContinualMonitor()
    loaders = [loader(shift=0, shuffle=False), loader(shift=1, shuffle=False)]
    for task in range(2):
        stop = EarlyStopping("val_loss/dataloader_idx_0", patience=0, divergence_threshold=-1.0)
        trainer = make_trainer(tmp_path, monitor, stop, max_epochs=9)
        with pytest.warns(UserWarning, match=f"Task {task} ended without a validation.*trainer.validate"):
            trainer.fit(module, loader(shift=task), loaders)
        assert trainer.current_epoch < 9
        if task == 1:
            trainer.validate(module, loaders, verbose=False)
            trainer.validate(module, loaders[:1], verbose=False)  # the row is taken once
    assert monitor.matrix[0].isnan().all()
    assert monitor.matrix[1].tolist() == pytest.approx([accuracy(module, 0), accuracy(module, 1)], abs=1e-6)


def test_validate_of_another_number_of_loaders_reads_no_stale_metric(tmp_path):
    module, monitor = UserModule(), ContinualMonitor()
    stop = EarlyStopping("val_loss/dataloader_idx_0", patience=0, divergence_threshold=-1.0)
    trainer = make_trainer(tmp_path, monitor, stop, max_epochs=9)
    trainer.fit(module, loader(), [loader(shuffle=False), loader(shift=1, shuffle=False)])
    trainer.validate(module, loader(shuffle=False), verbose=False)
    assert len(monitor.rows[0]) == 1


def test_curves_hold_no_nan_after_a_task_without_a_row(tmp_path):
    logged = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.extend((step, name) for name in metrics if name.startswith("accuracy/"))

    trainer = make_trainer(
        tmp_path,
        ContinualMonitor(),
        max_epochs=4,
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=4,
        logger=Logger(),
    )
    trainer.fit(UserModule(), datamodule=TwoTasks())
    assert set(logged) == {(1, "accuracy/task_00"), (1, "accuracy/task_01"), (1, "accuracy/average")}


def test_a_task_of_a_stream_that_max_steps_cuts_short_has_no_row(tmp_path):
    """Two epochs of 6 batches are a task; the fit ends inside the second."""
    module, monitor = UserModule(), ContinualMonitor()
    trainer = make_trainer(tmp_path, monitor, max_epochs=4, max_steps=18, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, datamodule=TwoTasks())
    trainer.validate(module, datamodule=TwoTasks(), verbose=False)
    assert [len(row) for row in monitor.rows] == [2]


class StopError(Exception):
    pass


class CrashAfter(Callback):
    """Stops the process after a number of batches; the checkpoint of that batch is written before, at its end."""

    def __init__(self, steps):
        self.steps = steps

    def on_validation_start(self, trainer, pl_module):
        self.stop(trainer)

    def on_train_batch_start(self, trainer, *args):
        self.stop(trainer)

    def stop(self, trainer):
        if trainer.global_step >= self.steps:
            raise StopError


@pytest.mark.parametrize("steps", [6, 9, 12, 18, 24])
@pytest.mark.parametrize("walk", [True, False])
def test_resume_from_any_batch_keeps_the_index_of_the_task(tmp_path, steps, walk):
    """Two epochs of 6 batches are a task; the process ends after some batch, the last of a task among them."""
    options = {"enable_checkpointing": True, "max_epochs": 4 if walk else 2}
    if walk:
        options["reload_dataloaders_every_n_epochs"] = 1

    def fit(monitor, task, *callbacks, **kwargs):
        trainer = make_trainer(tmp_path, monitor, *callbacks, **options)
        if walk:
            trainer.fit(UserModule(), datamodule=TwoTasks(), **kwargs)
        else:
            data = TwoTasks().val_dataloader()
            trainer.fit(UserModule(), loader(shift=task), data, **kwargs)

    monitor = ContinualMonitor()
    first = 0 if walk else (steps - 1) // 12
    for task in range(first):
        fit(monitor, task)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    done = steps - 12 * first
    with pytest.raises(StopError):
        fit(monitor, first, saver, CrashAfter(done))
    resumed = ContinualMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(resumed, first, ckpt_path=tmp_path / f"step={done}.ckpt")
        if steps == 12 and not walk:
            fit(resumed, 1)
    # After a checkpoint of a task's last batch Lightning goes on behind the validation of that batch.
    missing = {12: [0], 24: [1]}.get(steps, [])
    said = [str(warning.message) for warning in caught if "ended without a validation" in str(warning.message)]
    assert [message.split(" ended")[0] for message in said] == [f"Task {task}" for task in missing]
    if walk or steps >= 12:
        assert resumed.task == 1
        assert [len(row) for row in resumed.rows] == [0 if task in missing else 2 for task in range(2)]
    else:
        assert resumed.task == 0
        assert len(resumed.rows) == 1
