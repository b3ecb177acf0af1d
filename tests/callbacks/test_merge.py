"""What a merge computes, each number against its formula."""

from itertools import islice

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lit_rebasin import PermutationSpec, RebasinMerge, SinkhornRebasin, permute
from lit_rebasin.callbacks.merge import merge_task
from lit_rebasin.callbacks.settings import MergeSettings
from lit_rebasin.callbacks.step_loss import StepLoss, draw_batches
from lit_rebasin.merging.path import weights_of
from lit_rebasin.symmetry import invert

from .user_code import make_trainer

SPEC_AXES = {"body.weight": ("h", None), "body.bias": ("h",), "head.weight": (None, "h")}
DEFAULTS = {
    "alpha": 0.7,
    "method": "sinkhorn",
    "cost": "incremental",
    "init": None,
    "options": {"steps": 10},
    "statistics": "reestimate",
    "batches": 3,
    "seed": 11,
}


class Small(pl.LightningModule):
    """Two layers that train, one that is frozen, and a counter."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3, 0.7]))

    def forward(self, x):
        return self.head(self.body(self.frozen(x) + self.shift).relu())

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.log("train_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


SHARED = {"body.weight", "body.bias", "head.weight", "head.bias"}


@pytest.fixture
def scene(tmp_path):
    """A module in its trainer, the weights before and after a task, and a function that merges them."""

    class Scene:
        module = Small()
        data = TensorDataset(torch.randn(60, 4), torch.arange(60) % 3)
        trainer = make_trainer(tmp_path, max_epochs=1)
        spec = PermutationSpec.from_axes(SPEC_AXES, dict(module.named_parameters()))

        def __init__(self):
            self.trainer.fit(self.module, DataLoader(self.data, batch_size=20))
            self.step = StepLoss(self.module, self.trainer.precision_plugin)
            self.batches = list(islice(draw_batches(self.trainer), 3))
            self.trained = {name: tensor.clone() for name, tensor in weights_of(self.module).items()}
            self.trained["count"] = torch.tensor(9)
            self.previous = {
                name: torch.randn_like(tensor) if name in SHARED else tensor.clone()
                for name, tensor in self.trained.items()
            }
            self.previous["count"] = torch.tensor(4)

        def merge(self, shared=SHARED, task=2, fisher=None, **settings):
            settings = {**DEFAULTS, **settings}
            if settings["method"] != "sinkhorn":
                settings["cost"] = settings["options"] = None
            settings["options"] = settings["options"] or {}
            with self.step.quiet():
                return merge_task(
                    self.step,
                    lambda: draw_batches(self.trainer),
                    self.trained,
                    self.previous,
                    self.spec,
                    set(shared),
                    MergeSettings(**settings),
                    task,
                    fisher,
                )

        def loss(self, weights, batches=None):
            """The mean loss, without any of the project's code."""
            losses = [cross_entropy(functional_call(self.module, weights, (x,)), y) for x, y in batches or self.batches]
            return float(torch.stack(losses).mean())

        def at(self, alpha, aligned, residual=None):
            """A point of the path, by the formula."""
            return {
                name: alpha * self.previous[name] + (1 - alpha) * tensor + (residual or {}).get(name, 0)
                if name in SHARED
                else tensor
                for name, tensor in aligned.items()
            }

    torch.manual_seed(0)
    return Scene()


def test_merge_is_the_formula_with_the_residual_added(scene):
    outcome = scene.merge()
    residual = outcome.alignment.residual
    assert set(residual) == SHARED
    assert max(float(delta.abs().max()) for delta in residual.values()) > 1e-5
    aligned = permute(scene.trained, scene.spec, outcome.alignment.permutations)
    for name, tensor in scene.at(0.7, aligned, residual).items():
        torch.testing.assert_close(outcome.weights[name], tensor, rtol=1e-6, atol=1e-7)


def test_what_is_not_shared_is_the_new_models_bit_for_bit(scene):
    outcome = scene.merge(shared=SHARED - {"head.bias"})
    for name in ("frozen.weight", "frozen.bias", "shift", "head.bias", "count"):
        assert torch.equal(outcome.weights[name], scene.trained[name])
    assert outcome.weights["count"].dtype == torch.int64
    assert set(outcome.alignment.residual) == SHARED - {"head.bias"}


@pytest.mark.parametrize("alpha", [0.2, 0.9])
def test_incremental_cost_is_the_loss_of_the_merge_itself(scene, alpha):
    outcome = scene.merge(alpha=alpha)
    assert outcome.alignment.cost == pytest.approx(outcome.numbers["loss_after"], rel=1e-5)
    assert outcome.numbers["loss_after"] == pytest.approx(scene.loss(outcome.weights), rel=1e-5)


