"""Which neurons a training step leaves free to move, whatever the step does."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from lit_rebasin import ContinualClassifier, permute
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.callbacks.step_spec import step_spec
from lit_rebasin.continual import slim_resnet18
from lit_rebasin.merging.path import weights_of
from lit_rebasin.symmetry import rule

from .user_code import UserModule, make_trainer

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (7,), generator=torch.Generator().manual_seed(1))


class Step(pl.LightningModule):
    """Holds whatever a test hangs on it; the step is a function of the module and the batch."""

    def __init__(self, step, **parts):
        super().__init__()
        self.step = step
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)


def attached(tmp_path, module):
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(module)
    module.trainer = trainer
    return StepLoss(module, trainer.precision_plugin)


def losses(module, spec, batch, seed=0):
    """Return the loss of the module before and after all groups move, from the module's own training_step."""
    found = []
    moved = permute(module, spec, spec.random(generator=torch.Generator().manual_seed(seed)))
    for model in (module, moved):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        found.append(float(model.training_step(batch, 0).detach()))
    return found


def mlp(outputs=3, width=8):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def two_calls(m, batch):
    first, second = m.net(batch[0]), m.net(batch[0].flip(0))
    return cross_entropy(first, batch[1]) + 0.1 * mse_loss(first, second)


def weight_read_by_itself(m, batch):
    """A penalty that tells the neurons apart, by a weight that no call reads."""
    return cross_entropy(m.net(batch[0]), batch[1]) + (m.importance * m.net[0].bias.square()).sum()


def fixed_penalty(m, batch):
    return cross_entropy(m.net(batch[0]), batch[1]) + (torch.arange(8) * m.net[0].bias.square()).sum()


def inner_feature(m, batch):
    return cross_entropy(m.net[4](m.net[2](m.net[0](batch[0]).relu()).relu()), batch[1])


def value_decides(m, batch):
    """What torch.export cannot follow: a branch on data, outside the calls."""
    logits = m.net(batch[0])
    return cross_entropy(logits, batch[1]) * (2 if float(logits.detach().sum()) > 1e9 else 1)


def value_decides_on_features(m, batch):
    """The same between two calls, where neurons are told apart."""
    hidden = m.first(batch[0])
    if float(batch[0].sum()) > 1e9:
        hidden = hidden * 2
    return cross_entropy(m.net(hidden * torch.arange(1, 7)), batch[1])


def mixup(m, batch):
    x, y = batch
    share, order = np.random.beta(1, 1), torch.randperm(len(x))  # noqa: NPY002
    logits = m.net(share * x + (1 - share) * x[order])
    return share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[order])


def mapping(m, batch):
    return {"loss": cross_entropy(m.net(batch["x"]), batch["y"]), "more": 1}


def with_metrics(m, batch):
    logits = m.net(batch[0])
    m.auroc(logits[:, 0].sigmoid(), (batch[1] == 0).long())
    m.log("auroc", m.auroc, on_epoch=True)
    m.log_dict({"accuracy": m.accuracy(logits, batch[1]), "largest": logits.detach().max().item()})
    return cross_entropy(logits, batch[1])


@pytest.mark.parametrize(
    ("step", "parts", "moves"),
    [
        (two_calls, {}, {"net.0", "net.2"}),
        (weight_read_by_itself, {"importance": nn.Parameter(torch.rand(8))}, {"net.0", "net.2"}),
        (fixed_penalty, {}, {"net.2"}),
        (inner_feature, {}, {"net.0", "net.2"}),
        (value_decides, {}, {"net.0", "net.2"}),
        (value_decides_on_features, {"first": nn.Linear(6, 6)}, {"net.0", "net.2"}),
        (mixup, {}, {"net.0", "net.2"}),
        (with_metrics, {"auroc": BinaryAUROC(), "accuracy": MulticlassAccuracy(3)}, {"net.0", "net.2"}),
    ],
)
def test_steps(tmp_path, step, parts, moves):
    module = Step(step, net=mlp(), **parts)
    before = {name: tensor.clone() for name, tensor in weights_of(module).items()}
    spec = step_spec(attached(tmp_path, module), (X, Y))
    moving = [str(axis) for group in spec.groups.values() for axis in group.axes]
    assert {axis for axis in moving if axis.endswith("weight[0]")} == {f"{name}.weight[0]" for name in moves}
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(module).items())
    module.log = module.log_dict = lambda *args, **kwargs: None
    first, second = losses(module, spec, (X, Y))
    assert second == pytest.approx(first, rel=1e-5)


def test_penalty_moves_with_its_neurons(tmp_path):
    module = Step(weight_read_by_itself, net=mlp(), importance=nn.Parameter(torch.rand(8)))
    spec = step_spec(attached(tmp_path, module), (X, Y))
    (group,) = (g for g in spec.groups.values() if "net.0.bias[0]" in map(str, g.axes))
    assert {str(axis) for axis in group.axes} == {
        "net.0.weight[0]",
        "net.0.bias[0]",
        "net.2.weight[1]",
        "importance[0]",
    }


def test_batches_of_any_form(tmp_path):
    module = Step(mapping, net=mlp())
    spec = step_spec(attached(tmp_path, module), {"x": X, "y": Y, "name": ["a"] * 7})
    assert len(spec.groups) == 2


