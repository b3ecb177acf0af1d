"""The Wasserstein barycenter of several point clouds, regularized twice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PARTICLE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class BarycenterResult:
    """What a barycenter solve found; all tensors are detached.

    Attributes:
        support: ``(n, d)``, the points of the barycenter: the given support, or the particles.
        mass: ``(n,)``, non-negative and summing to one; ``1 / n`` each where they are particles.
        plans: One ``(n, m_k)`` a measure, in their order: the mass that goes from each point of the support to each point of the measure. Its
            rows sum to ``mass`` up to rounding, its columns to the mass of the measure within ``error``.
        error: The largest ``sum_j |column sum j - mass j|`` of a plan, at most 2. On a fixed support it is the gradient of the dual, so 0 is
            the optimum. Of particles it says how well the last plans are solved, not whether the particles have come to rest.
        iterations: Damped Sinkhorn updates on a fixed support, particle steps otherwise.
        converged: Whether ``error`` is within the tolerance.
    """

    support: Tensor
    mass: Tensor
    plans: tuple[Tensor, ...]
    error: float
    iterations: int
    converged: bool


def doubly_regularized_barycenter(
    measures: Sequence[Tensor | tuple[Tensor, Tensor]],
    weights: Tensor | Sequence[float] | None = None,
    inner: float = 0.05,
    outer: float | None = None,
    *,
    support: Tensor | None = None,
    max_iterations: int = 5000,
    tolerance: float = 1e-5,
    particles: int = 200,
    steps: int = 200,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
) -> BarycenterResult:
    """Return the measure ``mu`` that minimises ``sum_k w_k T(mu, nu_k) + outer * KL(mu | reference)``.

    ``T(mu, nu) = min_pi <c, pi> + inner * KL(pi | mu x nu)`` over the couplings of ``mu`` and ``nu``, with ``c(x, y) = |x - y|^2 / 2`` (Chizat,
    arXiv 2303.11844, the barycenter of strengths lambda = ``inner`` and tau = ``outer``). With ``outer = inner / 2`` the two blurs cancel to
    the first order and the error falls as ``inner^2``; ``outer = inner`` is the classical entropic barycenter of Benamou et al. (2015).

    With a ``support`` the reference is uniform on it and the mass comes from damped Sinkhorn iterations (Vaskevicius and Chizat, NeurIPS 2023).
    Without, the reference is the Lebesgue measure and the barycenter is sampled by noisy particle gradient descent (Chizat): each step
    moves a particle towards the mean of where the plans send it and adds Gaussian noise of variance ``2 * outer * step_size``. A finite
    step adds to the variance of the sample, most where the measures are single points: the fraction ``step_size / (2 - step_size)``.

    Args:
        measures: The ``nu_k``: each ``(m_k, d)`` points of even mass, or a pair of such points and their mass ``(m_k,)``, scaled to sum to one.
        weights: ``(K,)``, the ``w_k``, scaled to sum to one; even by default.
        inner: Strength of the inner regularization, above 0, in the units of the cost.
        outer: Strength of the outer one, above 0; ``inner / 2`` by default.
        support: ``(n, d)``, distinct points on which the barycenter lives. Points of an even grid, finer than ``sqrt(inner)``, stand for the
            whole space.
        max_iterations: Bound on the Sinkhorn updates, of each step where there are particles.
        tolerance: Stop the updates once ``BarycenterResult.error`` is this small; 0 runs all of them. Before the last step of particles, 1e-3
            is near enough: against 1e-5 it moved the mean of 300 by less than 1e-4, where their noise is 0.04.
        particles: Number of particles; unused with a support, like all that follows.
        steps: Steps of the particles.
        step_size: Share of the way that a particle goes in a step, above 0 and at most 1.
        generator: Source of all random numbers; one seeded with 0 by default.

    Returns:
        The barycenter and the plans to the measures, in the widest dtype among the points, float32 at least. No gradient flows through it.

    Raises:
        ValueError: If ``measures`` is empty, points, masses or weights do not fit, hold a NaN, an infinity or a negative mass, or a number is
            out of range.
    """
    outer = inner / 2 if outer is None else outer
    for name, number in (("inner", inner), ("outer", outer)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {number}.")
    if max_iterations < 1 or not tolerance >= 0:
        raise ValueError(f"max_iterations must be >= 1 and tolerance >= 0, got {max_iterations} and {tolerance}.")
    if particles < 1 or steps < 1 or not 0 < step_size <= 1:
        raise ValueError(
            "particles and steps must be >= 1, and step_size above 0 and at most 1, "
            f"got {particles}, {steps} and {step_size}."
        )
    with torch.no_grad():
        points, log_mass, sizes = _read_measures(measures, support)
        w = _read_weights(weights, points)
        g = torch.zeros_like(log_mass)
        if support is not None:
            x = support.detach().to(points)
            log_mu, plans, g, error, iterations = _solve(
                _cost(x, points) / inner, log_mass, g, _even(x), max_iterations, tolerance, w, outer / inner
            )
        else:
            generator = torch.Generator().manual_seed(0) if generator is None else generator
            x = _draw(points, log_mass, w, particles, generator)
            log_mu, iterations = _even(x), steps
            for step in range(steps + 1):
                # The measures stay where they are, so their potentials are a good start for the next step.
                near = tolerance if step == steps else max(tolerance, _PARTICLE_TOLERANCE)
                _, plans, g, error, _ = _solve(_cost(x, points) / inner, log_mass, g, log_mu, max_iterations, near)
                if step == steps:
                    break
                goal = particles * torch.einsum("k,knm,kmd->nd", w, plans, points)
                noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
                x = x + step_size * (goal - x) + math.sqrt(2 * outer * step_size) * noise.to(x.device)
        cut = tuple(plan[:, :size] for plan, size in zip(plans, sizes, strict=True))
        return BarycenterResult(x, log_mu.exp(), cut, error, iterations, error <= tolerance)


def _solve(
    cost: Tensor,
    log_mass: Tensor,
    g: Tensor,
    log_mu: Tensor,
    max_iterations: int,
    tolerance: float,
    weights: Tensor | None = None,
    ratio: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, float, int]:
    """Ascend the dual in the log domain; return ``log mu``, the plans, the potentials, the error and the iterations.

    In units of ``inner``, with ``r = outer / inner`` and ``f_k = -LSE_y(log nu_k + g_k - c)``, the dual is
    ``sum_k w_k <g_k, nu_k> - r log sum_x exp(-sum_k w_k f_k / r)``, whose inner problem has ``mu ~ exp(-sum_k w_k f_k / r)``. The step is
    ``g_k <- g_k - s log(nu'_k / nu_k)``, with ``nu'_k`` the second marginal of the plan, and ``s = min(1, r)``. By Jensen's inequality, first
    over ``k``, then over the plan, the second term does not fall, while the first rises by ``s sum_k w_k KL(nu_k | nu'_k)``: so it converges
    for every ratio, where a full step diverges below 1/2.

    Args:
        cost: ``(K, n, m)``, in units of ``inner``.
        log_mass: ``(K, m)``, the log of the ``nu_k``; minus infinity where there is no mass.
        g: ``(K, m)``, the potentials to start from.
        log_mu: ``(n,)``, the log of ``mu``, which stays without ``weights``, so that these are Sinkhorn updates.
        max_iterations: Bound on the updates.
        tolerance: Error to stop at.
        weights: ``(K,)``, where the mass is free.
        ratio: ``outer / inner``, where the mass is free.
    """
    for iteration in range(1, max_iterations + 1):
        rows = (log_mass + g)[:, None, :] - cost
        f = -rows.logsumexp(-1)
        if weights is not None:
            log_mu = (-(weights @ f) / ratio).log_softmax(-1)
        excess = ((log_mu + f)[:, :, None] - cost).logsumexp(-2) + g
        # Not mass * expm1(excess): where there is no mass, the excess may be too large for an exponential.
        error = float(((log_mass + excess).exp() - log_mass.exp()).abs().sum(-1).amax())
        if iteration == max_iterations or error <= tolerance:
            break
        g = g - min(1.0, ratio) * excess
    return log_mu, (rows + (log_mu + f)[:, :, None]).exp(), g, error, iteration


def _even(x: Tensor) -> Tensor:
    """Return the log of even mass on the points ``x``."""
    return x.new_full((len(x),), -math.log(len(x)))


def _cost(x: Tensor, points: Tensor) -> Tensor:
    """Return half the squared distances, ``(K, n, m)``; by differences, as a product would lose the digits of points far from the origin."""
    return (
        torch.cdist(x.expand(len(points), *x.shape), points, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    )


def _draw(points: Tensor, log_mass: Tensor, weights: Tensor, particles: int, generator: torch.Generator) -> Tensor:
    """Draw particles to start from: the weighted means of independent draws from the measures, so that their mean is right already."""
    chosen = torch.multinomial(log_mass.exp().to(generator.device), particles, replacement=True, generator=generator)
    drawn = points.gather(1, chosen.to(points.device)[:, :, None].expand(-1, -1, points.shape[-1]))
    return torch.einsum("k,knd->nd", weights, drawn)


def _read_weights(weights: Tensor | Sequence[float] | None, points: Tensor) -> Tensor:
    """Return the weights as a tensor that sums to one."""
    if weights is None:
        return points.new_full((len(points),), 1 / len(points))
    w = torch.as_tensor(weights, dtype=points.dtype, device=points.device).detach()
    if w.shape != (len(points),):
        raise ValueError(
            f"weights must be one number for each of the {len(points)} measures, got shape {tuple(w.shape)}."
        )
    if not w.isfinite().all() or (w < 0).any() or not w.sum() > 0:
        raise ValueError("weights must be finite and non-negative, with a sum above 0.")
    return w / w.sum()


def _read_measures(
    measures: Sequence[Tensor | tuple[Tensor, Tensor]], support: Tensor | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the points ``(K, m, d)`` and the log of their mass ``(K, m)``, filled up to the largest measure, and the sizes of the measures."""
    if len(measures) == 0:
        raise ValueError("measures is empty; a barycenter needs at least one.")
    pairs = [(item, None) if isinstance(item, Tensor) else item for item in measures]
    named = [(f"points of measure {k}", points) for k, (points, _) in enumerate(pairs)]
    named += [] if support is None else [("support", support)]
    dtype = torch.float32
    for name, points in named:
        if points.ndim != 2 or 0 in points.shape:
            raise ValueError(f"The {name} must have the shape (points, dimensions), none 0, got {tuple(points.shape)}.")
        if points.shape[1] != named[0][1].shape[1]:
            raise ValueError(
                f"The {name} have {points.shape[1]} dimensions, but those of measure 0 have {named[0][1].shape[1]}."
            )
        if not points.isfinite().all():
            raise ValueError(f"The {name} hold a NaN or an infinity.")
        dtype = torch.promote_types(dtype, points.dtype)
    sizes = [len(points) for points, _ in pairs]
    stacked = pairs[0][0].new_zeros((len(pairs), max(sizes), pairs[0][0].shape[1]), dtype=dtype)
    log_mass = stacked.new_full((len(pairs), max(sizes)), -math.inf)
    for k, (points, mass) in enumerate(pairs):
        mass = log_mass.new_ones(len(points)) if mass is None else mass.detach().to(log_mass)
        if mass.shape != (len(points),):
            raise ValueError(
                f"The mass of measure {k} must be one number for each of its {len(points)} points, got shape {tuple(mass.shape)}."
            )
        if not mass.isfinite().all() or (mass < 0).any() or not mass.sum() > 0:
            raise ValueError(f"The mass of measure {k} must be finite and non-negative, with a sum above 0.")
        stacked[k, : len(points)] = points.detach()
        log_mass[k, : len(points)] = (mass / mass.sum()).log()
    return stacked, log_mass, sizes
