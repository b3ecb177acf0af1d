"""Every method, alpha and correction by name, against the functions for plain modules."""

import copy
from typing import get_args

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import (
    LinearPath,
    RebasinMerge,
    Schedule,
    align,
    fisher_alpha,
    layer_fisher_alphas,
    permutation_spec,
    permute,
    reestimate_batch_norm,
    repair,
    reset_batch_norm,
)
from lit_rebasin.alignment import METHODS
from lit_rebasin.callbacks.settings import STATISTICS, Method

from .user_code import UserModule, loader, make_trainer

X = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, :3].argmax(1), X[:, 3:].argmax(1)])


class Net(nn.Sequential):
    def __init__(self, norm=False):
        super().__init__(
            nn.Linear(6, 14),
            nn.BatchNorm1d(14) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Linear(14, 11),
            nn.ReLU(),
            nn.Linear(11, 3),
        )


class Plain(pl.LightningModule):
    def __init__(self, norm=False):
        super().__init__()
        self.net = Net(norm)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Held(Callback):
    """Keeps copies of the network as it was trained, and of the one before it; every task begins with fresh weights."""

    def on_train_start(self, trainer, module):
        self.previous = copy.deepcopy(module.net).eval()
        for layer in module.net:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def on_train_batch_end(self, trainer, module, *args):
        self.trained = copy.deepcopy(module.net).eval()


def batches(task):
    return DataLoader(TensorDataset(X, Y[task % 2]), batch_size=30)


def merged(tmp_path, merge, tasks=2, norm=False):
    """Train and merge; returns the module, and what the last merge began with."""
    torch.manual_seed(0)
    module, held = Plain(norm), Held()
    for task in range(tasks):
        make_trainer(tmp_path, held, merge, max_epochs=5).fit(module, batches(task))
    module.net.eval()
    return module, held


def options(method):
    return {"steps": 6} if METHODS[method][1] == "labels" else {}


def tensors(network):
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_does_what_align_does(tmp_path, method, norm):
    cost = {"cost": "midpoint"} if METHODS[method][1] == "labels" else {}
    merge = RebasinMerge(0.3, method, options=options(method), statistics="none", seed=3, **cost)
    module, held = merged(tmp_path, merge, norm=norm)
    spec = permutation_spec(held.trained, X[:30])
    expected = align(
        held.trained,
        held.previous,
        method=method,
        spec=spec,
        data=list(batches(1)),
        seed=4,  # the seed and the task
        **cost,
        **options(method),
        **({"sharpness": 8.0, "noise": 0.0, "learning_rate": 0.1} if method == "sinkhorn" else {}),
    )
    assert (expected.moved > 0) == (method != "identity")
    assert merge.history[0]["moved"] == expected.moved
    path = LinearPath(held.previous, permute(held.trained, spec, expected.permutations))
    for name, tensor in path.at(0.3).items():
        torch.testing.assert_close(tensors(module.net)[name], tensor)


def test_methods_are_those_of_align():
    assert set(get_args(Method)) == set(METHODS)


@pytest.mark.parametrize("init", ["identity", "covariance", "frank-wolfe"])
def test_start_by_name(tmp_path, init):
    merge = RebasinMerge(0.5, "sinkhorn", "midpoint", init, {"steps": 0})
    _, held = merged(tmp_path, merge)
    start = align(held.trained, held.previous, method=init, data=list(batches(1)), seed=1)
    assert merge.history[0]["moved"] == start.moved


