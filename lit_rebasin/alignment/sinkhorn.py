"""Differentiable re-basin: soft permutations that are trained through any cost, and used hard."""

from collections.abc import Callable, Mapping
from math import log
from time import perf_counter

import torch
from torch import Tensor, nn

from lit_rebasin.alignment.candidates import Candidates
from lit_rebasin.alignment.progress import shown
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.symmetry import PermutationSpec, permute
from lit_rebasin.transport import Schedule, assignment, sinkhorn
from lit_rebasin.transport.arguments import check_count, check_positive

# Updates of a soft plan, as published. Rows are then off by little, and the gradient is that of the plan as it is.
_UPDATES = 20


class SinkhornRebasin(nn.Module):
    """Permute weights by plans with one trainable logit matrix a permutation group (Pena et al., CVPR 2023).

    In training mode the plans are soft, by Sinkhorn with an implicit gradient; in evaluation mode they are hard, by linear assignment. The
    logits start at ``sharpness`` times the permutation of ``init``, so that each neuron of it holds ``e^s / (e^s + size - 1)`` of its row: with
    the published 1 nearly even plans, 1 % at width 256, that forget where they start and look far; with 8 nearly hard ones, 92 %, that look
    near.

    Args:
        spec: The symmetries of the network; at least one group.
        init: The permutations to start from, by group name. Default: the identity.
        sharpness: Logit of the permutation of ``init`` at the start, above those of 0.
        noise: Standard deviation of what is added to the logits at the start.
        seed: Of the noise.

    Attributes:
        temperature: Regularization of the soft plans; starts at 1, lower is harder.

    Raises:
        ValueError: If the spec has no group, or ``sharpness`` or ``noise`` is negative.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        *,
        init: Mapping[str, Tensor] | None = None,
        sharpness: float = 1.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not spec.groups:
            raise ValueError("The spec has no permutation group, so there is nothing to align.")
        if not (sharpness >= 0 and noise >= 0):
            raise ValueError(f"sharpness and noise must be 0 or more, got {sharpness} and {noise}.")
        self.spec = spec
        self.temperature = 1.0
        generator = torch.Generator().manual_seed(seed)
        start = {**spec.identity(), **(init or {})}
        self.logits = nn.ParameterList()
        for name, group in spec.groups.items():
            logits = sharpness * torch.eye(group.size)[start[name].cpu()]
            self.logits.append(nn.Parameter(logits + noise * torch.randn(logits.shape, generator=generator)))

    def plans(self) -> dict[str, Tensor]:
        """Return the soft plan ``(size, size)`` of every group."""
        return {
            name: sinkhorn(logits=logits, regularization=self.temperature, max_iterations=_UPDATES, tolerance=0).plan
            for name, logits in zip(self.spec.groups, self.logits, strict=True)
        }

    def permutations(self) -> dict[str, Tensor]:
        """Return the hard permutation ``(size,)`` of every group, ``argmax_P <P, logits>``."""
        return {name: assignment(logits) for name, logits in zip(self.spec.groups, self.logits, strict=True)}

    def forward(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the permuted weights: softly in training mode, by hard permutations in evaluation mode."""
        return permute(weights, self.spec, self.plans() if self.training else self.permutations())


