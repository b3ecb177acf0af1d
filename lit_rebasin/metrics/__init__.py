"""What is measured of a continual learner, and how it is drawn."""

from lit_rebasin.metrics.connectivity import Barrier
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
from lit_rebasin.metrics.curve_figure import Curve, curves_figure
from lit_rebasin.metrics.feature_figure import feature_speed_figure
from lit_rebasin.metrics.feature_learning import FeatureSpeed
from lit_rebasin.metrics.figures import accuracy_matrices_figure, accuracy_matrix_figure, accuracy_over_tasks_figure
from lit_rebasin.metrics.geodesic import (
    LineShapeScore,
    OptimalTransportScore,
    line_shape_scores,
    optimal_transport_score,
)
from lit_rebasin.metrics.lanczos import HessianEigenvalues
from lit_rebasin.metrics.merge_figures import MergePaths, alpha_figure, displacement_figure, paths_figure
from lit_rebasin.metrics.neurons import (
    NeuronDistance,
    effective_dimension,
    layer_neurons,
    neuron_distances,
    width_bound,
)
from lit_rebasin.metrics.path_figure import path_figure
from lit_rebasin.metrics.plane_figure import plane_figure
from lit_rebasin.metrics.scales import LayerScale, suggest_scales
from lit_rebasin.metrics.track_figure import tracks_figure
from lit_rebasin.metrics.tracks import recorded, same_space, track_layers, tracks_of

__all__ = [
    "BackwardTransfer",
    "Barrier",
    "ContinualAccuracy",
    "Curve",
    "FeatureSpeed",
    "Forgetting",
    "ForwardTransfer",
    "HessianEigenvalues",
    "HessianTrace",
    "LayerScale",
    "LearningAccuracy",
    "LineShapeScore",
    "MergePaths",
    "NeuronDistance",
    "OptimalTransportScore",
    "Sharpness",
    "accuracy_matrices_figure",
    "accuracy_matrix_figure",
    "accuracy_over_tasks_figure",
    "after_task",
    "alpha_figure",
    "average_accuracy",
    "backward_transfer",
    "curves_figure",
    "displacement_figure",
    "effective_dimension",
    "feature_speed_figure",
    "forgetting",
    "forward_transfer",
    "hessian_eigenvalues",
    "hessian_trace",
    "layer_neurons",
    "learning_accuracy",
    "line_shape_scores",
    "neuron_distances",
    "optimal_transport_score",
    "path_figure",
    "paths_figure",
    "plane_figure",
    "recorded",
    "same_space",
    "suggest_scales",
    "track_layers",
    "tracks_figure",
    "tracks_of",
    "width_bound",
]
