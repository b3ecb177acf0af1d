"""Which permutation carries a model towards a reference."""

from lit_rebasin.alignment.costs import (
    add_residual,
    check_same_architecture,
    incremental_cost,
    interpolate,
    l2_cost,
    midpoint_cost,
    random_point_cost,
)
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.alignment.sinkhorn import SinkhornRebasin, sinkhorn_alignment
from lit_rebasin.alignment.weights import weight_matching

__all__ = [
    "Alignment",
    "SinkhornRebasin",
    "add_residual",
    "check_same_architecture",
    "incremental_cost",
    "interpolate",
    "l2_cost",
    "midpoint_cost",
    "random_point_cost",
    "sinkhorn_alignment",
    "weight_matching",
]