def sinkhorn_alignment(
    model: Mapping[str, Tensor],
    spec: PermutationSpec,
    cost: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    evaluate: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    init: Mapping[str, Tensor] | None = None,
    sharpness: float = 1.0,
    noise: float = 0.1,
    steps: int = 100,
    learning_rate: float = 0.3,
    schedule: Schedule | None = None,
    seed: int = 0,
    residual: Mapping[str, Tensor] | None = None,
    residual_learning_rate: float = 0.05,
    residual_weight_decay: float = 0.1,
    residual_clip: float = 1e-3,
) -> Alignment:
    """Train the plans of a :class:`SinkhornRebasin` on a cost, and return the best hard permutations seen.

    AdamW moves the logits while the temperature falls by a schedule, so that the soft network ends at the hard one. SGD with weight decay moves
    the residual, its gradient clipped elementwise (settings of the published incremental learning code). A step at which the cost or a gradient
    is not finite is left out, and a candidate of cost 0 is the last: neither a distance nor a loss can be below.

    Args:
        model: Weights of the model to permute.
        spec: Its symmetries.
        cost: Maps permuted weights to a scalar; may draw a batch of its own at each call, and may read ``residual``.
        evaluate: Maps hard-permuted weights to the scalar by which candidates are compared; always the same data. Default: ``cost``.
        init: Where to start, by group name. Default: the identity.
        sharpness: Logit of the permutation of ``init`` at the start, see :class:`SinkhornRebasin`.
        noise: Standard deviation of what is added to the logits at the start.
        steps: Gradient steps. With 0 the start is returned.
        learning_rate: Of the logits; 0 leaves them as they are, so that a residual alone is trained.
        schedule: Gives the temperature of each step. Default: from 1 to 0.5, ``Schedule(beta_0=1, kappa=log 2 / log(1 + steps))``.
        seed: Of the noise.
        residual: Leaf tensors that require gradients, which ``cost`` adds to the merge; trained in place.
        residual_learning_rate: Of the residual.
        residual_weight_decay: Of the residual.
        residual_clip: Largest absolute gradient of an entry of the residual.

    Returns:
        The best candidate by ``evaluate``, never worse than the start. Its history holds that cost for the start and for ten candidates or more
        along the way, infinite where it is NaN, and its cost is the least of them.

    Raises:
        ValueError: If a number is out of range.
    """
    check_count("steps", steps, 0)
    if not isinstance(schedule, Schedule | None):
        raise ValueError(f"schedule must be a Schedule, such as Schedule(beta_0=1, kappa=0.2), got {schedule!r}.")
    check_positive(residual_clip=residual_clip)
    if not (learning_rate >= 0 and residual_learning_rate >= 0 and residual_weight_decay >= 0):
        raise ValueError(
            "learning_rate, residual_learning_rate and residual_weight_decay must be 0 or more, "
            f"got {learning_rate}, {residual_learning_rate} and {residual_weight_decay}."
        )
    started = perf_counter()
    device = _device(model)
    rebasin = SinkhornRebasin(spec, init=init, sharpness=sharpness, noise=noise, seed=seed).to(device)
    schedule = schedule or Schedule(beta_0=1.0, kappa=log(2) / log(1 + max(1, steps)))
    residual = dict(residual or {})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rebasin.parameters(), lr=learning_rate)]
    if residual:
        decay = residual_weight_decay
        optimizers.append(torch.optim.SGD(residual.values(), lr=residual_learning_rate, weight_decay=decay))
    seen = Candidates(model, spec, evaluate or cost)
    seen.offer({**spec.identity(), **(init or {})}, residual)
    for step in shown(range(1, steps + 1), "Sinkhorn re-basin", steps):
        rebasin.temperature = schedule.regularization(step)
        rebasin.train()
        value = cost(rebasin(model))
        if value.isfinite():
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()
            if residual:
                nn.utils.clip_grad_value_(residual.values(), residual_clip)
            if all(has_finite_gradients(optimizer) for optimizer in optimizers):
                for optimizer in optimizers:
                    optimizer.step()
        if step % max(1, steps // 10) == 0 or step == steps:
            seen.offer(rebasin.permutations(), residual)
            if seen.cost == 0:
                break
    return Alignment(
        seen.permutations,
        seen.cost,
        seen.history,
        "sinkhorn",
        seen.cost == 0 or _is_hard(rebasin),
        perf_counter() - started,
        seen.residual,
    )


def has_finite_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step would leave all that the optimizer trains finite."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return all(bool(parameter.grad.isfinite().all()) for parameter in parameters if parameter.grad is not None)


def _is_hard(rebasin: SinkhornRebasin) -> bool:
    """Return whether nine tenths of every soft plan lie on its hard permutation, so that the soft network stands for the hard one."""
    with torch.no_grad():
        pairs = zip(rebasin.plans().values(), rebasin.permutations().values(), strict=True)
        return all(float(plan.cpu()[torch.arange(len(p)), p].mean()) > 0.9 for plan, p in pairs)


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(iter(tensors.values())).device
