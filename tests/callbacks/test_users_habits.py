"""What users do in their modules, beyond a plain training step, and what the merge makes of it."""

import itertools
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from lit_rebasin import RebasinMerge, permute

from .user_code import UserModule, Walk, digits, loader, make_trainer


def tensors(module):
    both = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in both}


class Keep(Callback):
    """Notes the tensors that the training leaves behind; placed before the merge."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.trained = tensors(pl_module)


def fit_twice(tmp_path, module, merge, between=lambda module: None, **options):
    """Return the tensors after the first task, and those that the second one trained."""
    make_trainer(tmp_path, merge, **options).fit(module, loader())
    first, keep = tensors(module), Keep()
    between(module)
    make_trainer(tmp_path, keep, merge, **options).fit(module, loader(shift=1))
    return first, keep.trained


class TwoHeads(UserModule):
    """A trunk and a head a task, each with hidden neurons and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU())
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)) for _ in range(2)
        )
        self.task = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.heads[self.task](self.net(x)), y)


def second_task(module):
    module.task = 1


def test_the_trunk_moves_with_the_heads_of_all_tasks(tmp_path):
    """The first head is not run in the second task, but the trunk's neurons take its inputs with them."""
    module, merge = TwoHeads(), RebasinMerge()
    fit_twice(tmp_path, module, merge, second_task)
    (trunk,) = (g for g in merge.spec.groups.values() if "net.0.weight[0]" in map(str, g.axes))
    assert {"heads.0.0.weight[1]", "heads.1.0.weight[1]"} <= set(map(str, trunk.axes))
    assert len(merge.spec.groups) == 3
    moved = permute(module, merge.spec, merge.spec.random(generator=torch.Generator().manual_seed(0)))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    for head in range(2):
        module.eval(), moved.eval()
        torch.testing.assert_close(module.heads[head](module.net(x)), moved.heads[head](moved.net(x)))


def test_statistics_of_a_head_that_a_task_does_not_run_are_kept(tmp_path):
    module, merge = TwoHeads(), RebasinMerge(method="identity")
    first, _ = fit_twice(tmp_path, module, merge, second_task)
    now = tensors(module)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(now[f"heads.0.1.{name}"], first[f"heads.0.1.{name}"])
    hidden = module.heads[1][0](module.net(torch.cat([x for x, _ in loader(shift=1)])))
    torch.testing.assert_close(now["heads.1.1.running_mean"], hidden.mean(0), rtol=1e-4, atol=1e-4)


def test_batch_norm_held_in_evaluation_mode_keeps_its_statistics(tmp_path):
    class Held(UserModule):
        def on_train_epoch_start(self):
            self.net[2].eval()

    module = Held()
    module.net[2].running_mean.normal_(generator=torch.Generator().manual_seed(0))
    first, trained = fit_twice(tmp_path, module, RebasinMerge(method="identity"))
    assert torch.equal(module.net[2].running_mean, first["net.2.running_mean"])
    assert torch.equal(trained["net.2.running_mean"], first["net.2.running_mean"])


def test_frozen_parameters_stay_bit_for_bit(tmp_path):
    module, merge = UserModule(), RebasinMerge(alpha=0.3, method="sinkhorn", options={"steps": 3})

    def freeze(module):
        module.net[1].requires_grad_(False)
        module.net[7].bias.requires_grad_(False)

    first, trained = fit_twice(tmp_path, module, merge, freeze)
    now = tensors(module)
    for name in ("net.1.weight", "net.1.bias", "net.7.bias"):
        assert torch.equal(now[name], first[name])
    assert not torch.equal(now["net.5.weight"], trained["net.5.weight"])


def test_a_network_that_something_renames_in_training_is_refused(tmp_path):
    merge, pruned = RebasinMerge(0.5), ModelPruning("l1_unstructured", amount=0.5)
    module = UserModule()
    make_trainer(tmp_path, merge).fit(module, loader())
    with pytest.raises(ValueError, match=r"trained network has a tensor '.*_orig' that the previous network lacks"):
        make_trainer(tmp_path, pruned, merge).fit(module, loader(shift=1))