def test_incremental_cost_before_a_line_search_is_at_the_midpoint(scene):
    outcome = scene.merge(alpha="line-search")
    aligned = permute(scene.trained, scene.spec, outcome.alignment.permutations)
    midpoint = scene.at(0.5, aligned, outcome.alignment.residual)
    assert outcome.alignment.cost == pytest.approx(scene.loss(midpoint), rel=1e-5)
    chosen = [scene.loss(scene.at(alpha / 20, aligned)) for alpha in range(21)]
    assert outcome.numbers["alpha"] == pytest.approx(chosen.index(min(chosen)) / 20)


def test_residual_learning_rate_of_0_leaves_the_residual_out(scene):
    assert scene.merge(options={"steps": 10, "residual_learning_rate": 0.0}).alignment.residual == {}
    assert scene.merge(cost="midpoint").alignment.residual == {}


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_residual_moves_by_its_own_learning_rate(scene, rate):
    """One step of clipped gradients, of which the largest is cut to 1e-3."""
    residual = scene.merge(options={"steps": 1, "residual_learning_rate": rate}).alignment.residual
    assert max(float(delta.abs().max()) for delta in residual.values()) == pytest.approx(rate * 1e-3)


def test_logits_move_by_the_learning_rate(scene, monkeypatch):
    """AdamW moves a logit by its learning rate a step at the most, and by nearly as much where the gradients are not tiny."""
    seen = []

    class Spied(SinkhornRebasin):
        def plans(self):
            if len(self.logits[0]) == 8:  # the options are tried on smaller networks before
                seen.append(self.logits[0].detach().clone())
            return super().plans()

    monkeypatch.setattr("lit_rebasin.alignment.sinkhorn.SinkhornRebasin", Spied)
    for rate in (0.01, 0.03):
        seen.clear()
        scene.merge(cost="midpoint", options={"steps": 20, "learning_rate": rate})
        step = (seen[1] - seen[0]).abs()
        assert 0.8 * rate < float(step.max()) < 1.1 * rate


def test_sinkhorn_starts_from_weight_matching(scene):
    planted = {"h": torch.randperm(8)}
    scene.trained = permute(scene.previous, scene.spec, planted)
    assert torch.equal(scene.merge(options={"steps": 0}).alignment.permutations["h"], invert(planted)["h"])


def test_steps_go_round_the_batches(scene, monkeypatch):
    seen, at = [], StepLoss.at

    def spy(self, weights, batch):
        if torch.is_grad_enabled():
            seen.append(batch[0])
        return at(self, weights, batch)

    monkeypatch.setattr(StepLoss, "at", spy)
    scene.merge(options={"steps": 5}, batches=2)
    expected = [scene.batches[k % 2][0] for k in range(5)]
    assert len(seen) == 5
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize(("cost", "alpha"), [("midpoint", 0.9), ("random-point", 0.9), ("incremental", 0.9)])
def test_points_of_the_path_that_the_steps_meet(scene, monkeypatch, cost, alpha):
    """The bias of the head is in no group, so it tells where on the path the weights are."""
    seen, at = [], StepLoss.at
    start, end = (float(weights["head.bias"][0]) for weights in (scene.trained, scene.previous))

    def spy(self, weights, batch):
        if torch.is_grad_enabled():
            seen.append((float(weights["head.bias"][0].detach()) - start) / (end - start))
        return at(self, weights, batch)

    monkeypatch.setattr(StepLoss, "at", spy)
    scene.merge(
        cost=cost,
        alpha=alpha,
        options={"steps": 25, **({"residual_learning_rate": 0.0} if cost == "incremental" else {})},
    )
    draws = torch.Generator().manual_seed(11 + 2)  # the seed and the task
    drawn = [float(torch.rand((), generator=draws)) for _ in range(25)]
    expected = {"midpoint": [0.5] * 25, "random-point": drawn, "incremental": [0.9] * 25}[cost]
    assert seen == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("task", [2, 3])
def test_random_point_compares_candidates_at_one_point(scene, task):
    outcome = scene.merge(cost="random-point", task=task)
    point = float(torch.rand((), generator=torch.Generator().manual_seed(11 + task)))
    aligned = permute(scene.trained, scene.spec, outcome.alignment.permutations)
    assert outcome.alignment.cost == pytest.approx(scene.loss(scene.at(point, aligned)), rel=1e-4)


