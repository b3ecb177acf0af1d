"""BatchNorm statistics of a merged network in closed form, from those of its endpoints."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.modules.batchnorm import _BatchNorm

from lit_rebasin.merging.data import evaluating, hooks
from lit_rebasin.merging.moments import Sighting, channels_of, rows_of_weight
from lit_rebasin.merging.path import LinearPath, alpha_of
from lit_rebasin.merging.repair import check_ends
from lit_rebasin.merging.statistics import has_batch_norm


def reset_batch_norm(
    merged: nn.Module,
    path: LinearPath,
    alpha: float | Mapping[str, float],
    forward: Callable[[Any], Any],
    batch: Any,
) -> list[str]:
    r"""Set running statistics of BatchNorm layers without data.

    Where the layer before sees the same input in both endpoints and in the merge, its output there has

    ``mean = alpha mean_p + (1 - alpha) mean_n`` and ``var = alpha^2 var_p + (1 - alpha)^2 var_n + 2 alpha (1 - alpha) rho std_p std_n``

    in every channel (Jordan et al., ICLR 2023, who measure the correlation ``rho`` on data). Here ``rho`` is the cosine of the two endpoints'
    weights of that channel, its value for inputs that are white; averaged running variances, which a merge has otherwise, are those of
    ``rho`` near 1, too large. So it is exact for the first layer on white data, and an approximation further on.

    Args:
        merged: The merged network; running means and variances of BatchNorm layers fed directly by a linear or convolutional layer are changed
            in place, others are left.
        path: The endpoints, as weights or modules.
        alpha: Weight of the previous model in the merge, one number or one by tensor name; a layer takes that of its weight.
        forward: Runs ``merged`` on one batch.
        batch: Any batch of the right shape, such as zeros: it only shows which layer feeds which BatchNorm.

    Returns:
        The names of the BatchNorm layers that were set.

    Raises:
        ValueError: If ``merged`` and the path differ in tensors or share memory.
    """
    check_ends(merged, [path.previous, path.new])
    names = {module: name for name, module in merged.named_modules()}
    statistics = {
        norm: _statistics(layer, names[layer], names[norm], path, alpha)
        for norm, layer in _fed_by(merged, forward, batch).items()
    }
    for norm, (mean, variance) in statistics.items():
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance)
    return [names[norm] for norm in statistics]


def _statistics(
    layer: nn.Module, name: str, norm: str, path: LinearPath, alpha: float | Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    share = alpha_of(alpha, f"{name}.weight")
    ends = [
        (end[f"{norm}.running_mean"].double(), end[f"{norm}.running_var"].double()) for end in (path.previous, path.new)
    ]
    (previous_mean, previous), (new_mean, new) = ends
    ours, theirs = (rows_of_weight(layer, end[f"{name}.weight"].detach().double()) for end in (path.previous, path.new))
    cross = cosine_similarity(ours, theirs, dim=1) * (previous * new).sqrt()
    variance = share**2 * previous + (1 - share) ** 2 * new + 2 * share * (1 - share) * cross
    return share * previous_mean + (1 - share) * new_mean, variance.clamp(min=0)


def _fed_by(model: nn.Module, forward: Callable[[Any], Any], batch: Any) -> dict[_BatchNorm, nn.Module]:
    """Return BatchNorm layers with running statistics, each with the one layer whose very output it reads."""
    outputs: dict[nn.Module, Sighting] = {}
    feeders: dict[_BatchNorm, set[nn.Module | None]] = {}

    def put_out(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[layer] = Sighting(output)

    def read(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        found = [layer for layer, output in outputs.items() if output.is_still(inputs[0])]
        feeders.setdefault(norm, set()).update(found or [None])

    with hooks() as handles, torch.no_grad(), evaluating(model):
        handles += [layer.register_forward_hook(put_out) for layer in channels_of(model).values()]
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                handles.append(module.register_forward_pre_hook(read))
        forward(batch)
    if not feeders and has_batch_norm(model):
        raise ValueError(
            "forward ran no BatchNorm layer of the merged network: give the network itself, or what calls it."
        )
    single = {norm: next(iter(layers)) for norm, layers in feeders.items() if len(layers) == 1}
    return {norm: layer for norm, layer in single.items() if layer is not None}
