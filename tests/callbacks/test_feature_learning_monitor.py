"""Feature learning against the feature speed formula."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import (
    ConnectivityMonitor,
    FeatureLearningMonitor,
)

from .monitored import Plain, X, Y, fit, whole
from .user_code import UserModule, Walk, make_trainer


def test_feature_speed_formula_holds_for_a_small_step(tmp_path):
    """cos * |df| * |b| is what the layers up to it take off the loss: the sum of rate * |gradient|^2 (Chizat and Netrapalli, theorem 2.1)."""
    rate = 1e-4
    module, monitor = Plain(rate).double(), FeatureLearningMonitor(examples=60)
    network = nn.Sequential(copy.deepcopy(module.net), copy.deepcopy(module.head))
    cross_entropy(network(X.double()), Y).backward()
    loaders = DataLoader(TensorDataset(X.double(), Y), batch_size=60)
    fit(tmp_path, monitor, module, loaders, max_epochs=1, precision="64-true")
    decay, found = 0.0, monitor.history[0]
    for name, layer in (
        ("net.0", network[0][0]),
        ("net.2", network[0][2]),
        ("net.4", network[0][4]),
        ("head", network[1]),
    ):
        decay += rate * sum(float(p.grad.square().sum()) for p in layer.parameters())
        speed, cosine, forward, backward = (
            found[f"feature_learning/{one}/{name}"] for one in ("speed", "cosine", "forward", "backward")
        )
        entries = 60 * layer.out_features
        assert cosine * speed * forward * backward * entries == pytest.approx(decay, rel=1e-3)
        assert 0 < cosine <= 1 + 1e-9


def test_feature_learning_sees_the_step_itself(tmp_path):
    """With momentum, weight decay and gradients that are accumulated, what counts is where the optimizer goes."""
    module, monitor = Plain(), FeatureLearningMonitor(examples=60)
    before = copy.deepcopy(module)
    fit(
        tmp_path,
        monitor,
        module,
        DataLoader(TensorDataset(X, Y), batch_size=20),
        max_epochs=1,
        accumulate_grad_batches=3,
    )
    with torch.no_grad():
        features = [net.net[0](X) for net in (before, module)]
    speed = float((features[1] - features[0]).norm() / features[0].norm())
    assert monitor.history[0]["feature_learning/speed/net.0"] == pytest.approx(speed, rel=1e-4)


def test_a_layer_that_stands_still_is_named(tmp_path):
    class Still(Plain):
        def configure_optimizers(self):
            slow = [{"params": self.net[0].parameters(), "lr": 0.0}]
            rest = [p for name, p in self.named_parameters() if not name.startswith("net.0.")]
            return torch.optim.SGD([*slow, {"params": rest, "lr": 0.1}], lr=0.1)

    monitor = FeatureLearningMonitor()
    with pytest.warns(UserWarning, match=r"Layer net\.0 stands still: .*suggest_scales") as caught:
        fit(tmp_path, monitor, Still(), max_epochs=3)
    assert sum("stands still" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stands still.*")
        fit(tmp_path, FeatureLearningMonitor(), Plain())


def test_a_network_without_layers_is_trained_all_the_same(tmp_path):
    class Bare(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 6))

        def training_step(self, batch, batch_idx):
            return cross_entropy(batch[0] @ self.weight.T, batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="could not measure task 0: training_step calls no linear, conv"):
        assert fit(tmp_path, FeatureLearningMonitor(), Bare()).current_epoch == 2
    monitor = ConnectivityMonitor(reference=Bare())
    fit(tmp_path, monitor, Bare())
    assert "connectivity_reference/barrier" in monitor.history[0]


def test_a_slow_layer_is_not_a_still_one_and_a_still_one_has_its_reason(tmp_path):
    class Rates(Plain):
        def __init__(self, rate_of_first, detached=False):
            super().__init__()
            self.rate_of_first, self.detached = rate_of_first, detached

        def training_step(self, batch, batch_idx):
            if not self.detached:
                return super().training_step(batch, batch_idx)
            return cross_entropy(self.head(self.net(batch[0]).detach()), batch[1])

        def configure_optimizers(self):
            rest = [p for name, p in self.named_parameters() if not name.startswith("net.0.")]
            groups = [{"params": self.net[0].parameters(), "lr": self.rate_of_first}, {"params": rest}]
            return torch.optim.SGD(groups, lr=0.1)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stands still.*")
        fit(tmp_path, FeatureLearningMonitor(), Rates(0.01))
    with pytest.warns(UserWarning, match=r"Layer net\.0 stands still: .*the gradient that comes back to it is \d"):
        fit(tmp_path, FeatureLearningMonitor(), Rates(0.0))
    with pytest.warns(UserWarning, match="stands still") as caught:  # three of four layers
        fit(tmp_path, FeatureLearningMonitor(), Rates(0.1, detached=True))
    texts = [str(warning.message) for warning in caught if "stands still" in str(warning.message)]
    assert sorted(text.split()[1] for text in texts) == ["net.0", "net.2", "net.4"]
    assert all("no gradient comes back to it" in text for text in texts)


def test_layers_over_sequences_have_rows(tmp_path):
    class Reads(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.GRU(2, 5)
            self.attention = nn.MultiheadAttention(5, 1)

        def training_step(self, batch, batch_idx):
            hidden, _ = self.net(batch[0].view(-1, 3, 2).transpose(0, 1))
            mixed, _ = self.attention(hidden, hidden, hidden)
            return cross_entropy(self.head(mixed.mean(0)), batch[1])

    module, monitor = Reads(), FeatureLearningMonitor(examples=60)
    before = copy.deepcopy(module)
    fit(tmp_path, monitor, module, max_epochs=1)
    with torch.no_grad():
        features = [one.net(X.view(-1, 3, 2).transpose(0, 1))[0] for one in (before, module)]
    found = monitor.history[0]
    expected = float((features[1] - features[0]).norm() / features[0].norm())
    assert found["feature_learning/speed/net"] == pytest.approx(expected, rel=1e-4)
    assert found["feature_learning/speed/attention"] > 0
    assert found["feature_learning/backward/attention"] > 0


def epochs_drawn(monitor):
    """Where the picture has a task begin, and where it has measurements."""
    lines = monitor._figures()["feature_learning/speed"]().axes[0].lines
    vertical = [line for line in lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
    return [line.get_xdata()[0] for line in vertical], lines[-1].get_xdata().tolist()


def test_epochs_are_counted_through_fits_that_are_a_task_each(tmp_path):
    monitor, module = FeatureLearningMonitor(every_n_epochs=2), Plain()
    for epochs in (3, 5, 1, 2):
        fit(tmp_path, monitor, module, max_epochs=epochs)
    assert epochs_drawn(monitor) == ([3, 8, 9], [0, 2, 3, 5, 7, 8, 9])
    assert [entry["epoch"] for entry in monitor.history] == [0, 2, 0, 2, 4, 0, 0]


def test_epochs_are_counted_through_a_fit_that_walks_a_stream(tmp_path):
    monitor = FeatureLearningMonitor()
    trainer = make_trainer(tmp_path, monitor, max_epochs=4, reload_dataloaders_every_n_epochs=1)
    trainer.fit(UserModule(), datamodule=Walk())
    assert epochs_drawn(monitor) == ([2], [0, 1, 2, 3])


def test_epochs_are_counted_through_a_resumed_fit(tmp_path):
    monitor, module = FeatureLearningMonitor(), Plain()
    fit(tmp_path, monitor, module, max_epochs=2)

    class Saver(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer = make_trainer(tmp_path, monitor, Saver(), max_epochs=3)
    trainer.fit(module, whole())
    resumed = FeatureLearningMonitor()
    make_trainer(tmp_path, resumed, max_epochs=3).fit(Plain(), whole(), ckpt_path=tmp_path / "half.ckpt")
    fit(tmp_path, resumed, Plain(), max_epochs=1)
    assert epochs_drawn(resumed) == ([2, 5], [0, 1, 2, 3, 4, 5])


def test_a_dead_layer_is_named_though_weight_decay_moves_it(tmp_path):
    class Dead(Plain):
        def __init__(self):
            super().__init__()
            self.net[1] = nn.ReLU()
            nn.init.constant_(self.net[0].bias, -100.0)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)

    monitor = FeatureLearningMonitor()
    with pytest.warns(UserWarning, match=r"Layer net\.0 stands still: .*no gradient comes back to it"):
        fit(tmp_path, monitor, Dead(), max_epochs=1)
    assert monitor.history[0]["feature_learning/speed/net.0"] > 1e-3


def test_mixed_precision_rounds_no_small_change_away(tmp_path):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        monitor = FeatureLearningMonitor(examples=60)
        fit(tmp_path, monitor, Plain(rate=1e-3), max_epochs=1, precision=precision)
        found.append(monitor.history[0])
    for name in ("speed", "cosine"):
        for layer in ("net.0", "net.2", "net.4", "head"):
            exact, mixed = (one[f"feature_learning/{name}/{layer}"] for one in found)
            assert mixed == pytest.approx(exact, rel=0.05), (name, layer)