def test_frozen_parameters_hold_their_groups(tmp_path):
    module = Step(inner_feature, net=mlp())
    module.net[2].weight.requires_grad_(False)  # its inputs are the first group, its outputs the second
    spec = step_spec(attached(tmp_path, module), (X, Y))
    assert not spec.groups
    assert spec.fixed["net.0.weight[0]"] == "it would move a frozen parameter"
    module = Step(inner_feature, net=mlp())
    module.net[0].requires_grad_(False)
    spec = step_spec(attached(tmp_path, module), (X, Y))
    assert [str(axis) for group in spec.groups.values() for axis in group.axes if "net.0" in axis.tensor] == []
    assert len(spec.groups) == 1


def test_part_that_cannot_be_traced_is_fixed_and_the_rest_moves(tmp_path):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(outputs=6)

        def forward(self, x):
            return self.inner(x) if float(x.sum()) < 1e9 else x

    module = Step(lambda m, batch: cross_entropy(m.net(m.first(batch[0])), batch[1]), first=Stubborn(), net=mlp())
    spec = step_spec(attached(tmp_path, module), (X, Y))
    assert set(spec.groups) == {"net.0", "net.2"}
    assert "Stubborn" in spec.fixed["first.inner.0.weight[0]"]


def test_the_module_is_left_as_it_was(tmp_path):
    module = UserModule()
    before = {name: tensor.clone() for name, tensor in weights_of(module).items()}
    modes = [part.training for part in module.modules()]
    step, state = attached(tmp_path, module), torch.random.get_rng_state()
    spec = step_spec(step, (X.new_ones(5, 64), torch.arange(5)))
    assert set(spec.groups) == {"net.1", "net.5"}
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(module).items())
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(state, torch.random.get_rng_state())
    assert not {"log", "log_dict"} & set(module.__dict__)
    assert isinstance(module.train_acc, MulticlassAccuracy)


def test_a_step_that_cannot_be_exported_writes_nothing(tmp_path):
    def step(m, batch):
        with torch.no_grad():
            m.calls += 1
            m.teacher.weight.lerp_(m.net[0].weight, 0.5)
        loss = cross_entropy(m.net(batch[0]), batch[1])
        m.last = float(loss)  # no graph holds it
        return loss

    module = Step(step, net=mlp(), teacher=nn.Linear(6, 8).requires_grad_(False))
    module.register_buffer("calls", torch.zeros(()))
    before = {name: tensor.clone() for name, tensor in weights_of(module).items()}
    spec = step_spec(attached(tmp_path, module), (X, Y))
    assert set(spec.groups) == {"net.0", "net.2"}
    for name, tensor in weights_of(module).items():
        assert torch.equal(tensor, before[name]), name


def test_minus_infinity_in_a_mask(tmp_path):
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((7, 7), -torch.inf).triu(1))
            self.q, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out((self.q(x) @ self.q(x).T + self.mask).softmax(-1) @ self.v(x))

    module = Step(lambda m, batch: cross_entropy(m.net(batch[0]), batch[1]), net=Causal())
    spec = step_spec(attached(tmp_path, module), (X, Y))
    assert {"net.q.weight[0]", "net.v.weight[0]"} <= {str(axis) for g in spec.groups.values() for axis in g.axes}


def test_a_loss_that_is_not_finite_for_the_trial(tmp_path):
    """The trial perturbs the weights, which takes the level below zero."""

    def step(m, batch):
        return cross_entropy(m.net(batch[0]), batch[1]) + m.level.sqrt().sum()

    module = Step(step, net=mlp(), level=nn.Parameter(torch.full((64,), 1e-30).index_fill(0, torch.tensor(0), 1.0)))
    assert len(step_spec(attached(tmp_path, module), (X, Y)).groups) == 3  # the levels are alike, too


def test_group_that_a_trace_gets_wrong_is_held_and_the_training_goes_on(tmp_path):
    @torch.library.custom_op("lit_rebasin_tests::slope", mutates_args=())
    def slope(x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(x.shape[-1])

    slope.register_fake(torch.empty_like)
    rule(torch.ops.lit_rebasin_tests.slope)(lambda trace, x: x)  # wrong

    def step(m, batch):
        hidden = torch.ops.lit_rebasin_tests.slope(m.first(batch[0]))
        return cross_entropy(m.net(hidden), batch[1])

    module = Step(step, first=nn.Linear(6, 6), net=mlp())
    with pytest.warns(UserWarning, match=r"Groups at fault: first: .* The groups are held in place"):
        spec = step_spec(attached(tmp_path, module), (X, Y))
    assert len(spec.groups) == 2
    assert "tells the neurons apart" in spec.fixed["first.weight[0]"]


def test_autocast_does_not_blur_the_check():
    torch.manual_seed(0)
    model = ContinualClassifier(slim_resnet18(2), n_classes=5, n_features=16, n_heads=3)
    batch = [torch.randn(10, 3, 32, 32), torch.arange(10) % 5, torch.zeros(10, dtype=torch.long)]
    found = [step_spec(StepLoss(model, plugin), batch) for plugin in (Precision(), MixedPrecision("bf16-mixed", "cpu"))]
    assert found[0].to_json() == found[1].to_json()
    assert len(found[0].groups) == 12
