"""Optimal transport on plain tensors; knows no networks."""

from lit_rebasin.transport.assignment import assignment
from lit_rebasin.transport.sinkhorn import SinkhornResult, sinkhorn

__all__ = ["SinkhornResult", "assignment", "sinkhorn"]
