"""Continual learning by re-basin.

The public names are loaded when they are first used: ``import lit_rebasin`` loads neither Lightning nor Avalanche, and finding, applying and
optimising permutations never does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Alignment": "alignment",
    "Axis": "symmetry",
    "BackwardTransfer": "metrics",
    "BarycenterResult": "transport",
    "ContinualAccuracy": "metrics",
    "ContinualClassifier": "continual",
    "ContinualDataModule": "continual",
    "ContinualMonitor": "callbacks",
    "FeatureSpeed": "metrics",
    "Forgetting": "metrics",
    "ForwardTransfer": "metrics",
    "Group": "symmetry",
    "LearningAccuracy": "metrics",
    "LinearPath": "merging",
    "ManyMerge": "merging",
    "ModeConnectivity": "callbacks",
    "PathLosses": "merging",
    "PermutationSpec": "symmetry",
    "RandomShift": "continual",
    "RebasinIL": "continual",
    "RebasinMerge": "callbacks",
    "RebasinPlugin": "plugins",
    "Schedule": "transport",
    "Sharpness": "metrics",
    "SinkhornRebasin": "alignment",
    "SinkhornResult": "transport",
    "activation_matching": "alignment",
    "align": "alignment",
    "annealed_sinkhorn": "transport",
    "assignment": "transport",
    "check_invariance": "symmetry",
    "covariance_matching": "alignment",
    "diagonal_fisher": "merging",
    "doubly_regularized_barycenter": "transport",
    "fisher_alpha": "merging",
    "frank_wolfe_matching": "alignment",
    "hessian_eigenvalues": "metrics",
    "hessian_trace": "metrics",
    "input_moments": "merging",
    "layer_fisher_alphas": "merging",
    "line_search": "merging",
    "loss_barrier": "merging",
    "merge_many": "merging",
    "permutation_spec": "symmetry",
    "permute": "symmetry",
    "plan_entropy": "transport",
    "regmean": "merging",
    "reestimate_batch_norm": "merging",
    "repair": "merging",
    "repair_many": "merging",
    "reset_batch_norm": "merging",
    "round_to_polytope": "transport",
    "sinkhorn": "transport",
    "sinkhorn_alignment": "alignment",
    "slim_resnet18": "continual",
    "straight_through_alignment": "alignment",
    "suggest_scales": "metrics",
    "weight_matching": "alignment",
}

__all__ = [
    "Alignment",
    "Axis",
    "BackwardTransfer",
    "BarycenterResult",
    "ContinualAccuracy",
    "ContinualClassifier",
    "ContinualDataModule",
    "ContinualMonitor",
    "FeatureSpeed",
    "Forgetting",
    "ForwardTransfer",
    "Group",
    "LearningAccuracy",
    "LinearPath",
    "ManyMerge",
    "ModeConnectivity",
    "PathLosses",
    "PermutationSpec",
    "RandomShift",
    "RebasinIL",
    "RebasinMerge",
    "RebasinPlugin",
    "Schedule",
    "Sharpness",
    "SinkhornRebasin",
    "SinkhornResult",
    "__version__",
    "activation_matching",
    "align",
    "annealed_sinkhorn",
    "assignment",
    "check_invariance",
    "covariance_matching",
    "diagonal_fisher",
    "doubly_regularized_barycenter",
    "fisher_alpha",
    "frank_wolfe_matching",
    "hessian_eigenvalues",
    "hessian_trace",
    "input_moments",
    "layer_fisher_alphas",
    "line_search",
    "loss_barrier",
    "merge_many",
    "permutation_spec",
    "permute",
    "plan_entropy",
    "reestimate_batch_norm",
    "regmean",
    "repair",
    "repair_many",
    "reset_batch_norm",
    "round_to_polytope",
    "sinkhorn",
    "sinkhorn_alignment",
    "slim_resnet18",
    "straight_through_alignment",
    "suggest_scales",
    "weight_matching",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_rebasin' has no attribute {name!r}")
    return getattr(import_module(f"lit_rebasin.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from lit_rebasin.alignment import (
        Alignment,
        SinkhornRebasin,
        activation_matching,
        align,
        covariance_matching,
        frank_wolfe_matching,
        sinkhorn_alignment,
        straight_through_alignment,
        weight_matching,
    )
    from lit_rebasin.callbacks import ContinualMonitor, ModeConnectivity, RebasinMerge
    from lit_rebasin.continual import (
        ContinualClassifier,
        ContinualDataModule,
        RandomShift,
        RebasinIL,
        slim_resnet18,
    )
    from lit_rebasin.merging import (
        LinearPath,
        ManyMerge,
        PathLosses,
        diagonal_fisher,
        fisher_alpha,
        input_moments,
        layer_fisher_alphas,
        line_search,
        loss_barrier,
        merge_many,
        reestimate_batch_norm,
        regmean,
        repair,
        repair_many,
        reset_batch_norm,
    )
    from lit_rebasin.metrics import (
        BackwardTransfer,
        ContinualAccuracy,
        FeatureSpeed,
        Forgetting,
        ForwardTransfer,
        LearningAccuracy,
        Sharpness,
        hessian_eigenvalues,
        hessian_trace,
        suggest_scales,
    )
    from lit_rebasin.plugins import RebasinPlugin
    from lit_rebasin.symmetry import Axis, Group, PermutationSpec, check_invariance, permutation_spec, permute
    from lit_rebasin.transport import (
        BarycenterResult,
        Schedule,
        SinkhornResult,
        annealed_sinkhorn,
        assignment,
        doubly_regularized_barycenter,
        plan_entropy,
        round_to_polytope,
        sinkhorn,
    )
