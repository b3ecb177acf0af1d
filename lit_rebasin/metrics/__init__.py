"""What is measured of a continual learner, and how it is drawn."""

from lit_rebasin.metrics.continual import after_task, average_accuracy, backward_transfer, forgetting
from lit_rebasin.metrics.figures import accuracy_matrices_figure, accuracy_matrix_figure, accuracy_over_tasks_figure
from lit_rebasin.metrics.path_figure import path_figure

__all__ = [
    "accuracy_matrices_figure",
    "accuracy_matrix_figure",
    "accuracy_over_tasks_figure",
    "after_task",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "path_figure",
]
