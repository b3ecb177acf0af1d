"""Optimal transport on plain tensors; knows no networks."""

from lit_rebasin.transport.annealing import Schedule, annealed_sinkhorn
from lit_rebasin.transport.assignment import assignment, plan_entropy, round_to_polytope
from lit_rebasin.transport.barycenter import BarycenterResult, doubly_regularized_barycenter
from lit_rebasin.transport.discrepancy import energy_distance, wasserstein_distance
from lit_rebasin.transport.sinkhorn import SinkhornResult, sinkhorn

__all__ = [
    "BarycenterResult",
    "Schedule",
    "SinkhornResult",
    "annealed_sinkhorn",
    "assignment",
    "doubly_regularized_barycenter",
    "energy_distance",
    "plan_entropy",
    "round_to_polytope",
    "sinkhorn",
    "wasserstein_distance",
]
