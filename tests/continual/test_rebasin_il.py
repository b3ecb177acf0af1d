"""RebasinIL against its formulas, written out without the project's code."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.functional import cross_entropy

from lit_rebasin.continual import ContinualClassifier, ContinualDataModule, RebasinIL

from .walk import walk

HIDDEN = 12


def network(seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    return ContinualClassifier(body)


def fit(model, tasks=2, callbacks=(), data=None, ckpt_path=None):
    data = data or ContinualDataModule("rotated-digits", n_tasks=3, epochs_per_task=2, replay_per_class=2)
    model.last_trainer = walk(model, data, *callbacks, tasks=tasks, ckpt_path=ckpt_path)
    return model


class Watch(Callback):
    """Keeps the state of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        residual = (
            {name: tensor.detach().clone() for name, tensor in module._residual().items()} if module.rebasin else {}
        )
        logits = module.rebasin.logits[0].detach().clone() if module.rebasin else None
        weights = copy.deepcopy(module.classifier.state_dict())
        self.seen.append((trainer.datamodule.task, weights, logits, residual, batch))


def soft(logits):
    """Sinkhorn in float64: 20 updates of the columns and the rows."""
    log = logits.double()
    for _ in range(20):
        log = log - log.logsumexp(0, keepdim=True)
        log = log - log.logsumexp(1, keepdim=True)
    return log.exp()


@pytest.fixture(scope="module")
def watched():
    watch = Watch()
    model = fit(RebasinIL(network(), seed=3), callbacks=[watch])
    return model, watch.seen


def test_the_network_is_fixed_while_later_tasks_are_trained(watched):
    _, seen = watched
    later = [weights for task, weights, *_ in seen if task == 1]
    assert len(later) > 20
    for name, tensor in later[0].items():
        assert torch.equal(tensor, later[-1][name]), name
    first = [weights for task, weights, *_ in seen if task == 0]
    assert not torch.equal(first[0]["backbone.1.weight"], first[-1]["backbone.1.weight"])


def test_start_of_permutations_and_residual(watched):
    _, seen = watched
    _, _, logits, residual, _ = next(entry for entry in seen if entry[0] == 1)
    noise = logits - torch.eye(HIDDEN)
    assert 0.05 < float(noise.std()) < 0.15
    for tensor in residual.values():
        assert float(tensor.abs().max()) < 6e-4


def test_a_step_is_that_of_the_formulas(watched):
    """SGD with weight decay on the clipped gradient of the cost at the midpoint for the residual, AdamW at 0.1 for the logits."""
    _, seen = watched
    index = next(i for i, entry in enumerate(seen) if entry[0] == 1)
    _, weights, logits, residual, (x, y, _) = seen[index]
    free = logits.double().requires_grad_()
    plan = soft(free)
    w1, b1 = weights["backbone.1.weight"].double(), weights["backbone.1.bias"].double()
    w2, b2 = weights["backbone.3.weight"].double(), weights["backbone.3.bias"].double()
    delta = {name: tensor.double().requires_grad_() for name, tensor in residual.items()}
    d1, e1, d2, e2 = (delta[f"backbone.{part}"] for part in ("1.weight", "1.bias", "3.weight", "3.bias"))
    hidden = (x.double().flatten(1) @ ((w1 + plan @ w1) / 2 + d1).T + (b1 + plan @ b1) / 2 + e1).relu()
    cross_entropy(hidden @ ((w2 + w2 @ plan.T) / 2 + d2).T + b2 + e2, y).backward()
    after = seen[index + 1][3]
    for name, tensor in delta.items():
        expected = tensor - 0.05 * (tensor.grad.clamp(-1e-3, 1e-3) + 0.1 * tensor)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-4, atol=1e-8)
        assert float(tensor.grad.abs().max()) > 1e-3
    # The first step of Adam is as long for every entry; the decay is torch's own.
    expected = logits.double() * (1 - 0.1 * 0.01) - 0.1 * free.grad.sign()
    clear = free.grad.abs() > 1e-6
    assert clear.double().mean() > 0.9
    torch.testing.assert_close(seen[index + 1][2].double()[clear], expected[clear], rtol=0, atol=2e-3)


