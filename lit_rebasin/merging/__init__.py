"""The path between aligned models, and the one model that it becomes."""

from lit_rebasin.merging.barrier import loss_barrier
from lit_rebasin.merging.coefficient import NoFiniteLossError, fisher_alpha, layer_fisher_alphas, line_search
from lit_rebasin.merging.fisher import SquaredGradients, diagonal_fisher, zeros_to_sum
from lit_rebasin.merging.many import ManyMerge, merge_many
from lit_rebasin.merging.path import LinearPath, PathLosses
from lit_rebasin.merging.plane import PlaneLosses, is_plane, loss_plane
from lit_rebasin.merging.regmean import input_moments, regmean
from lit_rebasin.merging.repair import repair, repair_many
from lit_rebasin.merging.reset import reset_batch_norm
from lit_rebasin.merging.statistics import has_batch_norm, reestimate_batch_norm

__all__ = [
    "LinearPath",
    "ManyMerge",
    "NoFiniteLossError",
    "PathLosses",
    "PlaneLosses",
    "SquaredGradients",
    "diagonal_fisher",
    "fisher_alpha",
    "has_batch_norm",
    "input_moments",
    "is_plane",
    "layer_fisher_alphas",
    "line_search",
    "loss_barrier",
    "loss_plane",
    "merge_many",
    "reestimate_batch_norm",
    "regmean",
    "repair",
    "repair_many",
    "reset_batch_norm",
    "zeros_to_sum",
]
