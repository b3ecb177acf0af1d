"""What an alignment minimises: functions of the permuted model's weights.

``weights`` are tensors by name. ``loss`` maps weights to a scalar, usually the task loss of one batch.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Loss = Callable[[Weights], Tensor]


def interpolate(previous: Weights, new: Weights, alpha: float) -> dict[str, Tensor]:
    """Return ``alpha * previous + (1 - alpha) * new``; what is neither real nor complex (counters) is taken from ``new``.

    Exact where the two are equal, and at both ends: what neither task has trained, such as a frozen layer or a mask of infinities, must not
    drift over many merges.
    """
    return {
        name: _mixed(previous[name].to(tensor.device, tensor.dtype), tensor, alpha)
        if tensor.is_floating_point() or tensor.is_complex()
        else tensor
        for name, tensor in new.items()
    }


def _mixed(previous: Tensor, new: Tensor, alpha: float) -> Tensor:
    mixed = torch.lerp(new, previous, alpha)
    return torch.where(new.isinf() & (new == previous), new, mixed)  # the difference of infinities is NaN


def add_residual(weights: Weights, residual: Weights) -> dict[str, Tensor]:
    """Return the weights with the residual added to the tensors that it names."""
    return {name: tensor + residual[name] if name in residual else tensor for name, tensor in weights.items()}


def l2_cost(permuted: Weights, reference: Weights) -> Tensor:
    """Return the mean squared difference of the weights, 0 if there are none.

    ``(1/|theta|) sum ||theta_ref - pi(theta)||^2`` (Pena et al., CVPR 2023, eq. 9).
    """
    return _mean([(ours - theirs).square() for ours, theirs in _pairs(permuted, reference)])


def l1_cost(permuted: Weights, reference: Weights) -> Tensor:
    """Return the mean absolute difference of the weights, 0 if there are none (the metric of Pena et al., CVPR 2023)."""
    return _mean([(ours - theirs).abs() for ours, theirs in _pairs(permuted, reference)])


def cosine_distance(permuted: Weights, reference: Weights) -> Tensor:
    """Return one less the cosine of the weights, all tensors taken as one vector; 0 if there are none."""
    pairs = _pairs(permuted, reference)
    if not pairs:
        return torch.zeros(())
    ours, theirs = (torch.cat([tensor.flatten() for tensor in side]) for side in zip(*pairs, strict=True))
    return 1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=0)


def _pairs(permuted: Weights, reference: Weights) -> list[tuple[Tensor, Tensor]]:
    """Return what is of floating point in both, the reference in the type and on the device of the other."""
    return [
        (tensor, reference[name].to(tensor.device, tensor.dtype))
        for name, tensor in permuted.items()
        if tensor.is_floating_point()
    ]


def _mean(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack([tensor.sum() for tensor in tensors]).sum() / sum(tensor.numel() for tensor in tensors)


def midpoint_cost(permuted: Weights, reference: Weights, loss: Loss) -> Tensor:
    """Return the loss half-way, ``C((theta_ref + pi(theta)) / 2)`` (Pena et al., CVPR 2023, "Mid")."""
    return loss(interpolate(reference, permuted, 0.5))


def random_point_cost(permuted: Weights, reference: Weights, loss: Loss, generator: torch.Generator) -> Tensor:
    """Return the loss at a uniformly drawn point of the linear path, a fresh one each call (Pena et al., CVPR 2023, "Rnd")."""
    return loss(interpolate(reference, permuted, float(torch.rand((), generator=generator))))


def incremental_cost(permuted: Weights, reference: Weights, loss: Loss, alpha: float, residual: Weights) -> Tensor:
    """Return the loss of the merge, ``C(alpha * theta_prev + (1 - alpha) * pi(theta_new) + delta)``.

    The incremental-learning cost of Pena et al. (CVPR 2023): their code evaluates it at alpha = 1/2 and merges elsewhere; here the caller
    gives the point. The weight decay of ``delta`` belongs to its optimizer.

    Args:
        permuted: Weights of the permuted new model.
        reference: Weights of the previous model.
        loss: Task loss, on the new task's batches mixed with replay.
        alpha: Weight of the previous model.
        residual: ``delta`` by name, for some or all of the parameters.
    """
    return loss(add_residual(interpolate(reference, permuted, alpha), residual))


def check_weights(name: str, weights: object) -> None:
    """Raise a TypeError unless an argument is tensors by name."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{name} must be tensors by name, such as a module's state_dict(), got a {type(weights).__name__}."
        )
    for key, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be tensors by name, got a {type(tensor).__name__} for {key!r}.")


def check_same_architecture(
    model: Weights, reference: Weights, names: tuple[str, str] = ("model", "reference")
) -> None:
    """Raise a ValueError that names the first tensor in which two models differ in name or shape.

    Args:
        model: Tensors by name.
        reference: Those of the other model.
        names: What the two models are called.
    """
    for name in [*model, *reference]:
        if name not in model or name not in reference:
            holder, other = names if name in model else names[::-1]
            raise ValueError(
                f"The {holder} has a tensor {name!r} that the {other} lacks: they are of different architectures."
            )
        if model[name].shape != reference[name].shape:
            raise ValueError(
                f"Tensor {name!r} has shape {tuple(model[name].shape)} in the {names[0]} and {tuple(reference[name].shape)} in the {names[1]}: "
                "they are of different architectures."
            )


# The costs by name: those of the weights alone, and those of the loss of networks on the path.
DISTANCES: dict[str, Callable[[Weights, Weights], Tensor]] = {
    "l1": l1_cost,
    "l2": l2_cost,
    "cosine": cosine_distance,
}
LOSS_COSTS = ("midpoint", "random-point", "incremental")
