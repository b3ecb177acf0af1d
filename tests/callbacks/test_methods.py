"""Every method, alpha and correction by name, against the functions for plain modules."""

from typing import get_args

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lit_rebasin import (
    LinearPath,
    RebasinMerge,
    Schedule,
    align,
    permutation_spec,
    permute,
)
from lit_rebasin.alignment import METHODS
from lit_rebasin.callbacks.settings import Method

from .plain import Held, Plain, X, batches, merged, tensors
from .user_code import UserModule, loader, make_trainer


def options(method):
    return {"steps": 6} if METHODS[method][1] == "labels" else {}


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
