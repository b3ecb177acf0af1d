import copy
from dataclasses import replace

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.models import SimpleMLP
from avalanche.training.plugins import AGEMPlugin, ReplayPlugin
from torch import nn

from lit_rebasin.cli.methods import METHODS
from lit_rebasin.continual import ContinualClassifier, ContinualDataModule
from lit_rebasin.continual.baselines import BASELINES, check_options, run_baseline
from lit_rebasin.metrics import average_accuracy, forgetting


def stream(benchmark="rotated-digits", **options):
    options = {"n_tasks": 3, "epochs_per_task": 3, "batch_size": 64, "replay_per_class": 3, **options}
    return ContinualDataModule(benchmark, **options)


def network(data, seed=0):
    torch.manual_seed(seed)
    size = data.input_shape[0] * data.input_shape[1] * data.input_shape[2]
    if data.n_heads == 1:
        backbone = SimpleMLP(num_classes=data.n_classes, input_size=size, hidden_size=64, drop_rate=0)
        return ContinualClassifier(backbone, n_classes=data.n_classes)
    body = nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.ReLU())
    return ContinualClassifier(body, n_classes=data.n_classes, n_features=64, n_heads=data.n_heads)


@pytest.fixture(scope="module")
def matrices():
    found = {}
    for name in BASELINES:
        data = stream()
        model = network(data)
        found[name] = run_baseline(name, model, data)
    return found


def test_the_command_line_knows_the_same():
    assert {name for name, method in METHODS.items() if method.baseline} == set(BASELINES)


def test_every_strategy_learns_and_is_measured(matrices):
    for name, matrix in matrices.items():
        assert matrix.shape == (3, 3)
        assert matrix[-1].isfinite().all()
        if name == "joint":
            assert matrix[:-1].isnan().all()
            assert average_accuracy(matrix) > 0.8
        else:
            assert matrix.diagonal().min() > 0.5, name


def test_what_is_kept_is_remembered(matrices):
    lost = {name: forgetting(matrix) for name, matrix in matrices.items() if name != "joint"}
    for name in ("replay", "der", "er-ace", "cumulative"):
        assert lost[name] < lost["finetune"], name
    assert lost["cumulative"] == min(lost.values())


def test_the_same_seed_gives_the_same_matrix(matrices):
    data = stream()
    torch.testing.assert_close(run_baseline("finetune", network(data), data), matrices["finetune"], rtol=0, atol=0)


def test_the_network_is_trained_in_place_and_evaluated_as_it_is():
    data = stream(n_tasks=2, epochs_per_task=1)
    model = network(data)
    before = copy.deepcopy(model)
    matrix = run_baseline("finetune", model, data)
    assert not torch.equal(model.backbone.features[0].weight, before.backbone.features[0].weight)
    x, y = data.stream.test(1)
    with torch.no_grad():
        assert float((model(x).argmax(1) == y).double().mean()) == pytest.approx(float(matrix[1, 1]))


def test_der_knows_one_head(tmp_path):
    data = stream()
    data.stream = replace(data.stream, scenario="task")
    with pytest.raises(ValueError, match="'der' knows no network with a head a task"):
        run_baseline("der", network(data), data)


@pytest.mark.parametrize("name", ["agem", "replay", "der", "er-ace"])
def test_replay_needs_kept_examples(name):
    data = stream(replay_per_class=0)
    with pytest.raises(ValueError, match=rf"'{name}' replays examples, .* pass replay_per_class=1 or more"):
        run_baseline(name, network(data), data)


@pytest.mark.parametrize("name", ["joint", "cumulative"])
def test_a_head_a_task_needs_batches_that_hold_all_tasks(name):
    data = stream(batch_size=2)
    data.stream = replace(data.stream, scenario="task")
    with pytest.raises(ValueError, match=rf"batch_size=2 is too small for '{name}'.* all 3 tasks .* pass 3 or more"):
        run_baseline(name, network(data), data)


@pytest.mark.parametrize("name", ["finetune", "ewc", "lwf", "agem", "replay", "er-ace", "cumulative", "joint"])
def test_a_head_a_task(name, tmp_path):
    import numpy as np

    generator = np.random.default_rng(0)
    y = np.arange(240) % 6
    x = generator.normal(size=(240, 8, 8)).astype(np.float32) + y[:, None, None]
    np.savez(tmp_path / "data.npz", x_train=x[:180], y_train=y[:180], x_test=x[180:], y_test=y[180:])
    data = stream("arrays", data_dir=str(tmp_path / "data.npz"), scenario="task", batch_size=6)
    matrix = run_baseline(name, network(data), data)
    learned = matrix[-1] if name == "joint" else matrix.diagonal()
    assert learned.min() > 0.6


def test_only_the_first_tasks_and_held_back_data():
    data = stream(validation_fraction=0.25)
    seen = []
    matrix = run_baseline(
        "finetune", network(data), data, n_tasks=2, on_task=lambda m, task: seen.append((m.clone(), task))
    )
    assert matrix.shape == (2, 2)
    assert [task for _, task in seen] == [0, 1]
    assert seen[0][0][1].isnan().all()
    sizes = {len(batch[1]) for loader in data.val_dataloader() for batch in loader}
    assert sizes == {round(0.25 * len(data.stream.train_labels(0)))}


