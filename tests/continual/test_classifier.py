"""What the classifier's training step minimises, and the learning rate of every task."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import ContinualClassifier, ContinualDataModule, RebasinMerge
from lit_rebasin.callbacks.step_loss import StepLoss

from .walk import walk


def network(**options):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))
    return ContinualClassifier(body, **options)


def stream(**options):
    return ContinualDataModule(
        "rotated-digits", **{"n_tasks": 3, "epochs_per_task": 2, "replay_per_class": 2, **options}
    )


def batch(tasks):
    generator = torch.Generator().manual_seed(1)
    n = len(tasks)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 10, torch.tensor(tasks)


def loss_of(model, tasks, *, double=False):
    model.log = lambda *args, **kwargs: None
    x, y, task = batch(tasks)
    return model.training_step((x.double() if double else x, y, task), 0)


class Watch(pl.Callback):
    """Keeps the network at the end of each task, and its teacher with the steps that had it."""

    def __init__(self):
        self.ends, self.teachers, self.losses = [], {}, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if module._teacher is not None:
            self.teachers[trainer.datamodule.task] = copy.deepcopy(module._teacher.state_dict())
        if trainer.is_last_batch and trainer.current_epoch % 2:
            self.ends.append(copy.deepcopy(module.state_dict()))


@pytest.mark.parametrize("tasks", [[3] * 6 + [0, 1, 2], [1, 0, 1, 0, 0, 1, 1], [7, 7, 7, 7, 2]])
def test_new_examples_weigh_as_one_task_and_replayed_ones_as_those_before_it(tasks):
    model = network(weighting="tasks").eval().double()
    x, y, task = batch(tasks)
    new, before = task == max(tasks), max(tasks)
    logits = model(x.double(), task)
    parts = [cross_entropy(logits[part], y[part]) for part in (new, ~new)]
    expected = (parts[0] + before * parts[1]) / (before + 1)
    torch.testing.assert_close(loss_of(model, tasks, double=True), expected)


@pytest.mark.parametrize("weighting", ["examples", "tasks"])
def test_a_batch_of_one_task_is_averaged(weighting):
    model = network(weighting=weighting).eval()
    x, y, task = batch([4] * 7)
    torch.testing.assert_close(loss_of(model, [4] * 7), cross_entropy(model(x, task), y))


class Rates(pl.Callback):
    """Notes the learning rate of every batch by task, and saves a checkpoint after each epoch."""

    def __init__(self, folder):
        self.folder, self.found = folder, {}

    def on_train_batch_start(self, trainer, module, *args):
        self.found.setdefault(trainer.datamodule.task, []).append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("first", [0, 1])
def test_learning_rates_fall_from_task_to_task_and_linear_ones_within_each(first, schedule, tmp_path):
    options = {"lr_decay": 0.5, "lr_schedule": schedule, "optimizer": lambda p: torch.optim.SGD(p, lr=0.08)}
    rates = Rates(tmp_path)
    walk(network(**options), stream(), rates, tasks=3)
    expected = {}
    for task, batches in rates.found.items():
        left = [1 - step / len(batches) * (schedule == "linear") for step in range(len(batches))]
        expected[task] = [0.08 * 0.5**task * share for share in left]
    if first:  # goes on in the middle of a task
        rates = Rates(tmp_path)
        walk(network(**options), stream(), rates, tasks=3, ckpt_path=tmp_path / "2.ckpt")
        done = len(expected[1]) - len(rates.found[1])
        assert 0 < done < len(expected[1])
        expected = {1: expected[1][done:], 2: expected[2]}
    assert set(rates.found) == set(range(first, 3))
    for task, found in rates.found.items():
        assert found == pytest.approx(expected[task])


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"limit_train_batches": 0.5}, {"limit_train_batches": 4}]
)
def test_a_linear_schedule_counts_the_steps_that_are_taken(options):
    class Steps(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            found.setdefault(trainer.datamodule.task, []).append(optimizer.param_groups[0]["lr"])

    found = {}
    model = network(lr_schedule="linear", optimizer=lambda p: torch.optim.SGD(p, lr=0.08))
    walk(model, stream(batch_size=200, epochs_per_task=3), Steps(), tasks=2, **options)
    assert set(found) == {0, 1}
    for rates in found.values():
        assert len(rates) % 3 == 0
        assert rates == pytest.approx([0.08 * (1 - step / len(rates)) for step in range(len(rates))])


def test_the_task_is_known_when_optimizers_are_made(tmp_path):
    data, seen = stream(), []

    def optimizer(parameters):
        seen.append(data.task)
        return torch.optim.SGD(parameters, lr=0.01)

    walk(network(optimizer=optimizer), data, Rates(tmp_path), tasks=3)
    assert seen == [0, 1, 2]
    seen.clear()
    walk(network(optimizer=optimizer), data, tasks=1)  # another fit of the same stream
    assert seen == [0]
    seen.clear()
    data = stream()
    walk(network(optimizer=optimizer), data, tasks=3, ckpt_path=tmp_path / "2.ckpt")  # within task 1
    assert seen == [1, 2]


def test_distillation_is_the_divergence_of_softened_predictions_over_replayed_examples():
    tasks = [2] * 4 + [0, 0, 1, 1, 0]
    model, teacher = network(distillation=0.3, temperature=3.0).double(), network().double()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter)
    model.backbone[3].p = 0.0
    teacher.eval()
    model._teach(teacher)
    x, y, _ = batch(tasks)
    terms = []
    for image in x.double()[4:]:
        ours, theirs = (net(image[None])[0].div(3).softmax(0).tolist() for net in (model, teacher))
        terms.append(sum(q * math.log(q / p) for p, q in zip(ours, theirs, strict=True)))
    expected = cross_entropy(model(x.double()), y) + 0.3 * 9 * sum(terms) / len(terms)
    torch.testing.assert_close(loss_of(model, tasks, double=True), expected)


def test_mixtures_are_of_replayed_images_with_new_ones_in_even_steps():
    tasks = [2, 2, 0, 0, 1]  # fewer new ones than replayed ones
    model, teacher = network(distillation=0.3, temperature=3.0, mixup=True).double(), network().double()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter)
    model.backbone[3].p = 0.0
    teacher.eval()
    model._teach(teacher)
    x, y, _ = batch(tasks)
    x = x.double()
    mixed = torch.stack([(x[2] + x[0]) / 2, 0.75 * x[3] + 0.25 * x[1], x[4]])
    terms = []
    for image in mixed:
        ours, theirs = (net(image[None])[0].div(3).softmax(0).tolist() for net in (model, teacher))
        terms.append(sum(q * math.log(q / p) for p, q in zip(ours, theirs, strict=True)))
    expected = cross_entropy(model(x), y) + 0.3 * 9 * sum(terms) / len(terms)
    torch.testing.assert_close(loss_of(model, tasks, double=True), expected)


def test_a_network_that_agrees_with_its_teacher_pays_nothing():
    tasks = [1] * 3 + [0] * 5
    model = network(distillation=7.0)
    model.backbone[3].p = 0.0
    model._teach(copy.deepcopy(model))
    torch.testing.assert_close(loss_of(model, tasks), loss_of(network().eval(), tasks))


def test_new_examples_alone_have_nothing_to_be_distilled():
    model = network(distillation=0.3)
    model._teach(network())
    model.backbone[3].p = 0.0
    torch.testing.assert_close(loss_of(model, [1] * 5), loss_of(network().eval(), [1] * 5))


@pytest.mark.parametrize("start", ["previous", "fresh"])
def test_the_teacher_is_the_merged_network(start):
    watch = Watch()
    walk(network(distillation=0.1), stream(), RebasinMerge(start=start), watch, tasks=3)
    assert set(watch.teachers) == {1, 2}
    for task, teacher in watch.teachers.items():
        for name, tensor in teacher.items():
            assert torch.equal(tensor, watch.ends[task - 1][name]), name


def test_the_teacher_is_neither_trained_nor_merged_nor_counted():
    model, watch = network(distillation=0.1), Watch()
    names = set(model.state_dict())
    walk(model, stream(), watch, tasks=2)
    assert set(model.state_dict()) == names
    assert len(list(model.parameters())) == 4
    assert not any(parameter.requires_grad for parameter in model._teacher.parameters())
    assert not model._teacher.training


def test_a_merge_sees_the_loss_of_the_labels_alone():
    tasks = [2] * 6 + [0, 1, 0]
    model = network(weighting="tasks", distillation=5.0)
    model._teach(network())
    for parameter in model._teacher.parameters():
        nn.init.normal_(parameter)
    step = StepLoss(model, pl.Trainer(logger=False, enable_checkpointing=False).precision_plugin)
    with step.quiet():
        seen = step.loss(list(batch(tasks)))
    torch.testing.assert_close(seen, loss_of(network(weighting="tasks").eval(), tasks))


def test_both_change_what_is_learned_and_the_symmetries_stay_the_same():
    found, weights = [], []
    for options in ({}, {"weighting": "tasks"}, {"distillation": 0.5}):
        model, merge = network(**options), RebasinMerge(method="sinkhorn", options={"steps": 2})
        walk(model, stream(), merge, tasks=3)
        found.append(merge.spec)
        weights.append(model.backbone[1].weight.detach())
    assert found[0].to_json() == found[1].to_json() == found[2].to_json()
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_fit_resumed_within_a_task_goes_on_as_it_would_have(tmp_path):
    def learner():
        model = network(distillation=0.5)
        model.backbone[3].p = 0.0  # a resumed fit has other random states
        return model

    whole = learner()
    walk(whole, stream(), RebasinMerge(), Rates(tmp_path), tasks=3)
    again = learner()
    walk(again, stream(), RebasinMerge(), tasks=3, ckpt_path=tmp_path / "2.ckpt")  # after the first epoch of task 1
    for ours, theirs in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_fit_starts_without_a_teacher():
    model = network(distillation=0.5)
    walk(model, stream(), tasks=3)
    watch = Watch()
    walk(model, stream(), watch, tasks=1)
    assert watch.teachers == {}


@pytest.mark.parametrize("mixup", [False, True])
def test_every_old_head_is_held_on_new_and_replayed_examples(mixup):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    options = {"n_features": 16, "n_heads": 4, "distillation": 0.5, "temperature": 1.0, "mixup": mixup}
    model, teacher = (ContinualClassifier(copy.deepcopy(body), **options).double() for _ in range(2))
    model._teach(teacher)
    tasks = [2, 2, 0, 1, 1]
    x, y, _ = batch(tasks)
    x = x.double()
    ours = [model.heads[t](model.backbone(image[None]))[0] for image, t in zip(x, tasks, strict=True)]
    shown = [(x[2] + x[0]) / 2, 0.75 * x[3] + 0.25 * x[1], x[4]] if mixup else x
    terms = []
    for image in shown:
        for t in (0, 1):  # not the present task's, nor one that is still to come
            p, q = (net.heads[t](net.backbone(image[None]))[0].softmax(0) for net in (model, teacher))
            terms.append((q * (q.log() - p.log())).sum())
    expected = cross_entropy(torch.stack(ours), y) + 0.5 * sum(terms) / len(terms)
    torch.testing.assert_close(loss_of(model, tasks, double=True), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "classes"}, "weighting must be 'examples' or 'tasks', got 'classes'"),
        ({"lr_schedule": "cosine"}, "lr_schedule must be 'constant' or 'linear', got 'cosine'"),
        ({"mixup": True}, "mixup mixes the images of the distillation, which is 0"),
        ({"lr_decay": 0.0}, r"lr_decay must lie in \(0, 1\], got 0.0"),
        ({"lr_decay": 1.5}, r"lr_decay must lie in \(0, 1\], got 1.5"),
        ({"distillation": -1.0}, "distillation must be a number of at least 0, got -1.0"),
        ({"distillation": float("nan")}, "distillation must be a number of at least 0, got nan"),
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"n_features": 0}, "n_features must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": 3}, "optimizer must be a function of parameters, got a int"),
        ({"lr_decay": "slow"}, "lr_decay must be a number, got a str"),
        ({"distillation": None}, "distillation must be a number, got a NoneType"),
        ({"temperature": [2.0]}, "temperature must be a number, got a list"),
    ],
)
def test_options_of_a_wrong_kind_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        network(**options)


def test_distillation_and_decay_need_tasks():
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = DataLoader(TensorDataset(*batch([0] * 10)), batch_size=5)
    for options in ({"distillation": 0.1}, {"lr_decay": 0.9}, {"lr_schedule": "linear"}):
        with pytest.raises(MisconfigurationException, match="needs a datamodule with tasks"):
            trainer.fit(network(**options), data)
