import copy
import random

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import (
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    as_classification_dataset,
)
from avalanche.benchmarks.utils.data_attribute import TaskLabels
from avalanche.core import SupervisedPlugin
from avalanche.models import SimpleMLP, as_multitask
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import DER, EWC, Naive, Replay
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lit_rebasin import LinearPath, align, input_moments, permutation_spec, permute, regmean
from lit_rebasin.plugins import RebasinPlugin

X = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, :3].argmax(1), X[:, 3:].argmax(1), X[:, 1:4].argmax(1)])


def network(norm=False):
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(14)] if norm else []
    return nn.Sequential(nn.Linear(6, 14), *norms, nn.Tanh(), nn.Linear(14, 11), nn.ReLU(), nn.Linear(11, 3))


def stream(n_tasks=2):
    """Tasks whose batches are images and labels."""
    tasks = []
    for y in Y[:n_tasks]:
        data = TensorDataset(X, y)
        data.targets = y.tolist()
        tasks.append(as_classification_dataset(data))
    return benchmark_from_datasets(train=tasks, test=tasks)


def stream_of_tasks(n_tasks=2, labels=(0, 0, 0)):
    """Tasks whose batches hold task labels too, as DER asks for them."""
    tasks = []
    for y, label in zip(Y[:n_tasks], labels, strict=False):
        attributes = [DataAttribute(y.tolist(), "targets"), TaskLabels([label] * len(y))]
        tasks.append(TaskAwareSupervisedClassificationDataset([TensorDataset(X, y)], data_attributes=attributes))
    return with_task_labels(benchmark_from_datasets(train=tasks, test=tasks))


class Held(SupervisedPlugin):
    """Keeps copies of the network before and after the training; experiences after the first begin with fresh weights."""

    def before_training_exp(self, strategy, **kwargs):
        self.previous = copy.deepcopy(strategy.model).eval()
        for layer in strategy.model.modules():
            if isinstance(layer, nn.Linear) and strategy.clock.train_exp_counter:
                layer.reset_parameters()

    def after_training_exp(self, strategy, **kwargs):
        self.trained = copy.deepcopy(strategy.model).eval()


def run(plugins, kind=Naive, model=None, n_tasks=2, make=stream, **options):
    torch.manual_seed(1)
    model = model or network()
    options = {"train_mb_size": 30, "train_epochs": 4, "evaluator": None, **options}
    strategy = kind(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
        criterion=nn.CrossEntropyLoss(),
        plugins=plugins,
        **options,
    )
    for experience in make(n_tasks).train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


def test_merge_is_that_of_the_public_functions():
    held, ours = Held(), RebasinPlugin(alpha=0.3)
    merged = run([held, ours]).model
    spec = permutation_spec(held.trained, X[:2])
    found = align(held.trained, held.previous, method="weights", spec=spec, seed=1)
    moved = permute(held.trained, spec, found.permutations)
    assert (
        ours.history[0]["moved"]
        == sum(int((p != torch.arange(len(p))).sum()) for p in found.permutations.values())
        > 10
    )
    for ours_now, before, after in zip(
        merged.parameters(), held.previous.parameters(), moved.parameters(), strict=True
    ):
        torch.testing.assert_close(ours_now, 0.3 * before + 0.7 * after)


def test_merge_by_regmean_is_that_of_the_public_functions():
    held, ours = Held(), RebasinPlugin(alpha=0.3, combine="regmean")
    merged = run([held, ours]).model
    spec = permutation_spec(held.trained, X[:2])
    found = align(held.trained, held.previous, method="weights", spec=spec, seed=1)
    moved = permute(held.trained, spec, found.permutations)
    assert found.moved > 10
    moments = [input_moments(model, model, [X]) for model in (held.previous, moved)]
    expected = regmean(LinearPath(held.previous, moved), *moments, alpha=0.3)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "identity"},
        {"combine": "regmean", "alpha": 0.5, "method": "covariance", "statistics": "repair"},
        {"method": "covariance"},
        {"method": "activations", "statistics": "repair"},
        {"method": "frank-wolfe", "alpha": "line-search"},
        {"method": "weights", "alpha": "layer-fisher", "statistics": "rescale"},
        {"method": "sinkhorn", "options": {"steps": 2}},
        {"method": "straight-through", "cost": "midpoint", "options": {"steps": 2}, "alpha": "fisher"},
    ],
    ids=str,
)
def test_every_kind_of_setting(settings):
    ours = RebasinPlugin(**settings)
    model = run([ours], n_tasks=3).model
    assert [entry["task"] for entry in ours.history] == [1, 2]
    assert all("refused" not in entry for entry in ours.history)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_merge_is_drawn_with_the_seed():
    options = {"method": "sinkhorn", "options": {"steps": 3, "noise": 0.5}}
    first, again, other = (
        torch.cat([p.detach().flatten() for p in run([RebasinPlugin(seed=seed, **options)]).model.parameters()])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batch_norm_is_estimated_anew_on_the_loaders_batches():
    model = run([RebasinPlugin(alpha=0.5)], model=network(norm=True)).model
    hidden = model[0](X)
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0), atol=1e-5, rtol=1e-4)
    assert model.training


