import pickle
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_rebasin import ContinualDataModule
from lit_rebasin.continual.replay import choose_replay


class Learner(pl.LightningModule):
    """Notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.batches, self.optimizers_made, self.fresh = [], 0, []

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.fresh.append(not self.trainer.optimizers[0].state)
        self.batches.append((self.current_epoch, *batch))
        return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_acc", (self.net(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        self.optimizers_made += 1
        return torch.optim.Adam(self.parameters())


def trainer(max_epochs, reload=1, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        max_epochs=max_epochs,
        reload_dataloaders_every_n_epochs=reload,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def digits(**options):
    options = {"n_tasks": 3, "epochs_per_task": 2, "batch_size": 100, "replay_per_class": 2, **options}
    return ContinualDataModule("rotated-digits", **options)


@pytest.mark.parametrize("reload", [1, 2])
def test_fit_walks_the_stream_with_replay_and_fresh_optimizers(reload):
    module, data = Learner(), digits()
    trainer(6, reload).fit(module, datamodule=data)
    assert module.optimizers_made == 3
    assert module.fresh == [True, False] * 3
    for epoch, x, y, task in module.batches:
        current = epoch // 2
        n_new = int((task == current).sum())
        assert len(x) == len(y) == len(task)
        assert bool((task[:n_new] == current).all())
        assert int((task < current).sum()) == (n_new if current else 0)
    per_epoch = [sum(int((b[3] == b[0] // 2).sum()) for b in module.batches if b[0] == epoch) for epoch in range(6)]
    assert per_epoch == [1437] * 6
    replayed = torch.cat([b[3][b[3] < 2] for b in module.batches if b[0] == 4])
    assert abs(int((replayed == 0).sum()) - int((replayed == 1).sum())) <= 40  # evenly over the buffer


def test_buffer_holds_k_examples_of_each_class_of_each_task():
    data = digits(replay_per_class=3, n_tasks=4)
    _, replayed = data._training_data(3)
    x, y, task = replayed
    assert task.bincount().tolist() == [30, 30, 30]
    for t in range(3):
        assert y[task == t].bincount().tolist() == [3] * 10
        originals = data.stream.train(t)[0].flatten(1)
        same = (x[task == t].flatten(1)[:, None] == originals[None]).all(-1)
        assert same.any(1).all()
        assert len(set(same.int().argmax(1).tolist())) == 30


def test_each_task_keeps_a_choice_of_its_own():
    """Every task of rotated digits has the same scans in the same order, which the same draw would pick again."""
    data = digits(replay_per_class=3, n_tasks=4)
    x, _, task = data._training_data(3)[1]
    kept = set()
    for t in range(3):
        originals = data.stream.train(t)[0].flatten(1)
        same = (x[task == t].flatten(1)[:, None] == originals[None]).all(-1)
        kept.add(tuple(same.int().argmax(1).tolist()))
    assert len(kept) == 3


def test_what_is_kept_and_what_is_held_back_depends_on_the_seed():
    kept = [digits(replay_per_class=3, seed=seed).kept_examples(1)[0] for seed in (0, 1)]
    held = [next(iter(digits(validation_fraction=0.25, seed=seed).val_dataloader()[0]))[0] for seed in (0, 1)]
    for pair in (kept, held):
        assert pair[0].shape == pair[1].shape
        assert not torch.equal(*pair)


def test_order_depends_on_seed_and_epoch_alone():
    data = digits()
    loader = data.train_dataloader()
    first = [batch[0] for batch in loader]
    next(iter(loader))
    torch.manual_seed(123)
    again = [batch[0] for batch in digits().train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = next(iter(digits(seed=1).train_dataloader()))[0]
    assert not torch.equal(first[0], other)
    module = Learner()
    trainer(2).fit(module, datamodule=digits())
    assert not torch.equal(module.batches[0][1], module.batches[15][1])  # another epoch, another order


def test_held_back_examples_are_never_trained_on_nor_replayed():
    data = digits(validation_fraction=0.25, replay_per_class=50)
    held = torch.cat([batch[0] for batch in data.val_dataloader()[0]]).flatten(1)
    new, _ = data._training_data(0)
    _, replayed = data._training_data(1)
    assert len(held) == 359
    assert len(new[1]) == 1437 - 359
    # Of the scans that are twice in the data set none can be told apart; there is none in this split.
    for trained in (new[0], replayed[0]):
        assert torch.cdist(held, trained.flatten(1)).min() > 1e-3
    test = torch.cat([batch[0] for batch in data.test_dataloader()[0]])
    assert len(test) == 360
    validation = torch.cat([batch[0] for batch in digits().val_dataloader()[0]])
    assert torch.equal(validation, test)


def test_task_scenario_has_a_head_a_task(tmp_path):
    y = np.arange(60) % 5
    x = np.random.default_rng(0).integers(0, 255, (60, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = ContinualDataModule("arrays", n_tasks=2, scenario="task", data_dir=str(tmp_path / "a.npz"))
    assert (data.n_heads, data.n_classes, data.n_tasks, data.input_shape) == (2, 3, 2, (1, 8, 8))


class StopError(Exception):
    pass


class Crash(pl.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise StopError


@pytest.mark.parametrize(("crash", "fresh"), [(2, [True, False, True, False]), (3, [False, True, False])])
def test_resume_finds_the_task_and_its_optimizer(tmp_path, crash, fresh):
    """After epoch 1 (a boundary) the optimizer is new; after epoch 2 (inside task 1) it is the restored one."""
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    options = {"enable_checkpointing": True, "callbacks": [saver, Crash(crash)]}
    with pytest.raises(StopError):
        trainer(6, **options).fit(Learner(), datamodule=digits())
    module, data = Learner(), digits()
    trainer(6).fit(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert module.fresh == fresh
    assert [batch[0] for batch in module.batches] == [e for e in range(crash, 6) for _ in range(15)]
    assert all(int(batch[3].max()) == batch[0] // 2 for batch in module.batches)
    reference = Learner()
    trainer(6).fit(reference, datamodule=digits())
    assert torch.equal(reference.batches[-1][1], module.batches[-1][1])


def test_resume_with_rare_reloads_is_refused(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    with pytest.raises(StopError):
        trainer(6, 2, enable_checkpointing=True, callbacks=[saver, Crash(2)]).fit(Learner(), datamodule=digits())
    with pytest.raises(MisconfigurationException, match="reload_dataloaders_every_n_epochs=1"):
        trainer(6, 2).fit(Learner(), datamodule=digits(), ckpt_path=tmp_path / "last.ckpt")


def test_fast_dev_run():
    pl.Trainer(fast_dev_run=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False).fit(
        Learner(), datamodule=digits()
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs_per_task": 0}, "epochs_per_task must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"replay_per_class": -1}, "replay_per_class must be a whole number of at least 0"),
        ({"n_tasks": "5"}, "n_tasks must be a whole number of at least 1, got '5'"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"seed": 2**32}, "seed must be at most 4294967295"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        digits(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"validation_fraction": "half"}, "validation_fraction must be a number, got a str"),
        ({"replay_transform": 3}, "replay_transform must be a function of a batch of images, got a int"),
    ],
)
def test_arguments_of_a_wrong_kind(options, match):
    with pytest.raises(TypeError, match=match):
        digits(**options)


@pytest.mark.parametrize(
    ("max_epochs", "reload", "match"),
    [
        (5, 1, r"max_epochs=5\) does not fit epochs_per_task=2 and n_tasks=3: pass max_epochs=6"),
        (8, 1, r"max_epochs=8\) does not fit"),
        (6, 0, r"pass reload_dataloaders_every_n_epochs=1"),
        (6, 4, r"pass reload_dataloaders_every_n_epochs=1"),
    ],
)
def test_trainer_that_does_not_fit_the_stream(max_epochs, reload, match):
    module = Learner()
    with pytest.raises(MisconfigurationException, match=match):
        trainer(max_epochs, reload).fit(module, datamodule=digits())
    assert module.batches == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_epochs": -1, "max_steps": 9}, r"max_steps=9.*pass max_epochs=6"),
        ({"max_epochs": 6, "overfit_batches": 1}, "use limit_train_batches"),
    ],
)
def test_other_limits_of_the_trainer(options, match):
    with pytest.raises(MisconfigurationException, match=match):
        trainer(**options).fit(Learner(), datamodule=digits())


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_tasks": 4}, {"replay_per_class": 1}, {"epochs_per_task": 3}])
def test_checkpoint_of_another_stream_is_refused_in_a_fit_alone(tmp_path, change):
    first = trainer(2)
    first.fit(Learner(), datamodule=digits())
    first.save_checkpoint(tmp_path / "a.ckpt")
    name, value = next(iter(change.items()))
    with pytest.raises(MisconfigurationException, match=rf"stream with {name}=.*, not {value}"):
        trainer(6).fit(Learner(), datamodule=digits(**change), ckpt_path=tmp_path / "a.ckpt")
    assert trainer(6).validate(Learner(), datamodule=digits(**change), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_empty_task(tmp_path):
    y, y_test = np.arange(20) % 2, np.zeros(5, int)
    x = np.zeros((20, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y_test)
    data = ContinualDataModule("arrays", n_tasks=2, data_dir=str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match=r"Task \d of arrays has no test examples"):
        data.val_dataloader()


def test_a_later_task_without_examples_is_refused_before_training():
    module, data = Learner(), digits()
    last = replace(data.stream.recipes[2], train=torch.arange(0))
    data.stream = replace(data.stream, recipes=(*data.stream.recipes[:2], last))
    with pytest.raises(ValueError, match="Task 2 of rotated-digits has no training examples: pass a smaller n_tasks"):
        trainer(6).fit(module, datamodule=data)
    assert module.batches == []


def test_replay_is_a_function_of_the_seed():
    labels = torch.arange(100) % 7
    state = torch.random.get_rng_state()
    kept = choose_replay(labels, 2, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert labels[kept].bincount().tolist() == [2] * 7
    assert torch.equal(kept, choose_replay(labels, 2, seed=1))
    assert not torch.equal(kept, choose_replay(labels, 2, seed=2))
    assert len(choose_replay(torch.tensor([0, 0, 0, 1]), 3, seed=0)) == 4


class Shift(nn.Module):
    """Moves all images of a batch by up to two pixels."""

    def forward(self, images):
        return images.roll(int(torch.randint(-2, 3, ())), -1)


def batches_of(**options):
    data = digits(**options)
    data.setup("fit")
    return data, list(data.training_loader(1, lambda: 2))


def test_a_transform_is_applied_to_replayed_images_alone_and_drawn_with_the_seed():
    torch.manual_seed(0)
    _, plain = batches_of()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    data, moved = batches_of(replay_transform=Shift())
    assert torch.equal(torch.get_rng_state(), state)
    shifts = []
    for before, after in zip(plain, moved, strict=True):
        new = before[2] == 1
        assert torch.equal(before[1], after[1])
        assert torch.equal(before[0][new], after[0][new])
        same = [s for s in range(-2, 3) if torch.equal(after[0][~new], before[0][~new].roll(s, -1))]
        assert len(same) == 1
        shifts += same
    assert len(set(shifts)) > 1
    for ours, again in zip(moved, data.training_loader(1, lambda: 2), strict=True):
        assert torch.equal(ours[0], again[0])
    assert torch.equal(data.kept_examples(1)[0], digits().kept_examples(1)[0])


def test_a_transform_that_changes_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"replay_transform must leave shape and type .* made \(100, 64\)"):
        batches_of(replay_transform=nn.Flatten())


@pytest.mark.parametrize("benchmark", ["rotated-digits", "permuted-mnist"])
def test_other_processes_get_the_same_stream(fake_mnist, benchmark):
    data = ContinualDataModule(benchmark, n_tasks=2, data_dir=str(fake_mnist), replay_per_class=1)
    sent = pickle.loads(pickle.dumps(data))
    for ours, theirs in zip(data.new_examples(1), sent.new_examples(1), strict=True):
        assert torch.equal(ours, theirs)
