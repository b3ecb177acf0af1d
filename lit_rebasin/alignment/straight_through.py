"""The straight-through estimator: train weights that are rounded to the nearest permutation of the model."""

from collections.abc import Callable, Mapping
from time import perf_counter

import torch
from torch import Tensor

from lit_rebasin.alignment.candidates import Candidates
from lit_rebasin.alignment.progress import shown
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.alignment.sinkhorn import has_finite_gradients
from lit_rebasin.alignment.weights import weight_matching
from lit_rebasin.symmetry import PermutationSpec, permute
from lit_rebasin.transport.arguments import check_count, check_positive


def straight_through_alignment(
    model: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    spec: PermutationSpec,
    cost: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    evaluate: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    init: Mapping[str, Tensor] | None = None,
    steps: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Alignment:
    """Train free weights by the cost of the permuted model that is nearest to them (Ainsworth et al., ICLR 2023, algorithm 2).

    The free weights start at the reference. Each step matches the model to them (weight matching, from where the last step ended), takes the
    gradient of the cost at the hard-permuted model, and lets Adam move the free weights by it.

    Args:
        model: Weights of the model to permute.
        reference: Parameters of the one that stays put; what the model has beyond them is permuted along.
        spec: The symmetries of the two.
        cost: Maps permuted weights to a scalar; may draw a batch of its own at each call.
        evaluate: Maps permuted weights to the scalar by which candidates are compared; always the same data. Default: ``cost``.
        init: The permutations to start from, by group name. Default: the identity.
        steps: Gradient steps. With 0 the start is returned.
        learning_rate: Of the free weights.
        seed: Seed of the order in which groups are matched.

    Returns:
        The best candidate by ``evaluate``, never worse than the start; its history holds that cost for the start and for ten candidates or more
        along the way. ``converged`` says whether the last tenth of the steps has moved no neuron.

    Raises:
        ValueError: If a number is out of range, or the two models differ in names or shapes.
    """
    check_count("steps", steps, 0)
    check_positive(learning_rate=learning_rate)
    started = perf_counter()
    # Steps of this size are lost in half precision.
    free = {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True).requires_grad_()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in reference.items()
    }
    compared = {name: model[name] for name in free if name in model}
    optimizer = torch.optim.Adam([tensor for tensor in free.values() if tensor.requires_grad], lr=learning_rate)
    seen = Candidates(model, spec, evaluate or cost)
    permutations = {**spec.identity(), **(init or {})}
    seen.offer(permutations)
    still = 0
    for step in shown(range(1, steps + 1), "Straight-through estimator", steps):
        before = permutations
        permutations = weight_matching(compared, free, spec, init=permutations, seed=seed + step).permutations
        still = still + 1 if all(torch.equal(p, before[name]) for name, p in permutations.items()) else 0
        hard = permute(model, spec, permutations)
        # The value of the hard weights, the gradient of the free ones.
        through = {
            name: hard[name].detach() + (one - one.detach()).to(hard[name].dtype)
            for name, one in free.items()
            if one.requires_grad
        }
        value = cost({**hard, **through})
        if value.isfinite():
            optimizer.zero_grad()
            value.backward()
            if has_finite_gradients(optimizer):
                optimizer.step()
        if step % max(1, steps // 10) == 0 or step == steps:
            seen.offer(permutations)
    converged = still >= max(1, steps // 10)
    return Alignment(
        seen.permutations, seen.cost, seen.history, "straight-through", converged, perf_counter() - started
    )