def test_l2_cost_is_over_the_shared_parameters(scene):
    outcome = scene.merge(cost="l2", options={"steps": 3})
    aligned = permute(scene.trained, scene.spec, outcome.alignment.permutations)
    squares = torch.cat([(aligned[name] - scene.previous[name]).flatten() for name in SHARED]).double().square()
    assert outcome.alignment.cost == pytest.approx(float(squares.mean()), rel=1e-5)
    assert outcome.alignment.cost <= float(scene.merge(method="identity").alignment.cost)


@pytest.mark.parametrize("method", ["identity", "weights", "sinkhorn"])
def test_numbers_of_a_merge(scene, method):
    outcome = scene.merge(method=method, cost="midpoint")
    aligned = permute(scene.trained, scene.spec, outcome.alignment.permutations)
    numbers = outcome.numbers
    new, previous = scene.loss(scene.trained), scene.loss(scene.at(1.0, scene.trained))
    merged = scene.loss(scene.at(0.7, aligned))
    assert abs(new - merged) > 0.01
    assert numbers["loss_before"] == pytest.approx(new, rel=1e-5)
    assert numbers["loss_previous"] == pytest.approx(previous, rel=1e-5)
    assert numbers["loss_after"] == pytest.approx(merged, rel=1e-5)
    assert numbers["train_loss_before"] == pytest.approx(new, rel=1e-5)
    assert numbers["train_loss_after"] == pytest.approx(merged, rel=1e-5)
    hits = [(scene.module.eval()(x).argmax(1) == y).float().mean() for x, y in scene.batches]
    assert numbers["train_accuracy_before"] == pytest.approx(float(torch.stack(hits).mean()), rel=1e-5)
    for ends, barrier in ((scene.trained, "barrier_before"), (aligned, "barrier_after")):
        excess = [scene.loss(scene.at(k / 20, ends)) - (k / 20 * previous + (1 - k / 20) * new) for k in range(1, 20)]
        assert numbers[barrier] == pytest.approx(max(excess), abs=1e-4)
    assert numbers["alpha"] == 0.7
    assert numbers["moved"] == sum(p != k for k, p in enumerate(outcome.alignment.permutations["h"].tolist()))
    assert (numbers["moved"] > 0) == (method != "identity")


def test_merge_writes_to_nothing(scene):
    copies = [
        {name: tensor.clone() for name, tensor in weights.items()}
        for weights in (scene.trained, scene.previous, weights_of(scene.module))
    ]
    scene.merge()
    for copy, weights in zip(copies, (scene.trained, scene.previous, weights_of(scene.module)), strict=True):
        assert all(torch.equal(copy[name], tensor) for name, tensor in weights.items())


class Guarded(Dataset):
    """Data that may not be touched while the guard is up."""

    def __init__(self, guard, part):
        self.guard, self.part = guard, part
        self.x, self.y = torch.randn(40, 4), torch.arange(40) % 3

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.guard.reads.append(self.part)
        if self.guard.up and self.part != "train":
            raise AssertionError(f"the merge read the {self.part} data")
        return self.x[index], self.y[index]


class Guard(Callback):
    """Goes up before the callbacks that follow it, and down after them."""

    def __init__(self):
        self.up, self.reads, self.read_within = False, [], []

    def on_train_batch_end(self, *args):
        self.up = True
        self.reads.clear()

    def down(self):
        callback = Callback()

        def on_train_batch_end(*args):
            self.up = False
            self.read_within += self.reads

        callback.on_train_batch_end = on_train_batch_end
        return callback


@pytest.mark.parametrize("alpha", [0.5, "line-search"])
def test_merge_sees_training_data_only(tmp_path, alpha):
    guard = Guard()

    class Data(pl.LightningDataModule):
        epochs_per_task = 1

        def loader(self, part):
            return DataLoader(Guarded(guard, part), batch_size=10)

        train_dataloader = lambda self: self.loader("train")  # noqa: E731
        val_dataloader = lambda self: [self.loader("validation"), self.loader("validation")]  # noqa: E731
        test_dataloader = lambda self: self.loader("test")  # noqa: E731
        predict_dataloader = lambda self: self.loader("prediction")  # noqa: E731

    class Validated(Small):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    merge = RebasinMerge(alpha=alpha, method="sinkhorn", options={"steps": 3}, batches=2)
    module = Validated()
    module.frozen = nn.Identity()
    make_trainer(tmp_path, guard, merge, guard.down(), max_epochs=3).fit(module, datamodule=Data())
    assert len(merge.history) == 2
    assert set(guard.read_within) == {"train"}
    assert "validation" in guard.reads  # the guard was down by then


def test_merge_takes_the_first_batches_of_a_fresh_pass(scene):
    outcome = scene.merge(method="identity", batches=2)
    fresh = islice(DataLoader(scene.data, batch_size=20), 2)
    assert len(outcome.batches) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(outcome.batches, fresh, strict=True))
