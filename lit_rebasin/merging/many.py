"""One model from many: bring them into one frame and average them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter

import torch
from torch import Tensor, nn

from lit_rebasin.alignment import check_same_architecture, interpolate
from lit_rebasin.alignment.agreement import exact, in_units, restrict
from lit_rebasin.merging.common_frame import (
    Frame,
    Members,
    barycenter_frame,
    cycle_consistent_frame,
    merge_many_frame,
)
from lit_rebasin.merging.path import even_shares
from lit_rebasin.symmetry import PermutationSpec, permute
from lit_rebasin.symmetry.spec import tensors_of

METHODS = ("cycle-consistent", "merge-many", "barycenter")
# Torch's names for statistics of data, whose scale would drown the weights.
_STATISTICS = {"running_mean", "running_var"}


@dataclass(frozen=True)
class ManyMerge:
    """One model merged from many.

    Attributes:
        weights: Weights and buffers of the merge by name, in the dtypes and on the devices of the first model, whose neurons keep their order.
        permutations: For each model, by group name, LongTensors ``(size,)`` that carry it into the frame of the first, whose own are the
            identity. ``compose(permutations[i], invert(permutations[j]))`` leads from model i to model j, and is the same by way of others.
        history: The spread of the permuted models along the way, ``sum_i share_i (w_i - mean)^2`` averaged over the matched weights, in units
            in which the norm of every layer has a root mean square of one; the first entry is that of the models as they are, the least that
            of the permutations returned.
        method: The name of the method.
        converged: Whether the method came to its end within its steps.
        seconds: Wall time.
    """

    weights: dict[str, Tensor]
    permutations: list[dict[str, Tensor]]
    history: list[float]
    method: str
    converged: bool
    seconds: float


def merge_many(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    spec: PermutationSpec,
    *,
    method: str = "cycle-consistent",
    weights: Sequence[float] | None = None,
    seed: int = 0,
    max_steps: int = 200,
) -> ManyMerge:
    """Permute models of one architecture into one frame, by their weights alone, and average them. All layers count alike, whatever their size.

    - ``"cycle-consistent"``: the agreement of all pairs climbs together over the plans of all models and groups, by Frank-Wolfe
      (C2M3, Crisostomi et al., NeurIPS 2024).
    - ``"merge-many"``: one model at a time is matched to the average of the others by weight matching, until none moves (Git Re-Basin,
      Ainsworth et al., ICLR 2023, algorithm 3).
    - ``"barycenter"``: group by group, the neurons of all models are point clouds; each model is matched to the particles of their doubly
      regularized barycenter (Chizat, arXiv 2303.11844). The barycenter only decides which neurons belong together: what is averaged are
      the permuted models, not the particles, which are blurred. It ends with a larger spread than the other two.

    The merge puts out less variance than its members do: :func:`~lit_rebasin.repair_many` restores it, with some inputs. Networks with
    BatchNorm need at least its statistics re-estimated, :func:`~lit_rebasin.reestimate_batch_norm`.

    Args:
        models: At least two modules or mappings of weights by name. Parameters are matched; of a mapping, all tensors of floating point but
            running means and variances. Other tensors of floating point are permuted and averaged with them, and what is not (counters) is
            taken from the first model.
        spec: The symmetries of the network.
        method: One of the above.
        weights: A positive number for each model, its share in the merge up to scale, and in what is maximised. Default: even.
        seed: Seed of the order of the models in ``"merge-many"`` and of the particles in ``"barycenter"``; the third method draws nothing.
        max_steps: Bound on the steps of the climb, the sweeps over the models, or the passes over the groups.

    Returns:
        The merge and the permutations of each model; their spread is never larger than that of the models as they are.

    Raises:
        ValueError: If there are fewer than two models, their architectures differ, one holds a NaN or an infinite parameter, the spec is
            that of another network, the method is unknown, or the weights do not fit.
    """
    started = perf_counter()
    tensors, matched = _read(models)
    spec.validate(tensors[0])
    shares = even_shares(weights, len(tensors))
    restricted = restrict(spec, matched[0])
    moving = PermutationSpec({name: group for name, group in restricted.groups.items() if group.axes})
    frame = _frame(Members(in_units(matched), shares, moving), method, seed, max_steps)
    permutations = [{**spec.identity(), **own} for own in frame.permutations]
    moved = [permute(model, spec, own) for model, own in zip(tensors, permutations, strict=True)]
    return ManyMerge(
        _average(moved, shares), permutations, frame.history, method, frame.converged, perf_counter() - started
    )


def _frame(members: Members, method: str, seed: int, max_steps: int) -> Frame:
    generator = torch.Generator().manual_seed(seed)
    if method == "cycle-consistent":
        return cycle_consistent_frame(members, max_steps)
    if method == "merge-many":
        return merge_many_frame(members, generator, max_steps)
    if method == "barycenter":
        return barycenter_frame(members, generator, max_steps)
    raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")


def _read(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return all tensors of every model, and in float64 on the CPU those that are matched."""
    if isinstance(models, nn.Module | Mapping) or len(models) < 2:
        raise ValueError("models must be a sequence of at least two modules or mappings of weights by name.")
    tensors = [{name: tensor.detach() for name, tensor in tensors_of(model).items()} for model in models]
    for index, model in enumerate(tensors):
        try:
            check_same_architecture(model, tensors[0])
        except ValueError as error:
            raise ValueError(f"models[{index}] does not fit models[0], the reference: {error}") from None
    names = _matched(models[0])
    matched = [exact({name: model[name] for name in names}) for model in tensors]
    for index, model in enumerate(tensors):
        for name, tensor in model.items():
            wrong = tensor.isnan().any() or (name in matched[index] and tensor.isinf().any())
            if wrong:
                raise ValueError(
                    f"Tensor {name!r} of models[{index}] holds a NaN or an infinity, so it cannot be merged."
                )
    return tensors, matched


def _matched(model: nn.Module | Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors by which models are matched."""
    if isinstance(model, nn.Module):
        return [name for name, _ in model.named_parameters()]
    return [name for name in model if name.rpartition(".")[2] not in _STATISTICS]


def _average(models: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted average of tensors of floating point, in float64 until the end; all others from the first model."""
    # Backwards, so that what is not averaged comes from the first; each step is exact where its two models are equal.
    later = list(accumulate(reversed(shares)))
    merged = _precise(models[-1])
    for model, before, after in zip(reversed(models[:-1]), later, later[1:], strict=False):
        merged = interpolate(merged, _precise(model), before / after)
    return {name: tensor.to(models[0][name], copy=True) for name, tensor in merged.items()}


def _precise(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is of floating point in float64 on the CPU, and all else as it is."""
    return {name: tensor.cpu().double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
