"""The training step as a function of weights: what it computes, and that it leaves no trace."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall
from torchmetrics.functional.classification import multiclass_precision, multiclass_recall

from lit_rebasin.callbacks.step_loss import NoLossError, StepLoss, draw_batches
from lit_rebasin.merging.path import weights_of

from .user_code import make_trainer

DATA = TensorDataset(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3)


DTYPES = []  # of the logits; what a step keeps on its module is put back


class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.held = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.mean = MeanMetric()
        self.notes = []

    def forward(self, x):
        return self.head(self.dropout(self.held(self.norm(self.body(x))).relu()))

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        DTYPES.append(logits.dtype)
        self.notes.append(len(logits))
        loss = cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.mean.update(loss.detach())
        self.log("accuracy", self.accuracy)
        self.log_dict({"step_loss": loss, "size": len(batch[0])}, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def attach(tmp_path, module=None, loader=None, **options):
    """Return the loss of a module that its trainer has trained for a step."""
    module = module or Small()
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=1, **options)
    trainer.fit(module, loader or DataLoader(DATA, batch_size=20))
    DTYPES.clear()
    module.notes = []
    return StepLoss(module, trainer.precision_plugin), trainer


def batches_of(step):
    batches = [(x.to(step.module.dtype), y) for x, y in DataLoader(DATA, batch_size=20)]
    assert len(batches[-1][0]) == 10
    return batches


def loss_by_hand(weights, x, y):
    """The loss in float64 without any module: batch statistics in one norm, running ones in the other, no dropout."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    hidden = x.double() @ w["body.weight"].T + w["body.bias"]
    mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]
    hidden = (hidden - w["held.running_mean"]) / (w["held.running_var"] + 1e-5).sqrt()
    hidden = (hidden * w["held.weight"] + w["held.bias"]).relu()
    return cross_entropy(hidden @ w["head.weight"].T + w["head.bias"], y)


def held_in_evaluation(module):
    """Put one norm in evaluation mode, as a user does who freezes its statistics, and the rest in training mode."""
    module.train()
    module.held.eval()
    module.held.running_mean.fill_(0.2)
    return module


def test_batch_norm_keeps_its_mode_and_the_rest_is_in_evaluation_mode(tmp_path):
    step, _ = attach(tmp_path)
    module = held_in_evaluation(step.module)
    modes = {name: child.training for name, child in module.named_modules()}
    with step.quiet():
        inside = {name for name, child in module.named_modules() if child.training}
        for x, y in batches_of(step):
            torch.testing.assert_close(step.loss((x, y)).double(), loss_by_hand(module.state_dict(), x, y))
    assert inside == {"norm"}
    assert {name: child.training for name, child in module.named_modules()} == modes


