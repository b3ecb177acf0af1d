"""A batch of transport problems, checked, and the log-domain updates that are safe at any temperature."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from lit_rebasin.transport.laplacian import Array, row_chunks, row_maxima

# Share of a row beside its largest entry up to which it may be called sharp.
_SHARP = 0.1
# Error that is let pass in what a row has beside its largest entry, as a share of it.
_SHARE_OF_THE_REST = 1e-3
# Relative difference of the total masses that is taken for rounding.
_MASS_TOLERANCE = 1e-4


def row_error(sums: Array, a: Array) -> Array:
    """Return the largest deviation ``(B,)`` of sums ``(B, n)`` from the masses of the rows, relative to the mean mass."""
    return row_maxima(abs(sums - a)) * (a.shape[-1] / a.sum(-1))


@dataclass
class Problem:
    """Costs ``(B, n, m)``, a rate a problem, and masses ``(B, n)`` and ``(B, m)``.

    The scores are ``x = rate * cost`` with ``rate = -1 / regularization``, or its negative for logits. Potentials are logarithms, and the plan
    is ``exp(x + phi + psi)``. Costs and masses are all float32 or all float64.

    Attributes:
        cost: ``(B, n, m)``.
        rates: One a problem, plain numbers.
        masses: Of the rows and of the columns, or None where all are ones, so that nothing need be asked of them.
    """

    cost: Tensor
    rates: list[float]
    masses: tuple[Tensor, Tensor] | None = None

    @cached_property
    def a(self) -> Tensor:
        """Masses of the rows."""
        return torch.ones_like(self.cost[..., 0]) if self.masses is None else self.masses[0]

    @cached_property
    def b(self) -> Tensor:
        """Masses of the columns."""
        return torch.ones_like(self.cost[..., 0, :]) if self.masses is None else self.masses[1]

    @cached_property
    def rate(self) -> Tensor:
        """The rates as a float64 tensor ``(B, 1)``, for potentials."""
        return torch.tensor(self.rates, dtype=torch.float64, device=self.cost.device)[:, None]

    @cached_property
    def log_a(self) -> Tensor:
        """Logarithms of the masses of the rows, float64."""
        return self.a.double().log()

    @cached_property
    def log_b(self) -> Tensor:
        """Logarithms of the masses of the columns, float64."""
        return self.b.double().log()

    @cached_property
    def bounds(self) -> list[tuple[float, float]]:
        """The least and the largest score of each problem."""
        if self.cost.shape[0] == 1:  # many times as fast as along a dimension
            low, high = torch.aminmax(self.cost)
            ends = [(low.item(), high.item())]
        else:
            flat = self.cost.flatten(1)
            ends = list(zip(flat.amin(-1).tolist(), flat.amax(-1).tolist(), strict=True))
        return [
            (low * rate, high * rate) if rate > 0 else (high * rate, low * rate)
            for (low, high), rate in zip(ends, self.rates, strict=True)
        ]

    @property
    def span(self) -> float:
        """The largest difference between two scores of one problem."""
        return max(high - low for low, high in self.bounds)

    def largest_logarithm(self) -> float:
        """Return the largest absolute logarithm of a positive mass."""
        return 0.0 if self.masses is None else max(float(mass[mass > 0].log().abs().max()) for mass in self.masses)

    def is_sharp(self, plan: Tensor, error: float) -> bool:
        """Return whether a row of a plan has almost all of its mass on one entry, and the rest is not far above an error."""
        rest = min(error / _SHARE_OF_THE_REST, _SHARP)
        return bool((plan.amax(-1) > (1 - rest) * self.a).any())

    def at(self, factor: float) -> "Problem":
        """Return the problem with all scores multiplied by a factor."""
        return replace(self, rates=[rate * factor for rate in self.rates])

    def balanced(self) -> "Problem":
        """Return the same problem with the total of ``b`` brought to that of ``a``, from which rounding keeps it apart."""
        if self.masses is None:
            return self
        total_a, total_b = (mass.sum(-1, keepdim=True) for mass in self.masses)
        return self if torch.equal(total_a, total_b) else replace(self, masses=(self.a, self.b * (total_a / total_b)))

    def check(self, name: str) -> None:
        """Raise a ValueError about numbers that no plan exists for.

        Args:
            name: What the caller calls the cost.
        """
        if not all(isfinite(low) and isfinite(high) for low, high in self.bounds):
            if self.cost.isfinite().all():
                raise ValueError(f"regularization is too small for the size of {name}: their quotient overflows.")
            raise ValueError(f"{name} holds a NaN or an infinity.")
        if self.masses is None:
            return
        for word, mass in zip("ab", self.masses, strict=True):
            if not bool((mass >= 0).all() & mass.isfinite().all()):
                raise ValueError(f"{word} holds a mass that is negative, infinite or NaN.")
        total_a, total_b = self.a.sum(-1), self.b.sum(-1)
        if not (total_a > 0).all():
            raise ValueError("a has no mass at all.")
        if ((total_a - total_b).abs() > _MASS_TOLERANCE * total_a).any():
            worst = int((total_a - total_b).abs().argmax())
            raise ValueError(
                f"a and b must have the same total mass, got {float(total_a[worst]):g} and {float(total_b[worst]):g}."
            )

    def scores(self, rows: slice, phi: Tensor | None, psi: Tensor | None) -> Tensor:
        """Return some rows of ``x + phi + psi`` in float64: sharp plans are differences of large numbers."""
        scores = self.cost[:, rows] * self.rate[:, :, None]
        if phi is not None:
            scores += phi[:, rows, None]
        return scores if psi is None else scores.add_(psi[:, None, :])

    def plan(self, phi: Tensor, psi: Tensor) -> Tensor:
        """Return ``exp(x + phi + psi)``, to the precision of the costs' type."""
        plan = torch.empty_like(self.cost, memory_format=torch.contiguous_format)
        for rows in row_chunks(self.cost):
            torch.exp(self.scores(rows, phi, psi).to(plan.dtype), out=plan[:, rows])
        return plan

    def row_update(self, psi: Tensor) -> Tensor:
        """Return ``phi = log a - logsumexp_j(x + psi)``."""
        phi = torch.empty_like(self.log_a)
        for rows in row_chunks(self.cost):
            scores = self.scores(rows, None, psi)
            largest = scores.amax(-1, keepdim=True)
            phi[:, rows] = -largest[..., 0] - scores.sub_(largest).exp_().sum(-1).log_()
        return phi + self.log_a

    def column_update(self, phi: Tensor) -> Tensor:
        """Return ``psi = log b - logsumexp_i(x + phi)``, summed over the chunks relative to the largest score so far."""
        largest = torch.full_like(self.log_b, -torch.inf)
        sums = torch.zeros_like(self.log_b)
        for rows in row_chunks(self.cost):
            scores = self.scores(rows, phi, None)
            higher = torch.maximum(largest, scores.amax(-2))
            # Of rows without mass -inf is left as it is: exp(-inf - finite) is 0.
            safe = higher.clamp_min(torch.finfo(torch.float64).min)
            sums = sums * (largest - safe).exp() + scores.sub_(safe[:, None]).exp_().sum(-2)
            largest = higher
        return self.log_b - largest - sums.log_()
