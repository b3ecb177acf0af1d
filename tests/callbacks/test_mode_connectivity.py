"""MC-SGD against its formula, written out without the project's code."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lit_rebasin import ContinualClassifier, ContinualDataModule, ModeConnectivity

from .user_code import make_trainer


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    return ContinualClassifier(body, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def fit(callback, tasks=2, also=(), model=None, scenario="domain", resume=None, save=None, **options):
    options = {"n_tasks": 3, "epochs_per_task": 2, "replay_per_class": 2, **options}
    data = ContinualDataModule("rotated-digits", **options)
    data.stream = replace(data.stream, scenario=scenario)
    trainer = make_trainer(
        None,
        *also,
        callback,
        max_epochs=2 * tasks,
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
    )
    model = model or network()
    trainer.fit(model, datamodule=data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return model, data


class Trained(Callback):
    """Keeps the networks as they were trained, and the sizes of the batches."""

    def __init__(self):
        self.networks, self.tasks, self.begun = [], set(), {}

    def on_before_backward(self, trainer, module, loss):
        self.begun.setdefault(trainer.datamodule.task, copy.deepcopy(module))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.tasks.add((trainer.datamodule.task, tuple(batch[2].unique().tolist())))
        if trainer.is_last_batch and trainer.current_epoch % 2:
            self.networks.append(copy.deepcopy(module))


def test_one_step_is_that_of_the_formula():
    trained = Trained()
    callback = ModeConnectivity(start=0.3, points=4, learning_rate=0.02, batch_size=1000)
    model, data = fit(callback, also=[trained])
    previous, new = (dict(one.named_parameters()) for one in trained.networks)
    previous = {name: tensor.detach() for name, tensor in previous.items()}
    new = {name: tensor.detach() for name, tensor in new.items()}
    w = {name: (previous[name] + 0.3 * (new[name] - previous[name])).requires_grad_() for name in new}
    loss = 0
    for begin, (x, y, _) in ((previous, data.kept_examples(1)), (new, _permuted(data))):
        for a in (0, 0.25, 0.5, 0.75, 1):
            point = {name: begin[name] + a * (w[name] - begin[name]) for name in w}
            loss = loss + cross_entropy(functional_call(model, point, (x,)), y)
    loss.backward()
    for name, tensor in w.items():
        torch.testing.assert_close(
            dict(model.named_parameters())[name], tensor - 0.02 * tensor.grad, rtol=1e-4, atol=1e-6
        )


def _permuted(data):
    """The batch of the new task that the callback draws: as many examples as it has, or 1,000."""
    generator = torch.Generator().manual_seed(0 + 1)
    n = len(data.new_examples(1)[1])
    order = torch.randperm(n, generator=generator)[:1000]
    return [part[order] for part in data.new_examples(1)]


def test_a_later_task_takes_all_steps_of_the_formula_with_momentum():
    """After the third task: passes over what is kept of two tasks, in batches, each with another batch of the new one."""
    trained, size = Trained(), 15
    callback = ModeConnectivity(start=0.3, points=2, learning_rate=0.02, momentum=0.7, epochs=2, batch_size=size)
    connected = []

    class Connected(Callback):
        def on_validation_start(self, trainer, module):
            connected.append({name: tensor.detach().clone() for name, tensor in module.named_parameters()})

    model, data = fit(callback, tasks=3, also=[trained, Connected()])
    previous = connected[1]
    new = {name: tensor.detach() for name, tensor in trained.networks[2].named_parameters()}
    old_x, old_y, of_task = data.kept_examples(2)
    assert of_task.unique().tolist() == [0, 1]
    new_x, new_y, _ = data.new_examples(2)
    generator = torch.Generator().manual_seed(0 + 2)
    fresh = list(torch.randperm(len(new_y), generator=generator).split(size))
    w = {name: (previous[name] + 0.3 * (new[name] - previous[name])) for name in new}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in w.items()}
    for _ in range(2):
        for chosen in torch.randperm(len(old_y), generator=generator).split(size):
            w = {name: tensor.detach().requires_grad_() for name, tensor in w.items()}
            drawn = fresh.pop(0)
            lines = ((previous, old_x[chosen], old_y[chosen]), (new, new_x[drawn], new_y[drawn]))
            loss = 0
            for begin, x, y in lines:
                for a in (0, 0.5, 1):
                    point = {name: begin[name] + a * (w[name] - begin[name]) for name in w}
                    loss = loss + cross_entropy(functional_call(model, point, (x,)), y)
            loss.backward()
            velocity = {name: 0.7 * velocity[name] + w[name].grad for name in w}
            w = {name: w[name] - 0.02 * velocity[name] for name in w}
    for name, tensor in w.items():
        torch.testing.assert_close(dict(model.named_parameters())[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_datamodule_mixes_as_before_when_a_fit_is_over():
    _model, data = fit(ModeConnectivity())
    assert data.mixes_replay


def test_a_second_fit_begins_anew():
    callback = ModeConnectivity()
    fit(callback)
    again = fit(callback)[0]
    torch.testing.assert_close(again.state_dict(), fit(ModeConnectivity())[0].state_dict(), rtol=0, atol=0)


def test_a_search_that_diverges_is_an_error_and_leaves_what_was_trained():
    trained, model, seen = Trained(), network(), []

    class Seen(Callback):
        def on_fit_start(self, trainer, module):
            seen.append(trainer.datamodule)

    with pytest.raises(RuntimeError, match="ended in NaN or infinity: lower learning_rate"):
        fit(ModeConnectivity(learning_rate=1e6, momentum=0.9, epochs=50), model=model, also=[trained, Seen()])
    assert seen[0].mixes_replay
    torch.testing.assert_close(model.state_dict(), trained.networks[1].state_dict(), rtol=0, atol=0)


def test_training_sees_the_new_task_alone():
    trained = Trained()
    fit(ModeConnectivity(), also=[trained])
    assert trained.tasks == {(0, (0,)), (1, (1,))}


def test_a_task_goes_on_from_what_the_last_one_trained():
    trained = Trained()
    model, _data = fit(ModeConnectivity(), tasks=3, also=[trained])
    for task in (1, 2):
        begun, ended = trained.begun[task].backbone[1].weight, trained.networks[task - 1].backbone[1].weight
        torch.testing.assert_close(begun, ended, rtol=0, atol=0)
    assert not torch.equal(model.backbone[1].weight, trained.networks[2].backbone[1].weight)


def test_a_resumed_fit_is_that_without_a_break(tmp_path):
    whole = fit(ModeConnectivity(), tasks=3)[0]
    fit(ModeConnectivity(), tasks=2, save=tmp_path / "task.ckpt")
    resumed = fit(ModeConnectivity(), tasks=3, resume=tmp_path / "task.ckpt")[0]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


class FirstEpochAlone(Callback):
    """Trains a bias in the first epoch of every task only, and saves a checkpoint when the first of all is over."""

    def __init__(self, save=None):
        self.save = save

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.current_epoch % 2:
            module.backbone[1].bias.grad.zero_()

    def on_train_epoch_end(self, trainer, module):
        if self.save and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.save)


def test_a_fit_resumed_within_the_first_task_is_that_without_a_break(tmp_path):
    whole = fit(ModeConnectivity(), also=[FirstEpochAlone(tmp_path / "epoch.ckpt")])[0]
    callback = ModeConnectivity()
    resumed = fit(callback, also=[FirstEpochAlone()], resume=tmp_path / "epoch.ckpt")[0]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert "backbone.1.bias" in callback.state_dict()["learned"]


def test_both_lines_have_a_lower_loss_than_the_start():
    """On the objective itself, over all that is kept and the whole new task."""
    trained = Trained()
    model, data = fit(ModeConnectivity(epochs=20, learning_rate=0.01, momentum=0.0), also=[trained])
    previous, new = ({n: t.detach() for n, t in one.named_parameters()} for one in trained.networks)
    start = {name: previous[name] + 0.1 * (new[name] - previous[name]) for name in new}

    def objective(w):
        total = 0.0
        for begin, (x, y, _) in ((previous, data.kept_examples(1)), (new, data.new_examples(1))):
            for a in torch.linspace(0, 1, 6).tolist():
                point = {name: begin[name] + a * (w[name] - begin[name]) for name in w}
                with torch.no_grad():
                    total += float(cross_entropy(functional_call(model, point, (x,)), y))
        return total

    assert objective(dict(model.named_parameters())) < 0.98 * objective(start)


def test_same_seed_same_network_and_state():
    callbacks = [ModeConnectivity(seed=seed) for seed in (0, 0, 1)]
    weights = [fit(callback, tasks=3)[0].backbone[1].weight for callback in callbacks]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    resumed = ModeConnectivity()
    resumed.load_state_dict(copy.deepcopy(callbacks[0].state_dict()))
    assert resumed.n_tasks == 3
    torch.testing.assert_close(resumed.previous["backbone.1.weight"], weights[0].detach())


@pytest.mark.parametrize("wrong", [{"start": 2}, {"points": 0}, {"learning_rate": 0}, {"epochs": 0}, {"batch_size": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ModeConnectivity(**wrong)


def test_it_needs_kept_examples():
    with pytest.raises(Exception, match="needs a datamodule that keeps examples"):
        fit(ModeConnectivity(), replay_per_class=0)


def test_a_fit_without_a_datamodule_says_what_is_missing():
    with pytest.raises(Exception, match="needs a datamodule that keeps examples"):
        make_trainer(None, ModeConnectivity(), max_epochs=1).fit(
            network(), [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())]
        )


def test_a_new_head_is_taken_as_it_was_trained():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU())
    trained = Trained()
    model = ContinualClassifier(body, n_features=12, n_heads=3)
    fit(ModeConnectivity(learning_rate=1e-9), model=model, also=[trained], scenario="task")
    torch.testing.assert_close(model.heads[1].weight, trained.networks[1].heads[1].weight)
    previous, new = (one.backbone[1].weight for one in trained.networks)
    torch.testing.assert_close(model.backbone[1].weight, 0.9 * previous + 0.1 * new)


def test_batch_norm_gets_statistics_of_old_and_new_examples():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    _model, data = fit(ModeConnectivity(batch_size=1000), model=ContinualClassifier(body))
    with torch.no_grad():
        old, new = (body[1](body[0](part[0])).mean(0) for part in (data.kept_examples(1), _permuted(data)))
    torch.testing.assert_close(body[2].running_mean, (old + new) / 2, rtol=1e-3, atol=1e-4)