def test_the_merge_sees_what_replay_mixes_in():
    """Half-way between two tasks the loss is measured on the batches that were trained on: both tasks' examples."""
    held, ours = Held(), RebasinPlugin(method="identity", alpha=0.0, batches=3)
    replay = ReplayPlugin(mem_size=90, batch_size=30, batch_size_mem=30)
    run([held, ours, replay])
    with torch.no_grad():
        losses = torch.stack([cross_entropy(held.trained(X), y) for y in Y[:2]])
    assert ours.history[0]["loss_after"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert ours.history[0]["loss_after"] != pytest.approx(float(losses[1]), rel=1e-2)


def test_ewc_measures_its_importances_on_the_merged_network():
    ours = RebasinPlugin(alpha=0.5)
    strategy = run([ours], kind=EWC, ewc_lambda=1.0, mode="separate")
    (ewc,) = [plugin for plugin in strategy.plugins if type(plugin).__name__ == "EWCPlugin"]
    for name, parameter in strategy.model.named_parameters():
        torch.testing.assert_close(ewc.saved_params[1][name].data, parameter.data)


@pytest.mark.parametrize(
    ("kind", "options"), [(Replay, {"mem_size": 30}), (DER, {"mem_size": 60, "batch_size_mem": 20})]
)
def test_beside_strategies_with_a_memory(kind, options):
    ours = RebasinPlugin(alpha=0.5)
    strategy = run([ours], kind=kind, n_tasks=3, make=stream_of_tasks, **options)
    assert len(ours.history) == 2
    assert strategy.eval(stream_of_tasks(3).test_stream) is not None
    untouched = run([], kind=kind, n_tasks=3, make=stream_of_tasks, **options).model
    assert any(
        not torch.equal(ours, theirs)
        for ours, theirs in zip(strategy.model.parameters(), untouched.parameters(), strict=True)
    )


def test_random_states_are_left_alone():
    """With alpha 0 and no alignment a merge changes nothing, so neither does it change what is drawn later."""
    found = []
    for plugins in ([], [RebasinPlugin(alpha=0.0, method="identity", statistics="none")]):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        found.append((run(plugins, n_tasks=3).model, random.random(), np.random.rand()))  # noqa: NPY002
    for ours, theirs in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[0][1:] == found[1][1:]


def test_a_head_a_task_is_taken_as_it_was_trained():
    benchmark = stream_of_tasks(3, labels=(0, 1, 2))
    torch.manual_seed(0)
    model = as_multitask(SimpleMLP(num_classes=3, input_size=6, hidden_size=12, drop_rate=0), "classifier")
    held, ours = Held(), RebasinPlugin(alpha=0.4)
    held.before_training_exp = lambda strategy, **kwargs: None
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=30,
        evaluator=None,
        plugins=[held, ours],
    )
    for task, experience in enumerate(benchmark.train_stream):
        experience.classes_in_this_experience = [0, 1, 2]
        strategy.train(experience, eval_streams=[])
        head = f"classifier.classifiers.{task}.classifier.weight"
        torch.testing.assert_close(strategy.model.state_dict()[head], held.trained.state_dict()[head])
    assert len(ours.history) == 2
    assert all("refused" not in entry for entry in ours.history)


def test_state_goes_on_where_it_was():
    ours = RebasinPlugin(alpha=0.5)
    run([ours])
    resumed = RebasinPlugin(alpha=0.5)
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert resumed.n_tasks == 2
    assert resumed.history == ours.history
    torch.testing.assert_close(resumed.previous, ours.previous)


def test_a_tensor_that_grows_is_named():
    class Grows(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            strategy.model[4] = nn.Linear(11, 4)

    with pytest.raises(ValueError, match=r"'model.4.weight' has shape \(4, 11\) in the model and \(3, 11\)"):
        run([RebasinPlugin(), Grows()])


def test_training_that_diverges_is_refused_and_undone():
    class Breaks(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter:
                strategy.model[0].weight.data[0, 0] = float("nan")

    held, ours = Held(), RebasinPlugin()
    with pytest.warns(UserWarning, match="left NaN or infinity in 'model.0.weight'"):
        model = run([held, Breaks(), ours]).model
    for now, before in zip(model.parameters(), held.previous.parameters(), strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("wrong", [{"alpha": 2}, {"method": "hungarian"}, {"options": {"stepps": 1}}, {"batches": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("s")):
        RebasinPlugin(**wrong)


def test_data_free_statistics_need_batch_norm():
    with pytest.raises(
        Exception, match=r'RebasinPlugin\(statistics="data-free"\) is for BatchNorm, of which Sequential has none'
    ):
        run([RebasinPlugin(statistics="data-free")])


def test_two_merges_in_one_strategy_are_refused():
    with pytest.raises(ValueError, match="a strategy takes one RebasinPlugin"):
        run([RebasinPlugin(), RebasinPlugin(alpha=0.5)])