def test_the_task_ends_with_the_merge(watched):
    model, seen = watched
    _, weights, *_ = seen[-1]
    rows, columns = linear_sum_assignment(-model.rebasin.logits[0].detach().numpy())
    assert rows.tolist() == list(range(HIDDEN))
    moved = weights["backbone.1.weight"][torch.as_tensor(columns)]
    expected = 0.8 * weights["backbone.1.weight"] + 0.2 * moved + model._residual()["backbone.1.weight"]
    torch.testing.assert_close(model.classifier.backbone[1].weight, expected)
    moved = weights["backbone.3.weight"][:, torch.as_tensor(columns)]
    expected = 0.8 * weights["backbone.3.weight"] + 0.2 * moved + model._residual()["backbone.3.weight"]
    torch.testing.assert_close(model.classifier.backbone[3].weight, expected)


def test_every_task_starts_from_noise_of_its_own():
    watch = Watch()
    fit(RebasinIL(network()), tasks=3, callbacks=[watch])
    first, second = (next(logits for t, _, logits, *_ in watch.seen if t == task) for task in (1, 2))
    assert not torch.allclose(first, second, atol=0.01)


def test_a_second_fit_begins_anew():
    model, other = RebasinIL(network()), RebasinIL(network())
    fit(model)
    model.classifier.load_state_dict(other.classifier.state_dict())
    for one in (model, other):
        fit(one, tasks=1)
    assert model.rebasin is None
    assert len(model.state_dict()) == len(other.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_same_seed_gives_the_same_network():
    first, second, other = (fit(RebasinIL(network(), seed=seed)).state_dict() for seed in (3, 3, 4))
    name = "classifier.backbone.1.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_without_permutations_to_find_it_says_so():
    torch.manual_seed(0)
    watch = Watch()
    with pytest.raises(MisconfigurationException, match=r"no permutable group\. Why its axes are fixed"):
        fit(RebasinIL(ContinualClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))), callbacks=[watch])
    assert watch.seen == []


def test_batch_norm_gets_statistics_of_the_merge():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    watch = Watch()
    fit(RebasinIL(ContinualClassifier(body)), tasks=3, callbacks=[watch])
    recent = [batch for *_, batch in watch.seen[-10:]]
    with torch.no_grad():
        means = torch.stack([body[1](body[0](x)).mean(0) for x, _, _ in recent])
    torch.testing.assert_close(body[2].running_mean, means.mean(0), rtol=1e-4, atol=1e-5)


def test_a_head_a_task():
    data = ContinualDataModule("rotated-digits", n_tasks=3, epochs_per_task=2, replay_per_class=2)
    data.stream = replace(data.stream, scenario="task")
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU())
    model = RebasinIL(
        ContinualClassifier(body, n_features=HIDDEN, n_heads=3), residual_learning_rate=1.0, residual_clip=1.0
    )
    before = [head.weight.detach().clone() for head in model.classifier.heads]
    fit(model, tasks=2, data=data)
    moved = [float((head.weight - old).abs().max()) for head, old in zip(model.classifier.heads, before, strict=True)]
    assert min(moved[:2]) > 0.01
    assert moved[2] < 1e-3  # of a task that has not come: nothing but what the residual begins with


def test_going_on_from_a_checkpoint_is_refused(tmp_path):
    model = fit(RebasinIL(network()))
    model.last_trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="cannot go on from a checkpoint after the first task"):
        fit(RebasinIL(network()), tasks=3, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "wrong", [{"alpha": 2}, {"learning_rate": 0}, {"residual_clip": 0}, {"residual_weight_decay": -1}]
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RebasinIL(network(), **wrong)
