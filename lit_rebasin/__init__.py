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
    "BarycenterResult": "transport",
    "ContinualClassifier": "continual",
    "ContinualDataModule": "continual",
    "ContinualMonitor": "callbacks",
    "Group": "symmetry",
    "LinearPath": "merging",
    "PermutationSpec": "symmetry",
    "RebasinMerge": "callbacks",
    "Schedule": "transport",
    "SinkhornRebasin": "alignment",
    "SinkhornResult": "transport",
    "annealed_sinkhorn": "transport",
    "assignment": "transport",
    "check_invariance": "symmetry",
    "doubly_regularized_barycenter": "transport",
    "permutation_spec": "symmetry",
    "permute": "symmetry",
    "plan_entropy": "transport",
    "round_to_polytope": "transport",
    "sinkhorn": "transport",
    "weight_matching": "alignment",
}

__all__ = [
    "Alignment",
    "Axis",
    "BarycenterResult",
    "ContinualClassifier",
    "ContinualDataModule",
    "ContinualMonitor",
    "Group",
    "LinearPath",
    "PermutationSpec",
    "RebasinMerge",
    "Schedule",
    "SinkhornRebasin",
    "SinkhornResult",
    "__version__",
    "annealed_sinkhorn",
    "assignment",
    "check_invariance",
    "doubly_regularized_barycenter",
    "permutation_spec",
    "permute",
    "plan_entropy",
    "round_to_polytope",
    "sinkhorn",
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
    from lit_rebasin.alignment import Alignment, SinkhornRebasin, weight_matching
    from lit_rebasin.callbacks import ContinualMonitor, RebasinMerge
    from lit_rebasin.continual import ContinualClassifier, ContinualDataModule
    from lit_rebasin.merging import LinearPath
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
