from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lit_rebasin import ContinualClassifier, ContinualDataModule, ContinualMonitor, RandomStates, RebasinMerge

from .user_code import UserModule, Walk, digits, loader, make_trainer


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


class Snapshot(Callback):
    """Notes the weights that each hook sees."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen["batch_end", trainer.current_epoch] = weights(pl_module)

    def on_validation_start(self, trainer, pl_module):
        self.seen["validation", trainer.current_epoch] = weights(pl_module)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def fit_tasks(tmp_path, module, merge, tasks=2, **options):
    """One fit a task, a fresh Trainer each time; returns the trainers."""
    trainers = []
    for task in range(tasks):
        trainers.append(make_trainer(tmp_path, merge, **options))
        trainers[-1].fit(module, loader(shift=task))
    return trainers


@pytest.mark.parametrize("method", ["identity", "weights", "sinkhorn"])
def test_merge_with_identity_permutations_equals_plain_averaging(tmp_path, method):
    """With shared weights the sinkhorn start is the identity too; without steps and residual it stays there."""
    module, merge = (
        UserModule(),
        RebasinMerge(alpha=0.3, method=method, options={"steps": 0} if method == "sinkhorn" else None),
    )
    before = Snapshot()
    make_trainer(tmp_path, merge).fit(module, loader())
    previous = weights(module)
    make_trainer(tmp_path, before, merge, max_epochs=1).fit(module, loader(shift=1))
    trained = before.seen["batch_end", 0]
    assert merge.history[0]["moved"] == 0
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, 0.3 * previous[name] + 0.7 * trained[name])


def test_merge_undoes_a_permutation(tmp_path):
    """A new model that is the previous one with its neurons shuffled merges into the previous one itself."""
    module, merge = UserModule(batch_norm=False), RebasinMerge(alpha=0.5, method="weights")
    make_trainer(tmp_path, merge).fit(module, loader())
    previous = weights(module)

    class Shuffle(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            p = torch.randperm(24, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                for name, tensor in pl_module.named_parameters():
                    tensor.copy_(previous[name])
                pl_module.net[1].weight.copy_(previous["net.1.weight"][p])
                pl_module.net[1].bias.copy_(previous["net.1.bias"][p])
                pl_module.net[5].weight.copy_(previous["net.5.weight"][:, p])

    make_trainer(tmp_path, Shuffle(), merge, max_epochs=1).fit(module, loader())
    assert merge.history[0]["moved"] >= 20
    assert merge.history[0]["barrier_before"] > merge.history[0]["barrier_after"] + 0.01
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, previous[name])


def test_one_fit_walks_the_stream(tmp_path):
    module, merge, snapshot = UserModule(), RebasinMerge(alpha=0.5, method="sinkhorn", options={"steps": 5}), Snapshot()
    trainer = make_trainer(tmp_path, snapshot, merge, max_epochs=6, reload_dataloaders_every_n_epochs=2)
    trainer.fit(module, datamodule=Walk())
    assert merge.n_tasks == 3
    assert [entry["task"] for entry in merge.history] == [1, 2]
    for closing in (3, 5):  # the last epoch of tasks 1 and 2: validation sees the merged model
        assert not same(snapshot.seen["batch_end", closing], snapshot.seen["validation", closing])
    for inside in (0, 1, 2, 4):  # no merge inside a task, nor after the first one
        assert same(snapshot.seen["batch_end", inside], snapshot.seen["validation", inside])
    assert same(weights(module), merge.previous)


def test_one_fit_a_task_with_the_same_object(tmp_path):
    module, merge = UserModule(), RebasinMerge(alpha=0.5, method="sinkhorn", options={"steps": 5})
    trainers = fit_tasks(tmp_path, module, merge, tasks=3, logger=True, enable_checkpointing=True)
    assert merge.n_tasks == 3
    for task, trainer in enumerate(trainers):
        checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
        state = checkpoint["callbacks"]["RebasinMerge"]
        assert state["n_tasks"] == task + 1
        # What a task's checkpoint holds is the merged model, statistics included.
        assert all(torch.equal(checkpoint["state_dict"][name], tensor) for name, tensor in state["previous"].items())
    assert same(weights(module), merge.previous)


def test_curves_of_later_tasks_do_not_overlap_earlier_ones(tmp_path):
    module, merge = UserModule(), RebasinMerge()
    steps = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer, *args):
            steps.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    for task in range(2):
        make_trainer(tmp_path, Steps(), merge).fit(module, loader(shift=task))
    assert steps == list(range(24))  # 2 tasks * 2 epochs * 6 batches


def test_callback_restored_from_a_checkpoint_goes_on_as_the_same_object(tmp_path):
    results = []
    for restore in (False, True):
        torch.manual_seed(0)
        module, merge = UserModule(), RebasinMerge(alpha=0.6, method="sinkhorn", options={"steps": 5})
        (trainer,) = fit_tasks(tmp_path, module, merge, tasks=1, logger=True, enable_checkpointing=True)
        if restore:
            checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
            merge = RebasinMerge(alpha=0.6, method="sinkhorn", options={"steps": 5})
            merge.load_state_dict(checkpoint["callbacks"][merge.state_key])
            module = UserModule()
            module.load_state_dict(checkpoint["state_dict"])
        torch.manual_seed(1)
        make_trainer(tmp_path, merge).fit(module, loader(shift=1))
        results.append((weights(module), merge))
    assert same(results[0][0], results[1][0])
    assert results[0][1]._steps_before == results[1][1]._steps_before == 24
    assert results[0][1].history[0]["loss_after"] == results[1][1].history[0]["loss_after"]


def test_merge_leaves_no_trace_in_metrics_random_state_and_modes(tmp_path):
    class Probe(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.is_last_batch:
                state = (int(pl_module.train_acc.total if hasattr(pl_module.train_acc, "total") else 0),)
                probes.append((state, torch.random.get_rng_state(), [m.training for m in pl_module.modules()]))
                probes[-1] += ({k: v.clone() for k, v in pl_module.train_acc.metric_state.items()},)

    probes = []
    module, merge = UserModule(), RebasinMerge(method="sinkhorn", options={"steps": 3})
    make_trainer(tmp_path, merge).fit(module, loader())
    probes.clear()
    make_trainer(tmp_path, Probe(), merge, type("After", (Probe,), {})(), max_epochs=1).fit(module, loader(shift=1))
    before, after = probes
    assert len(merge.history) == 1
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]
    assert all(torch.equal(before[3][name], after[3][name]) for name in before[3])
    assert "log" not in module.__dict__


def test_statistics_are_those_of_the_merged_weights(tmp_path):
    module, merge = UserModule(), RebasinMerge(method="identity", batches=6)
    fit_tasks(tmp_path, module, merge)
    x = torch.cat([batch[0] for batch in loader(shift=1, shuffle=False)])
    hidden = module.net[1](x)
    torch.testing.assert_close(module.net[2].running_mean, hidden.mean(0), rtol=1e-3, atol=1e-3)


class TwoHeads(UserModule):
    """A head a task: the second head is fresh when the second task comes."""

    def __init__(self):
        super().__init__(batch_norm=False)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(16, 10), nn.Linear(16, 10)])
        self.task = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.heads[self.task](self.net(x)), y)


def test_head_that_no_task_has_trained_is_not_averaged(tmp_path):
    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            kept.update(weights(pl_module))

    kept = {}
    module, merge = TwoHeads(), RebasinMerge(alpha=0.5, method="identity")
    make_trainer(tmp_path, merge).fit(module, loader())
    first = weights(module)
    module.task = 1
    make_trainer(tmp_path, Keep(), merge).fit(module, loader(shift=1))
    now = weights(module)
    assert torch.equal(now["heads.1.weight"], kept["heads.1.weight"])
    torch.testing.assert_close(now["net.0.weight"], 0.5 * first["net.0.weight"] + 0.5 * kept["net.0.weight"])
    assert torch.equal(now["heads.0.weight"], first["heads.0.weight"])
    assert {"heads.0.weight", "heads.1.weight"} <= merge._trained


def test_line_search_takes_the_best_of_the_path(tmp_path):
    module, merge = UserModule(), RebasinMerge(alpha="line-search", method="weights")
    fit_tasks(tmp_path, module, merge)
    entry = merge.history[0]
    assert 0 <= entry["alpha"] <= 1
    assert entry["loss_after"] <= min(entry["loss_before"], entry["loss_previous"]) + 1e-6


def test_early_stop_still_merges_and_saves_the_merged_model(tmp_path):
    module, merge = UserModule(), RebasinMerge(alpha=0.5)
    make_trainer(tmp_path, merge).fit(module, loader())
    stop = EarlyStopping("train_loss", patience=1, divergence_threshold=1e-9)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    make_trainer(tmp_path, merge, stop, saver, max_epochs=50, enable_checkpointing=True).fit(module, loader(shift=1))
    assert len(merge.history) == 1
    for path in (saver.last_model_path, saver.best_model_path):
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], tensor) for name, tensor in weights(module).items())


def test_max_steps_ends_a_task(tmp_path):
    module, merge = UserModule(), RebasinMerge()
    fit_tasks(tmp_path, module, merge, max_epochs=-1, max_steps=4)
    assert merge.n_tasks == 2
    assert len(merge.history) == 1


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_nan_refuses_the_merge_and_keeps_the_previous_model(tmp_path):
    class Poison(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.is_last_batch:
                with torch.no_grad():
                    pl_module.net[1].bias[3] = float("nan")

    module, merge = UserModule(), RebasinMerge()
    make_trainer(tmp_path, merge).fit(module, loader())
    previous = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.warns(UserWarning, match=r"merge after task 1 is refused: .* 'net.1.bias'.*previous model is kept"):
        make_trainer(tmp_path, Poison(), merge, max_epochs=1).fit(module, loader(shift=1))
    reason = "training left NaN or infinity in 'net.1.bias'"
    assert merge.history == [{"task": 1, "refused": reason, "kept": "previous"}]
    assert all(
        torch.equal(previous[name], tensor) for name, tensor in module.state_dict().items() if "train_acc" not in name
    )
    make_trainer(tmp_path, merge, max_epochs=1).fit(module, loader(shift=2))  # and it goes on
    assert merge.history[-1]["task"] == 2
    assert "alpha" in merge.history[-1]


def test_nan_in_the_first_task(tmp_path):
    class Diverges(UserModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=float("inf"))

    with pytest.raises(ValueError, match="no previous model"):
        make_trainer(tmp_path, RebasinMerge(), max_epochs=1).fit(Diverges(), loader())


def test_no_permutable_group(tmp_path):
    class OneLayer(UserModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 10)

    module = OneLayer()
    before = weights(module)
    with pytest.raises(
        MisconfigurationException, match=r"OneLayer has no permutable group.*data or a constant; the classes of a loss"
    ):
        make_trainer(tmp_path, RebasinMerge()).fit(module, loader())
    assert same(before, weights(module))
    make_trainer(tmp_path, RebasinMerge(method="identity")).fit(module, loader())


def test_previous_model_of_another_architecture(tmp_path):
    merge = RebasinMerge()
    make_trainer(tmp_path, merge).fit(UserModule(), loader())
    other = UserModule()
    other.net[1] = nn.Linear(64, 30)
    before = weights(other)
    with pytest.raises(ValueError, match=r"'net.1.weight' has shape \(30, 64\).*different architectures"):
        make_trainer(tmp_path, merge).fit(other, loader(shift=1))
    assert same(before, weights(other))


@pytest.mark.filterwarnings("ignore:.*zero:UserWarning")
def test_empty_task(tmp_path):
    merge, module = RebasinMerge(), UserModule()
    make_trainer(tmp_path, merge).fit(module, loader())
    empty = DataLoader(torch.utils.data.Subset(digits(), []), batch_size=10)
    with pytest.raises(MisconfigurationException, match="Task 1 has no training batches"):
        make_trainer(tmp_path, merge).fit(module, empty)
    assert merge.n_tasks == 1


def test_training_step_without_a_loss(tmp_path):
    class NoLoss(UserModule):
        def training_step(self, batch, batch_idx):
            self.net(batch[0])

    with pytest.raises(ValueError, match=r"NoLoss.training_step returned None on every batch of task 0"):
        make_trainer(tmp_path, RebasinMerge()).fit(NoLoss(), loader())


def test_manual_optimization_is_refused(tmp_path):
    module = UserModule()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="optimizes by hand"):
        make_trainer(tmp_path, RebasinMerge()).fit(module, loader())


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_split_the_weights_are_refused(strategy):
    trainer = SimpleNamespace(strategy=strategy())
    with pytest.raises(MisconfigurationException, match=f"whole weights on every device, which {strategy.__name__}"):
        RebasinMerge().setup(trainer, UserModule(), "fit")


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_processes_that_forget_the_network_of_the_fit_before_are_refused(tmp_path, strategy):
    trainer, merge = make_trainer(tmp_path, devices=2, strategy=strategy), RebasinMerge()
    with pytest.raises(MisconfigurationException, match="remembers the network of the fit before, but this strategy"):
        merge.setup(trainer, UserModule(), "fit")
    trainer.datamodule = ContinualDataModule("rotated-digits", n_tasks=2)  # one fit for all tasks
    merge.setup(trainer, ContinualClassifier(nn.Linear(2, 2)), "fit")


def test_sanity_check_merges_nothing(tmp_path):
    merge = RebasinMerge()
    trainer = make_trainer(tmp_path, merge, max_epochs=2, num_sanity_val_steps=2)
    trainer.fit(UserModule(), loader(), loader(shuffle=False))
    assert merge.n_tasks == 1
    assert merge.history == []


class CrashError(Exception):
    pass


class Crash(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise CrashError


def walk(tmp_path, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(0 if ckpt_path is None else 9)
    module, merge, monitor = UserModule(), RebasinMerge(alpha=0.5), ContinualMonitor()
    data = ContinualDataModule("rotated-digits", n_tasks=3, epochs_per_task=2, batch_size=200, replay_per_class=2)
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    trainer = make_trainer(
        tmp_path,
        merge,
        monitor,
        saver,
        RandomStates(),
        *callbacks,
        max_epochs=6,
        enable_checkpointing=True,
        reload_dataloaders_every_n_epochs=1,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, merge, monitor


def test_users_module_walks_a_named_stream(tmp_path):
    module, merge, monitor = walk(tmp_path)
    assert [entry["task"] for entry in merge.history] == [1, 2]
    assert monitor.matrix.shape == (3, 3)
    assert module.optimizers_made == 3


@pytest.mark.parametrize(
    "validation", [1, 2]
)  # a checkpoint is written at the end of every epoch, or of every validation
@pytest.mark.parametrize("crash", [1, 2, 3, 4, 5])
def test_resumed_fit_ends_with_the_same_weights(tmp_path, crash, validation):
    every = {"check_val_every_n_epoch": validation}
    reference, merges, monitor = walk(tmp_path / "whole", **every)
    with pytest.raises(CrashError):
        walk(tmp_path / "cut", Crash(crash), **every)
    last = tmp_path / "cut" / "last.ckpt"
    resumed, again, seen = walk(tmp_path / "cut", ckpt_path=last if last.exists() else None, **every)
    assert same(weights(reference), weights(resumed))
    assert torch.equal(monitor.matrix, seen.matrix)
    assert [entry["loss_after"] for entry in again.history] == [entry["loss_after"] for entry in merges.history]


def test_a_merge_sees_all_that_is_kept():
    class Count(RebasinMerge):
        def _draw(self, trainer):
            drawn = list(super()._draw(trainer))
            seen.append((len(drawn), sum(len(y) for _, y, _ in drawn)))
            yield from drawn

    seen = []
    data = ContinualDataModule("rotated-digits", n_tasks=2, epochs_per_task=1, batch_size=8, replay_per_class=3)
    model = ContinualClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)))
    merge = Count(examples="kept", batches=4)
    make_trainer(None, merge, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(model, datamodule=data)
    assert set(seen) == {(4, 2 * 3 * 10)}
