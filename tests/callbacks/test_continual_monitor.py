import pytest
import torch
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


def test_metric_that_is_not_logged(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"found no such metric.*val_acc"):
        make_trainer(tmp_path, ContinualMonitor("accuracy")).fit(UserModule(), loader(), loader())
