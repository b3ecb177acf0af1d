"""Optimal transport on plain tensors; knows no networks."""

from lit_rebasin.transport.annealing import Schedule, annealed_sinkhorn
from lit_rebasin.transport.assignment import assignment, plan_entropy, round_to_polytope
from lit_rebasin.transport.barycenter import BarycenterResult, doubly_regularized_barycenter
from lit_rebasin.transport.sinkhorn import SinkhornResult, sinkhorn

__all__ = [
    "BarycenterResult",
    "Schedule",
    "SinkhornResult",
    "annealed_sinkhorn",
    "assignment",
    "doubly_regularized_barycenter",
    "plan_entropy",
    "round_to_polytope",
    "sinkhorn",
]
