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
from lit_rebasin.metrics.curvature import HessianTrace, Sharpness, hessian_eigenvalues, hessian_trace
from lit_rebasin.metrics.feature_learning import FeatureSpeed
from lit_rebasin.metrics.figures import accuracy_matrices_figure, accuracy_matrix_figure, accuracy_over_tasks_figure
from lit_rebasin.metrics.lanczos import HessianEigenvalues
from lit_rebasin.metrics.path_figure import path_figure
from lit_rebasin.metrics.scales import LayerScale, suggest_scales

__all__ = [
    "BackwardTransfer",
    "ContinualAccuracy",
    "FeatureSpeed",
    "Forgetting",
    "ForwardTransfer",
    "HessianEigenvalues",
    "HessianTrace",
    "LayerScale",
    "LearningAccuracy",
    "Sharpness",
    "accuracy_matrices_figure",
    "accuracy_matrix_figure",
    "accuracy_over_tasks_figure",
    "after_task",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "hessian_eigenvalues",
    "hessian_trace",
    "learning_accuracy",
    "path_figure",
    "suggest_scales",
]
