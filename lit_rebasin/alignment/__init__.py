"""Which permutation carries a model towards a reference."""

from lit_rebasin.alignment.activations import activation_matching
from lit_rebasin.alignment.align import align
from lit_rebasin.alignment.costs import (
    DISTANCES,
    LOSS_COSTS,
    add_residual,
    check_same_architecture,
    check_weights,
    cosine_distance,
    incremental_cost,
    interpolate,
    l1_cost,
    l2_cost,
    midpoint_cost,
    random_point_cost,
)
from lit_rebasin.alignment.covariance import covariance_matching
from lit_rebasin.alignment.frank_wolfe import frank_wolfe_matching
from lit_rebasin.alignment.methods import METHODS, Problem, check_method, check_start, find
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.alignment.sinkhorn import SinkhornRebasin, sinkhorn_alignment
from lit_rebasin.alignment.straight_through import straight_through_alignment
from lit_rebasin.alignment.weights import weight_matching

__all__ = [
    "DISTANCES",
    "LOSS_COSTS",
    "METHODS",
    "Alignment",
    "Problem",
    "SinkhornRebasin",
    "activation_matching",
    "add_residual",
    "align",
    "check_method",
    "check_same_architecture",
    "check_start",
    "check_weights",
    "cosine_distance",
    "covariance_matching",
    "find",
    "frank_wolfe_matching",
    "incremental_cost",
    "interpolate",
    "l1_cost",
    "l2_cost",
    "midpoint_cost",
    "random_point_cost",
    "sinkhorn_alignment",
    "straight_through_alignment",
    "weight_matching",
]
