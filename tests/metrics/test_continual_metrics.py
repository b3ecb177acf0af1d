import io

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import bwt_metrics, forgetting_metrics, forward_transfer_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection

from lit_rebasin.metrics import (
    BackwardTransfer,
    ContinualAccuracy,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
    average_accuracy,
)

SCALARS = (Forgetting, BackwardTransfer, ForwardTransfer, LearningAccuracy)


def accuracies(metric, matrix):
    """Feed predictions of which the given share is right, in tenths."""
    for row, trained in zip(matrix, range(-1, len(matrix) - 1), strict=True):
        for task, right in enumerate(row):
            target = torch.zeros(10, dtype=torch.long)
            metric.update((torch.arange(10) >= right).long(), target, task=task, trained=trained)
    return metric


MATRIX = [[1, 2, 3], [9, 1, 2], [7, 8, 4], [5, 9, 6]]  # tenths; the first row is of the untrained network


def test_by_hand():
    expected = {"Forgetting": 0.15, "BackwardTransfer": -0.15, "ForwardTransfer": 0.0, "LearningAccuracy": 23 / 30}
    for kind in SCALARS:
        found = accuracies(kind(n_tasks=3), MATRIX).compute()
        assert float(found) == pytest.approx(expected[kind.__name__]), kind
    matrix = accuracies(ContinualAccuracy(3), MATRIX).compute()
    torch.testing.assert_close(matrix, torch.tensor(MATRIX[1:], dtype=torch.float64) / 10)


def test_a_stream_that_is_not_finished_counts_the_tasks_so_far():
    metric = accuracies(Forgetting(3), MATRIX[:3])
    assert float(metric.compute()) == pytest.approx(0.2)
    assert ContinualAccuracy(3).compute().isnan().all()


def test_what_was_not_predicted_is_nan_not_0():
    metric = ForwardTransfer(3)
    metric.update(torch.zeros(4).long(), torch.zeros(4).long(), task=0, trained=0)
    metric.update(torch.zeros(4).long(), torch.zeros(4).long(), task=1, trained=1)
    assert metric.compute().isnan()


def test_logits_and_tasks_of_every_example():
    metric = ContinualAccuracy(2)
    metric.update(torch.eye(4), torch.tensor([0, 1, 2, 0]), task=torch.tensor([0, 1, 0, 1]), trained=0)
    assert metric.compute()[0].tolist() == [1.0, 0.5]


def test_a_collection_counts_once_and_agrees():
    together = MetricCollection([kind(3) for kind in (ContinualAccuracy, *SCALARS)])
    accuracies(together, MATRIX)
    found = together.compute()
    assert len(together.compute_groups) == 1
    for kind in SCALARS:
        assert float(found[kind.__name__]) == float(accuracies(kind(3), MATRIX).compute())


def test_merged_states_are_those_of_all_predictions():
    halves = [ContinualAccuracy(1), ContinualAccuracy(1)]
    halves[0].update(torch.tensor([0, 1]), torch.tensor([0, 0]), 0, 0)
    halves[1].update(torch.tensor([0, 0]), torch.tensor([0, 0]), 0, 0)
    halves[0].merge_state(halves[1])
    assert halves[0].compute().tolist() == 0.75


def test_plots():
    metric = accuracies(ContinualAccuracy(3), MATRIX)
    figure, axes = metric.plot()
    figure.savefig(io.BytesIO())
    assert [text.get_text() for text in axes.texts][:3] == ["90", "10", "20"]
    single = ContinualAccuracy(1)
    single.update(torch.zeros(2).long(), torch.zeros(2).long(), 0, 0)
    assert [text.get_text() for text in single.plot()[1].texts] == ["100"]
    given = Figure().subplots()
    assert metric.plot(ax=given) == (None, given)
    _, axes = accuracies(Forgetting(3), MATRIX).plot()
    assert float(axes.lines[0].get_ydata()[0]) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2, 2), torch.zeros(2), 0, 0), "preds must be"),
        ((torch.zeros(3), torch.zeros(2), 0, 0), r"\(3,\) and \(2,\)"),
        ((torch.zeros(2), torch.zeros(2), 0, 2), "trained must be a task index below n_tasks=2"),
        ((torch.zeros(2), torch.zeros(2), 2, 0), r"task must lie in 0 ... 1, got 2 ... 2"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(3).long(), 0), r"one an example, \(2,\), got shape \(3,\)"),
        ((np.zeros(2), torch.zeros(2), 0, 0), "preds must be a tensor of real numbers, got ndarray: torch.from_numpy"),
        ((torch.zeros(2), None, 0, 0), "target must be a tensor of real numbers, got NoneType"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2), 0), "task must be .*in whole numbers, got torch.float32"),
        ((torch.zeros(2), torch.zeros(2), "first", 0), "task must be a task index, or one an example, got a str"),
        ((torch.zeros(2), torch.zeros(2), 0, None), "trained must be a task index, a whole number, got a NoneType"),
    ],
)
def test_errors(arguments, message):
    metric = ContinualAccuracy(2)
    with pytest.raises((ValueError, TypeError), match=message):
        metric.update(*arguments)
    assert metric.total.sum() == 0


@pytest.mark.parametrize("wrong", [0, 1.5, "3"])
def test_wrong_number_of_tasks(wrong):
    with pytest.raises(ValueError, match="n_tasks must be a whole number"):
        Forgetting(wrong)


class Watch(SupervisedPlugin):
    """Hands every prediction of Avalanche's evaluation to our metrics."""

    def __init__(self, metrics):
        super().__init__()
        self.metrics, self.trained = metrics, -1

    def before_training_exp(self, strategy, **kwargs):
        self.trained += 1

    def after_eval_iteration(self, strategy, **kwargs):
        task = strategy.experience.current_experience
        self.metrics.update(strategy.mb_output, strategy.mb_y, task=task, trained=self.trained)


def test_equal_to_avalanches_on_the_same_predictions():
    torch.manual_seed(0)
    x, y = torch.randn(120, 6), torch.randint(0, 3, (120,))
    tasks = []
    for turn in range(3):
        data = TensorDataset(x.roll(turn, 1) + turn, y)
        data.targets = y.tolist()
        tasks.append(as_classification_dataset(data))
    benchmark = benchmark_from_datasets(train=tasks, test=tasks)
    ours = MetricCollection([kind(3) for kind in (ContinualAccuracy, *SCALARS)])
    theirs = EvaluationPlugin(
        forgetting_metrics(stream=True), bwt_metrics(stream=True), forward_transfer_metrics(stream=True), loggers=[]
    )
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=20,
        train_epochs=5,
        eval_every=0,
        evaluator=theirs,
        plugins=[Watch(ours)],
    )
    strategy.eval(benchmark.test_stream)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
    found, expected = ours.compute(), theirs.get_last_metrics()
    for name, tag in (
        ("Forgetting", "StreamForgetting"),
        ("BackwardTransfer", "StreamBWT"),
        ("ForwardTransfer", "StreamForwardTransfer"),
    ):
        (theirs_value,) = [value for key, value in expected.items() if key.startswith(tag + "/")]
        assert float(found[name]) == pytest.approx(theirs_value, abs=1e-9), name
    assert 0 < average_accuracy(found["ContinualAccuracy"]) < 1
    assert float(found["Forgetting"]) != 0