def test_hooks_on_batches_see_those_of_the_merge(tmp_path):
    class Scales(UserModule):
        """Without its hook the loss is not what was trained."""

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] / 1000, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 1000, batch[1]

    losses = []
    for kind in (UserModule, Scales):
        torch.manual_seed(0)
        merge = RebasinMerge()
        fit_twice(tmp_path, kind(), merge)
        losses.append((merge.history[0]["loss_before"], merge.history[0]["loss_after"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_step_that_skips_some_batches(tmp_path):
    class Skips(UserModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if len(batch[0]) == 100 else None

    module, merge = Skips(), RebasinMerge(batches=20)
    for task in range(2):
        data = DataLoader(digits(task), batch_sampler=[range(30), range(100), range(50), range(200, 300), range(20)])
        make_trainer(tmp_path, merge).fit(module, data)
    assert len(merge.history) == 1
    assert len(merge.spec.groups) == 2


def test_step_that_skips_all_batches_of_the_merge(tmp_path):
    class SkipsLater(UserModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.awake or self.trainer.global_step < 14 else None

    module, merge = SkipsLater(), RebasinMerge()
    module.awake = True
    make_trainer(tmp_path, merge).fit(module, loader())
    module.awake = False
    with pytest.raises(
        ValueError, match=r"SkipsLater.training_step returned None for all 6 batches drawn for the merge"
    ):
        make_trainer(tmp_path, merge, max_steps=20, max_epochs=-1).fit(module, loader(shift=1))
    assert merge.n_tasks == 1


def test_merge_that_fails_leaves_what_was_trained(tmp_path, monkeypatch):
    module, merge, keep = UserModule(), RebasinMerge(), Keep()
    make_trainer(tmp_path, merge).fit(module, loader())
    remembered = {name: tensor.clone() for name, tensor in merge.previous.items()}

    def fails(*args, **kwargs):
        raise ArithmeticError("no room for statistics")

    monkeypatch.setattr("lit_rebasin.callbacks.correction.reestimate_batch_norm", fails)
    with pytest.raises(ArithmeticError, match="no room"):
        make_trainer(tmp_path, keep, merge).fit(module, loader(shift=1))
    now = tensors(module)
    assert all(torch.equal(now[name], keep.trained[name]) for name in merge.previous if "train_acc" not in name)
    assert merge.n_tasks == 1
    assert merge.history == []
    assert all(torch.equal(remembered[name], tensor) for name, tensor in merge.previous.items())


def test_random_states_go_on_as_without_a_merge(tmp_path):
    class Draws(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.is_last_batch:
                states.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))  # noqa: NPY002

    class Mixes(UserModule):
        def training_step(self, batch, batch_idx):
            x = batch[0] + 0.01 * np.random.rand() + 0.01 * random.random() + 0.01 * torch.rand(())  # noqa: NPY002
            return super().training_step((x, batch[1]), batch_idx)

    results = []
    for merges in (True, False):
        states = []
        module = Mixes()
        generator = torch.Generator().manual_seed(3)
        data = DataLoader(digits(), batch_size=100, shuffle=True, generator=generator)
        callback = RebasinMerge(method="sinkhorn", options={"steps": 3}) if merges else Callback()
        if merges:
            make_trainer(tmp_path, callback).fit(module, loader())
        states.clear()
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        make_trainer(tmp_path, callback, Draws(), max_epochs=1).fit(module, data)
        results.append((states, generator.get_state().tolist()))
    assert results[0] == results[1]


def test_metrics_of_a_step_are_in_the_history_and_count_nothing_twice(tmp_path):
    class Measures(UserModule):
        def __init__(self):
            super().__init__()
            self.auroc, self.accuracy = BinaryAUROC(), MulticlassAccuracy(10, average="micro")

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.auroc(logits[:, 0].sigmoid(), (batch[1] == 0).long())
            self.log("auroc", self.auroc, on_step=False, on_epoch=True)
            self.log("accuracy", self.accuracy(logits, batch[1]))
            return cross_entropy(logits, batch[1])

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            counts.append(len(pl_module.auroc.preds))

    counts, module, merge = [], Measures(), RebasinMerge(batches=6)
    make_trainer(tmp_path, merge).fit(module, loader())
    counts.clear()
    make_trainer(tmp_path, merge, Count(), max_epochs=1).fit(module, loader(shift=1))
    assert counts == [1, 2, 3, 4, 5, 6]
    entry = merge.history[0]
    assert {"auroc_before", "auroc_after", "accuracy_before", "accuracy_after"} <= set(entry)
    x, y = next(iter(DataLoader(digits(1), batch_size=600)))
    module.net.train()
    module.net[4].eval()
    with torch.no_grad():
        scores = torch.cat([module.net(part)[:, 0] for part in x.split(100)]).sigmoid()
    expected = BinaryAUROC()(scores, (y == 0).long())
    assert entry["auroc_after"] == pytest.approx(float(expected), abs=0.01)  # other batches, so other statistics


def test_stream_that_ends_inside_a_task_is_not_merged(tmp_path):
    module, merge, keep = UserModule(), RebasinMerge(), Keep()
    trainer = make_trainer(tmp_path, keep, merge, max_epochs=3, reload_dataloaders_every_n_epochs=2)
    with pytest.warns(UserWarning, match="ended in the middle of task 1, which is not merged"):
        trainer.fit(module, datamodule=Walk())
    assert merge.n_tasks == 1
    assert merge.history == []
    now = tensors(module)
    assert all(torch.equal(now[name], tensor) for name, tensor in keep.trained.items() if "train_acc" not in name)


def test_neurons_that_only_the_first_task_told_apart_stay(tmp_path):
    """A module that runs another way in every task: what moves must move in all of them."""

    class Switches(UserModule):
        task = 0

        def training_step(self, batch, batch_idx):
            hidden = self.net[:4](batch[0])
            if self.task == 0:
                hidden = hidden * torch.arange(1, 25)
            return cross_entropy(self.net[5:](hidden), batch[1])

    module, merge = Switches(), RebasinMerge()
    fit_twice(tmp_path, module, merge, second_task)
    assert set(merge.spec.groups) == {"net.5"}


@pytest.mark.parametrize("alpha", [0.5, "line-search"])
def test_merge_whose_loss_is_nan_is_refused(tmp_path, alpha):
    class Diverges(UserModule):
        broken = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.broken and not torch.is_grad_enabled() else loss  # in the merge alone

    def breaks(module):
        module.broken = True

    module, merge = Diverges(), RebasinMerge(alpha=alpha)
    with pytest.warns(UserWarning, match=r"merge after task 1 is refused: .*NaN or infinite.*previous model is kept"):
        first, _ = fit_twice(tmp_path, module, merge, breaks)
    assert "refused" in merge.history[0]
    assert merge.n_tasks == 2
    now = tensors(module)
    assert all(torch.equal(now[name], tensor) for name, tensor in first.items() if "train_acc" not in name)


def test_an_iterator_of_the_step_that_ends_in_the_merge_is_told_of(tmp_path):
    """Lightning takes a StopIteration for the end of its own data, and would end the epoch without a word."""

    class Unlabelled(UserModule):
        more = itertools.repeat(torch.zeros(2, 64))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * self.net(next(self.more)).sum()

    def runs_out(module):
        module.more = iter(())

    with pytest.raises(RuntimeError, match=r"Unlabelled.training_step has come to the end of an iterator of its own"):
        fit_twice(tmp_path, Unlabelled(), RebasinMerge(), runs_out)