def test_loss_of_other_weights_and_its_gradient(tmp_path):
    step, _ = attach(tmp_path)
    held_in_evaluation(step.module)
    weights = {
        name: torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor
        for name, tensor in weights_of(step.module).items()
        if not name.startswith(("accuracy", "mean"))
    }
    trained = {name: tensor.clone().requires_grad_() for name, tensor in weights.items() if name.endswith("t")}
    x, y = batches_of(step)[0]
    with step.quiet():
        loss = step.at({**weights, **trained}, (x, y))
    expected = loss_by_hand({**weights, **trained}, x, y)
    torch.testing.assert_close(loss.double(), expected)
    ours, theirs = (torch.autograd.grad(value, list(trained.values())) for value in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_buffers_may_come_with_a_gradient_and_none_is_written_to(tmp_path):
    step, _ = attach(tmp_path)
    weights = {name: tensor.clone() for name, tensor in weights_of(step.module).items()}
    weights["norm.running_var"].requires_grad_()
    copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
    before = {name: tensor.clone() for name, tensor in weights_of(step.module).items()}
    with step.quiet():
        step.at(weights, batches_of(step)[0])
        step.mean(weights, batches_of(step))
    assert all(torch.equal(weights[name], tensor) for name, tensor in copies.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(step.module).items())


@pytest.mark.parametrize(
    ("precision", "expected"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("64-true", torch.float64)]
)
def test_step_runs_in_the_precision_of_the_training(tmp_path, precision, expected):
    step, _ = attach(tmp_path, precision=precision)
    with step.quiet():
        step.loss(batches_of(step)[0])
        step.mean(weights_of(step.module), batches_of(step)[:1])
    assert [expected] * 2 == DTYPES


def test_what_the_step_notes_down_is_put_back(tmp_path):
    step, _ = attach(tmp_path)
    step.module.notes = notes = [3]
    with step.quiet():
        step.mean(weights_of(step.module), batches_of(step))
    assert step.module.notes is notes
    assert notes == [3]


def test_new_tensors_of_the_step_are_of_the_precision_of_the_training(tmp_path):
    class Constant(Small):
        def training_step(self, batch, batch_idx):
            DTYPES.append(torch.zeros(1).dtype)
            return super().training_step(batch, batch_idx)

    step, _ = attach(tmp_path, Constant(), precision="64-true")
    with step.quiet():
        step.loss(batches_of(step)[0])
    assert DTYPES[0] == torch.float64


def test_mean_of_losses_logs_and_metrics(tmp_path):
    step, _ = attach(tmp_path)
    module, batches = held_in_evaluation(step.module), batches_of(step)
    with step.quiet():
        step.mean(weights_of(module), batches[:1])
        weights = {name: tensor.requires_grad_(name == "head.weight") for name, tensor in weights_of(module).items()}
        loss, logged = step.mean(weights, batches)
        hits = 0
        for x, y in batches:
            logits = functional_call(module, {n: t.clone() for n, t in weights_of(module).items()}, (x,))
            hits += int((logits.argmax(1) == y).sum())
    by_hand = [float(loss_by_hand(module.state_dict(), x, y)) for x, y in batches]
    assert float(loss) == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert not loss.requires_grad
    assert set(logged) == {"accuracy", "step_loss", "size"}
    assert logged["accuracy"] == pytest.approx(
        hits / 50
    )  # of all samples of this call, where the last batch is smaller
    assert logged["step_loss"] == pytest.approx(float(loss))
    assert logged["size"] == pytest.approx(50 / 3)


def test_collection_of_metrics(tmp_path):
    class Collects(Small):
        def __init__(self):
            super().__init__()
            metrics = {"recall": MulticlassRecall(3), "precision": MulticlassPrecision(3)}
            self.metrics = MetricCollection(metrics, prefix="train_")

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            self.metrics(logits, batch[1])
            self.log_dict(self.metrics)
            return cross_entropy(logits, batch[1])

    step, _ = attach(tmp_path, Collects())
    batches = batches_of(step)
    for repeat in (1, 3):  # starting afresh each time, also with other data
        with step.quiet():
            step.module.norm.eval()
            step.module.held.eval()
            _, logged = step.mean(weights_of(step.module), batches[:repeat])
            logits, y = torch.cat([step.module(x) for x, _ in batches[:repeat]]), DATA.tensors[1][: 20 * repeat]
        assert logged["train_recall"] == pytest.approx(float(multiclass_recall(logits, y, 3)))
        assert logged["train_precision"] == pytest.approx(float(multiclass_precision(logits, y, 3)))
        assert "log_dict" not in step.module.__dict__
    with step.quiet(), step.silent():
        step.loss(batches[0])


def test_quiet_leaves_no_trace_even_when_the_step_fails(tmp_path):
    step, _ = attach(tmp_path)
    module = step.module
    metric, states = module.mean, {name: tensor.clone() for name, tensor in module.mean.metric_state.items()}
    assert float(states["weight"]) == 1

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    def fail_inside():
        with step.quiet():
            step.loss(batches_of(step)[0])
            draw()
            assert module.mean is not metric
            raise RuntimeError("inside")

    pl.seed_everything(7, verbose=False)
    expected = draw()
    pl.seed_everything(7, verbose=False)
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert draw() == expected
    assert module.mean is metric
    assert all(torch.equal(states[name], tensor) for name, tensor in metric.metric_state.items())
    assert "log" not in module.__dict__
    assert "log_dict" not in module.__dict__
    assert module.training


def test_silent_keeps_logs_and_metrics_out(tmp_path):
    step, _ = attach(tmp_path)
    with step.quiet():
        stand_in = step.module.accuracy
        with step.silent():
            step.logged = {}
            step.loss(batches_of(step)[0])
            assert step.logged == {}
            assert float(step.module.accuracy.compute()) == 0
        assert step.module.accuracy is stand_in
        step.loss(batches_of(step)[0])
        assert "step_loss" in step.logged


class Returns(Small):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def training_step(self, batch):
        loss = super().training_step(batch, 0)
        return self.returned(loss, batch)


def test_step_of_a_batch_alone_that_returns_a_dict(tmp_path):
    step, _ = attach(tmp_path, Returns(lambda loss, batch: {"loss": 3 * loss, "other": 1}))
    x, y = batches_of(step)[0]
    with step.quiet():
        held_in_evaluation(step.module).dropout.eval()
        loss = step.loss((x, y))
    torch.testing.assert_close(loss.double(), 3 * loss_by_hand(step.module.state_dict(), x, y))


@pytest.mark.filterwarnings("ignore:.*training_step.*None:UserWarning")
def test_step_that_skips_batches(tmp_path):
    step, _ = attach(tmp_path, Returns(lambda loss, batch: loss if len(batch[0]) == 10 else None))
    batches = batches_of(step)
    with step.quiet():
        with pytest.raises(NoLossError, match=r"Returns.training_step returned None"):
            step.loss(batches[0])
        kept = step.with_loss(batches)
        assert len(kept) == 1
        assert kept[0] is batches[-1]
        with pytest.raises(ValueError, match="returned None for all 2 batches drawn for the merge"):
            step.with_loss(batches[:2])


@pytest.mark.parametrize(
    ("returned", "called"), [(0.5, "float"), ({"l": 0.5}, "dict"), (torch.ones(3), r"a tensor of \(3,\)")]
)
def test_step_without_a_loss_tensor(tmp_path, returned, called):
    step, _ = attach(tmp_path)
    step.module.training_step = lambda batch, batch_idx: returned
    with (
        step.quiet(),
        pytest.raises(ValueError, match=f"training_step returned {called}, but the merge needs its loss"),
    ):
        step.loss(batches_of(step)[0])


def test_batches_are_a_fresh_pass_and_leave_the_loaders_generator_alone(tmp_path):
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(DATA, batch_size=20, shuffle=True, generator=generator)
    _, trainer = attach(tmp_path, loader=loader)
    state = generator.get_state()
    drawn = list(draw_batches(trainer))
    assert torch.equal(generator.get_state(), state)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, loader, strict=True))
    generator.set_state(state)
    begun = draw_batches(trainer)
    next(begun)
    begun.close()
    assert torch.equal(generator.get_state(), state)


def test_generator_of_a_sampler_is_left_alone(tmp_path):
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(DATA, batch_size=20, sampler=RandomSampler(DATA, generator=generator))
    _, trainer = attach(tmp_path, loader=loader)
    state = generator.get_state()
    list(draw_batches(trainer))
    assert torch.equal(generator.get_state(), state)


def test_batches_come_as_the_training_gets_them(tmp_path):
    class Transfers(Small):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 100, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    seen = []
    _, trainer = attach(tmp_path, Transfers(), precision="64-true")
    drawn = next(draw_batches(trainer))
    assert drawn[0].dtype == torch.float64
    assert torch.equal(drawn[0], seen[0])


def test_batches_of_several_loaders(tmp_path):
    class Several(Small):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    loaders = {"a": DataLoader(DATA, batch_size=20), "b": DataLoader(DATA, batch_size=50)}
    _, trainer = attach(tmp_path, Several(), loader=loaders)
    drawn = list(draw_batches(trainer))
    assert [(len(batch["a"][0]), len(batch["b"][0])) for batch in drawn] == [(20, 50), (20, 50), (10, 50)]
