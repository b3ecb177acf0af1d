"""The path between aligned models, and the one model that it becomes."""

from lit_rebasin.merging.coefficient import NoFiniteLossError, line_search
from lit_rebasin.merging.path import LinearPath, PathLosses
from lit_rebasin.merging.statistics import has_batch_norm, reestimate_batch_norm

__all__ = ["LinearPath", "NoFiniteLossError", "PathLosses", "has_batch_norm", "line_search", "reestimate_batch_norm"]