def test_schedule_from_yaml(tmp_path):
    found = []
    for schedule in ({"beta_0": 1.0, "kappa": 0.1}, Schedule(1.0, 0.1), {"beta_0": 30.0, "kappa": 0.1}):
        merge = RebasinMerge(0.5, "sinkhorn", options={"steps": 8, "learning_rate": 2.0, "schedule": schedule})
        found.append(tensors(merged(tmp_path, merge)[0].net)["3.weight"].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def fisher(network, task):
    """The mean over examples of squared gradients, one example at a time."""
    totals = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for x, y in zip(X, Y[task], strict=True):
        gradients = torch.autograd.grad(cross_entropy(network(x[None]), y[None]), list(network.parameters()))
        for total, gradient in zip(totals.values(), gradients, strict=True):
            total += gradient.square() / len(X)
    return totals


@pytest.mark.parametrize("norm", [False, True])
def test_fisher_alpha_of_the_second_task_is_the_closed_form(tmp_path, norm):
    module, held = merged(tmp_path, RebasinMerge("fisher"), tasks=1, norm=norm)
    previous = fisher(held.trained, 0)
    merge = RebasinMerge("fisher", seed=0)
    module, held = merged(tmp_path, merge, norm=norm)
    spec = permutation_spec(held.trained, X[:30])
    alignment = align(held.trained, held.previous, spec=spec, seed=1)
    measured = fisher(held.trained, 1)
    both = permute({**tensors(held.trained), **measured}, spec, alignment.permutations)
    new = {name: both[name] for name in measured}
    moved = permute(held.trained, spec, alignment.permutations)
    path = LinearPath(held.previous, moved)
    assert merge.history[0]["alpha"] == pytest.approx(fisher_alpha(path, previous, new), rel=1e-4)
    assert 0 < merge.history[0]["alpha"] < 1
    for name, diagonal in merge.state_dict()["fisher"].items():
        torch.testing.assert_close(diagonal, (previous[name[4:]] + new[name[4:]]) / 2, rtol=1e-3, atol=1e-9)

    merge = RebasinMerge("layer-fisher", statistics="none")
    module, _ = merged(tmp_path, merge, norm=norm)
    alphas = layer_fisher_alphas(path, previous, new)
    assert len(set(alphas.values())) == 3 + norm
    for name, tensor in path.at(alphas).items():
        torch.testing.assert_close(tensors(module.net)[name], tensor, rtol=1e-3, atol=1e-5)
    entries = {name: p.numel() for name, p in module.net.named_parameters()}
    mean = sum(alphas[name] * n for name, n in entries.items()) / sum(entries.values())
    assert merge.history[0]["alpha"] == pytest.approx(mean, rel=1e-4)


def test_fisher_information_is_the_mean_over_the_tasks_and_goes_on_in_a_checkpoint(tmp_path):
    whole = RebasinMerge("fisher", "identity")  # nothing moves, so the Fisher information stays where it is
    torch.manual_seed(0)
    module, held, measured = Plain(), Held(), []
    for task in range(3):
        make_trainer(tmp_path, held, whole, max_epochs=5).fit(module, batches(task))
        measured.append(fisher(held.trained, task % 2))
    for name, diagonal in whole.state_dict()["fisher"].items():
        mean = torch.stack([one[name[4:]] for one in measured]).mean(0)
        torch.testing.assert_close(diagonal, mean, rtol=1e-3, atol=1e-9)
    torch.manual_seed(0)
    module, half = Plain(), RebasinMerge("fisher", "identity")
    for task in range(3):
        state, half = half.state_dict(), RebasinMerge("fisher", "identity")
        half.load_state_dict(state)
        make_trainer(tmp_path, Held(), half, max_epochs=5).fit(module, batches(task))
    assert half.history[-1]["alpha"] == pytest.approx(whole.history[-1]["alpha"])


def test_fisher_information_that_a_state_lacks(tmp_path):
    merge = RebasinMerge(0.5)
    module, _ = merged(tmp_path, merge, tasks=1)
    other = RebasinMerge("fisher")
    other.load_state_dict(merge.state_dict())
    with pytest.raises(
        MisconfigurationException, match="Fisher information of the tasks so far, which this state lacks"
    ):
        make_trainer(tmp_path, other).fit(module, batches(1))


def test_fisher_information_of_batches_without_examples(tmp_path):
    class Joined(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step((torch.cat([batch[0], batch[0]]), torch.cat([batch[1], batch[1]])), batch_idx)

    def collate(items):
        return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items][:1] * len(items)), torch.zeros(3)

    data = DataLoader(TensorDataset(X, Y[0]), batch_size=30, collate_fn=collate)
    with pytest.raises(MisconfigurationException, match=r"\[3, 30\] entries along their first dimension"):
        make_trainer(tmp_path, RebasinMerge("fisher"), max_epochs=1).fit(Joined(), data)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_statistics_of_a_merge(tmp_path, statistics):
    merge = RebasinMerge(0.4, statistics=statistics)
    module, held = merged(tmp_path, merge, norm=True)
    spec = permutation_spec(held.trained, X[:30])
    found = align(held.trained, held.previous, spec=spec, seed=1)
    path = LinearPath(held.previous, permute(held.trained, spec, found.permutations))
    expected, data = path.module_at(0.4).eval(), [x for x, _ in batches(1)]
    if statistics == "reestimate":
        expected[1].train()
        reestimate_batch_norm(expected, expected, data)
    elif statistics == "data-free":
        assert reset_batch_norm(expected, path, 0.4, expected, data[0]) == ["1"]
    elif statistics != "none":
        assert repair(expected, path, 0.4, expected, data, mean=statistics == "repair") == ["3"]
    for name, tensor in tensors(expected).items():
        torch.testing.assert_close(tensors(module.net)[name], tensor, rtol=1e-4, atol=1e-5)
    expected[1].train()
    losses = [cross_entropy(expected(x), y) for x, y in batches(1)]
    assert merge.history[0]["loss_after"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert merge.history[0]["train_loss_after"] == pytest.approx(merge.history[0]["loss_after"])


def test_repair_leaves_frozen_layers_and_new_heads_alone(tmp_path):
    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.net[3].requires_grad_(False)

    module, merge = Frozen(), RebasinMerge(0.5, "identity", statistics="repair")
    for task in range(2):
        before = copy.deepcopy(module.net[3])
        make_trainer(tmp_path, merge, max_epochs=3).fit(module, batches(task))
    assert torch.equal(module.net[3].weight, before.weight)
    assert torch.equal(module.net[3].bias, before.bias)


@pytest.mark.parametrize("method", ["covariance", "activations"])
def test_features_of_steps_that_call_networks_in_their_own_way(tmp_path, method):
    """Batches by name with a word in them, two calls, dropout, metrics: what is read is read from the graph."""

    class Odd(UserModule):
        def training_step(self, batch, batch_idx):
            assert batch["name"] == "digits"
            x, y = batch["pair"]
            return super().training_step((x, y), batch_idx) + self.net(x.flip(0)).square().mean()

    class Named(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            x, y = list(loader(shuffle=False))[index]
            return {"name": "digits", "pair": (x, y)}

    module, merge = Odd(), RebasinMerge(0.5, method)
    data = DataLoader(Named(), batch_size=None)
    torch.manual_seed(0)
    for _ in range(2):
        make_trainer(tmp_path, merge, max_epochs=4).fit(module, data)
        for layer in (module.net[1], module.net[5], module.net[7]):
            layer.reset_parameters()
    assert merge.history[0]["moved"] > 0
    assert merge.history[0]["barrier_after"] < merge.history[0]["barrier_before"]


@pytest.mark.parametrize("arguments", [{"method": "covariance"}, {"method": "sinkhorn", "init": "activations"}])
def test_steps_without_a_graph_are_refused_before_they_train(tmp_path, arguments):
    class Branching(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (2 if float(batch[0].sum()) > 0 else 1)

    module = Branching()
    with pytest.raises(MisconfigurationException, match="whose graph cannot be had: choose another method"):
        make_trainer(tmp_path, RebasinMerge(**arguments)).fit(module, batches(0))


def test_mixed_precision(tmp_path):
    module, merge = Plain(), RebasinMerge("fisher", "covariance", statistics="repair")
    for task in range(2):
        make_trainer(tmp_path, merge, max_epochs=2, precision="bf16-mixed").fit(module, batches(task))
    assert 0 < merge.history[0]["alpha"] < 1


def test_tied_weights(tmp_path):
    class Tied(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 14), nn.Tanh(), nn.Linear(14, 14), nn.Tanh(), nn.Linear(14, 3))
            self.again = nn.Linear(14, 14)
            self.again.weight = self.net[2].weight

        def training_step(self, batch, batch_idx):
            hidden = self.net[:4](batch[0])
            loss = cross_entropy(self.net[4](hidden + self.again(hidden).tanh()), batch[1])
            self.log("train_loss", loss)
            return loss

    for method in ("weights", "covariance", "activations", "frank-wolfe"):
        torch.manual_seed(0)
        module, merge = Tied(), RebasinMerge(0.5, method)
        for task in range(2):
            make_trainer(tmp_path, Held(), merge, max_epochs=3).fit(module, batches(task))
        assert merge.history[0]["moved"] > 0
        assert module.again.weight is module.net[2].weight


def test_tied_embedding_and_output(tmp_path):
    class Words(Plain):
        def __init__(self):
            super().__init__()
            self.embedding, self.mixer, self.output = nn.Embedding(7, 12), nn.Linear(12, 12), nn.Linear(12, 7)
            self.output.weight = self.embedding.weight
            self.net = nn.ModuleList([self.mixer])  # given fresh weights by the callback before every task

        def training_step(self, batch, batch_idx):
            tokens = batch[1]
            return cross_entropy(self.output(self.mixer(self.embedding(tokens)).tanh()), (tokens + 1) % 7)

    for method in ("weights", "covariance", "activations", "frank-wolfe", "sinkhorn"):
        torch.manual_seed(0)
        module, merge = Words(), RebasinMerge(0.5, method, options={"steps": 3} if method == "sinkhorn" else None)
        for task in range(2):
            make_trainer(tmp_path, Held(), merge, max_epochs=2).fit(module, batches(task))
        assert len(merge.history) == 1
        assert module.output.weight is module.embedding.weight


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("method", ["weights", "covariance", "sinkhorn", "straight-through"])
def test_true_half_and_double_precision(tmp_path, precision, method):
    options = {"steps": 2} if METHODS[method][1] == "labels" else {}
    module, merge = Plain(), RebasinMerge(0.5, method, options=options)
    module.configure_optimizers = lambda: torch.optim.SGD(
        module.parameters(), lr=0.05
    )  # float16 is too coarse for Adam
    for task in range(2):
        make_trainer(tmp_path, Held(), merge, max_epochs=2, precision=precision).fit(module, batches(task))
    assert merge.history[0]["moved"] > 0
    assert {p.dtype for p in module.parameters()} == {
        {"b": torch.bfloat16, "1": torch.float16, "6": torch.float64}[precision[0]]
    }


def test_batch_norm_that_is_held_keeps_its_statistics(tmp_path):
    class HeldNorm(Plain):
        def on_train_epoch_start(self):
            self.net[1].eval()

    for statistics in STATISTICS:
        torch.manual_seed(0)
        module, merge = HeldNorm(norm=True), RebasinMerge(0.5, statistics=statistics)
        for task in range(2):
            make_trainer(tmp_path, Held(), merge, max_epochs=2).fit(module, batches(task))
        if statistics != "data-free":
            assert module.net[1].running_mean.abs().max() == 0


def test_heads_are_averaged_out_where_they_hide_what_is_inside(tmp_path):
    """The callback finds planted heads and features by their activations, which takes reading them averaged."""

    class Attending(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
            self.head = nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            x = batch[0][:, None, :].repeat(1, 3, 2)[..., :8] + torch.arange(3.0)[None, :, None]
            loss = cross_entropy(self.head(self.attention(x, x, x)[0].mean(1)), batch[1])
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Planted(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if merge.previous is not None and merge.n_tasks == 1 and trainer.is_last_batch:
                held = {**merge.previous}
                planted = merge.spec.random(generator=torch.Generator().manual_seed(1))
                moved = permute(held, merge.spec, planted)
                with torch.no_grad():
                    for name, parameter in module.named_parameters():
                        parameter.copy_(moved[name])

    torch.manual_seed(0)
    module, merge = Attending(), RebasinMerge(0.5, "activations")
    for task in range(2):
        make_trainer(tmp_path, Planted(), merge, max_epochs=1).fit(module, batches(task))
    assert merge.history[0]["barrier_before"] > 1e-4
    assert merge.history[0]["barrier_after"] < 1e-6


@pytest.mark.filterwarnings("ignore:.*is refused:UserWarning")
def test_a_merge_that_its_correction_breaks_is_refused(tmp_path, monkeypatch):
    def broken(merged, *args, **kwargs):
        with torch.no_grad():
            merged.net[0].weight.fill_(float("nan"))
        return []

    monkeypatch.setattr("lit_rebasin.callbacks.correction.repair", broken)
    module, held = merged(tmp_path, merge := RebasinMerge(0.5, statistics="repair"))
    assert "refused" in merge.history[0]
    for name, tensor in tensors(held.previous).items():
        assert torch.equal(tensors(module.net)[name], tensor)


def test_a_loss_without_gradients_on_single_examples_has_no_fisher_information(tmp_path):
    class Contrast(Plain):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]) @ self.net(batch[0]).T, torch.arange(len(batch[0])))

    with pytest.raises(MisconfigurationException, match="no gradient on single examples"):
        make_trainer(tmp_path, RebasinMerge("fisher")).fit(Contrast(), batches(0))


def test_data_free_statistics_need_a_batch_norm(tmp_path):
    with pytest.raises(MisconfigurationException, match="is for BatchNorm, of which Plain has none"):
        make_trainer(tmp_path, RebasinMerge(statistics="data-free")).fit(Plain(), batches(0))


def test_state_of_a_version_without_fisher_information(tmp_path):
    merge = RebasinMerge()
    merged(tmp_path, merge, tasks=1)
    state = {name: value for name, value in merge.state_dict().items() if not name.startswith("fisher")}
    RebasinMerge().load_state_dict(state)