def made(monkeypatch, name, **options):
    """Return the strategy that a run makes, after the run, and the optimizer states that its tasks begin with."""
    seen, begun = [], []
    build = BASELINES[name]

    def spied(memory, **arguments):
        class Watch(SupervisedPlugin):
            def before_training_exp(self, strategy, **kwargs):
                begun.append(len(strategy.optimizer.state))

        strategy = build(memory, **{**arguments, "plugins": [*arguments["plugins"], Watch()]})
        seen.append(strategy)
        return strategy

    monkeypatch.setitem(BASELINES, name, spied)
    data = stream(**options)
    run_baseline(name, network(data), data)
    return seen[0], begun


def test_the_same_conditions_as_ours(monkeypatch):
    for name in BASELINES:
        strategy, begun = made(monkeypatch, name, batch_size=32, epochs_per_task=2)
        assert (strategy.train_mb_size, strategy.train_epochs) == (32, 2), name
        assert set(begun) == {0}, f"{name} goes on with the optimizer's moments"
        assert isinstance(strategy.optimizer, torch.optim.AdamW)


def test_memories_are_as_large_as_ours(monkeypatch):
    data = stream()
    ours = len(data.kept_examples(3)[1])
    assert ours == 3 * 10 * 3
    replay, _ = made(monkeypatch, "replay")
    (plugin,) = [one for one in replay.plugins if isinstance(one, ReplayPlugin)]
    kept = plugin.storage_policy.buffer
    assert len(kept) == ours
    for group in plugin.storage_policy.buffer_groups.values():
        assert torch.tensor([int(y) for y in group.buffer.targets]).bincount(minlength=10).tolist() == [3] * 10
    for name in ("der", "er-ace"):
        strategy, _ = made(monkeypatch, name)
        assert len(strategy.storage_policy.buffer) == ours, name
    agem, _ = made(monkeypatch, "agem")
    (plugin,) = [one for one in agem.plugins if isinstance(one, AGEMPlugin)]
    assert [len(buffer) for buffer in plugin.buffers] == [30, 30, 30]


def test_a_step_sees_as_many_kept_examples_as_new_ones(monkeypatch):
    for name in ("der", "er-ace"):
        strategy, _ = made(monkeypatch, name, batch_size=20)
        assert strategy.batch_size_mem == 20, name
        strategy, _ = made(monkeypatch, name, batch_size=500)
        assert strategy.batch_size_mem == 90, f"{name} has 90 in all"
    for batch_size, count in ((20, 64), (100, 100)):
        agem, _ = made(monkeypatch, "agem", batch_size=batch_size)
        (plugin,) = [one for one in agem.plugins if isinstance(one, AGEMPlugin)]
        assert plugin.sample_size == count


def test_dropout_is_off_when_accuracies_are_measured():
    data = stream(n_tasks=2)
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.9), nn.Linear(32, 10))
    model = ContinualClassifier(body)
    matrix = run_baseline("finetune", model, data)
    model.eval()
    with torch.no_grad():
        right = [torch.cat([model(x).argmax(1) == y for x, y, _ in loader]) for loader in data.val_dataloader()]
    assert matrix[1].tolist() == pytest.approx([float(one.double().mean()) for one in right])


def test_agem_with_batches_smaller_than_the_number_of_tasks():
    data = stream(n_tasks=6, epochs_per_task=1, batch_size=4)
    assert run_baseline("agem", network(data), data).shape == (6, 6)


def test_epochs_are_reported():
    epochs = []
    data = stream(n_tasks=2)
    run_baseline("replay", network(data), data, on_epoch=epochs.append)
    assert epochs == [0, 0, 0, 1, 1, 1]


def test_options_reach_the_strategy():
    data = stream(n_tasks=2)
    free = run_baseline("ewc", network(data), data, options={"ewc_lambda": 0.0})
    held = run_baseline("ewc", network(data), data, options={"ewc_lambda": 1e6})
    assert held[1, 1] < free[1, 1] - 0.05
    assert held[1, 0] > free[1, 0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magic", {}, "no baseline 'magic'; choose from finetune"),
        ("ewc", {"lamda": 1}, "strategy for 'ewc' does not take these options"),
        ("finetune", {"train_epochs": 1}, "'train_epochs' of 'finetune' is set by the stream"),
        ("replay", {"criterion": 1}, "'criterion' of 'replay' is set by the stream"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(name, options)


@pytest.mark.parametrize("name", ["replay", "er-ace"])
def test_a_buffer_says_nothing_that_its_user_cannot_change(name, recwarn):
    data = stream(n_tasks=2, epochs_per_task=1)
    run_baseline(name, network(data), data)
    assert not [warning for warning in recwarn if "deprecated function update" in str(warning.message)]
