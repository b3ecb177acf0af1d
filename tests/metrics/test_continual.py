import pytest
import torch
from avalanche.evaluation.metrics import Forgetting
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rebasin.metrics import (
    after_task,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

MATRIX = torch.tensor([[0.9, 0.1, 0.2], [0.7, 0.8, 0.3], [0.5, 0.9, 0.6]])


def test_by_hand():
    assert average_accuracy(MATRIX) == pytest.approx((0.5 + 0.9 + 0.6) / 3)
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.9)) / 2)
    assert backward_transfer(MATRIX) == -forgetting(MATRIX)
    assert average_accuracy(after_task(MATRIX, 1)) == pytest.approx(0.75)
    assert forgetting(after_task(MATRIX, 0)) == 0


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 6), seed=st.integers(0, 1000))
def test_forgetting_is_avalanches(n, seed):
    matrix = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    metric = Forgetting()
    for task in range(n):
        metric.update_initial(task, float(matrix[task, task]))
    for task in range(n):
        metric.update_last(task, float(matrix[-1, task]))
    per_task = metric.result()
    assert forgetting(matrix) == pytest.approx(sum(per_task[task] for task in range(n - 1)) / (n - 1), abs=1e-6)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(0, 0), torch.zeros(3), torch.tensor(1.0)])
def test_errors(wrong):
    with pytest.raises(ValueError, match="square and not empty"):
        average_accuracy(wrong)


@pytest.mark.parametrize("wrong", [MATRIX.numpy(), None, "matrix", MATRIX.tolist(), MATRIX.cfloat()])
def test_what_is_no_tensor_of_real_numbers(wrong):
    functions = [average_accuracy, forgetting, backward_transfer, learning_accuracy, lambda one: after_task(one, 0)]
    for function in functions:
        with pytest.raises(TypeError, match="matrix must be a tensor of real numbers, got "):
            function(wrong)
    with pytest.raises(TypeError, match="untrained must be a tensor of real numbers, got "):
        forward_transfer(MATRIX, wrong)


@pytest.mark.parametrize(
    ("task", "message"), [(3, "one of the 3 tasks .* got 3"), (-1, "at least 0"), (0.5, "got 0.5")]
)
def test_a_task_that_the_matrix_lacks(task, message):
    with pytest.raises(ValueError, match=message):
        after_task(MATRIX, task)
