"""What is measured of a continual learner, and how it is drawn."""

from lit_rebasin.metrics.continual import (
    after_task,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from lit_rebasin.metrics.continual_metrics import (
    BackwardTransfer,
    ContinualAccuracy,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
)
from lit_rebasin.metrics.figures import accuracy_matrices_figure, accuracy_matrix_figure, accuracy_over_tasks_figure
from lit_rebasin.metrics.merge_figures import MergePaths, alpha_figure, displacement_figure, paths_figure
from lit_rebasin.metrics.path_figure import path_figure

__all__ = [
    "BackwardTransfer",
    "ContinualAccuracy",
    "Forgetting",
    "ForwardTransfer",
    "LearningAccuracy",
    "MergePaths",
    "accuracy_matrices_figure",
    "accuracy_matrix_figure",
    "accuracy_over_tasks_figure",
    "after_task",
    "alpha_figure",
    "average_accuracy",
    "backward_transfer",
    "displacement_figure",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "path_figure",
    "paths_figure",
]
