"""How sharply a loss bends: the largest eigenvalues of its Hessian, and its trace."""

import math
import warnings
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree
from torchmetrics import Metric
from typing_extensions import override

from lit_rebasin.merging.data import arguments_of, check_module, saying, to_device
from lit_rebasin.metrics.hessian import HessianProducts, Loss
from lit_rebasin.metrics.lanczos import HessianEigenvalues, largest_eigenvalues
from lit_rebasin.symmetry.keep import attributes_kept
from lit_rebasin.transport.arguments import check_count, check_function, check_number, check_seed

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class HessianTrace:
    """An estimate of the trace of a Hessian.

    Attributes:
        mean: The estimate, without bias.
        standard_error: Its standard deviation, estimated from the samples.
    """

    mean: float
    standard_error: float


def hessian_eigenvalues(
    loss: Loss,
    weights: Mapping[str, Tensor],
    count: int = 1,
    *,
    steps: int = 100,
    tolerance: float = _TOLERANCE,
    seed: int = 0,
) -> HessianEigenvalues:
    """Return the largest (not the largest absolute) eigenvalues of the Hessian of a loss.

    By Lanczos iteration with full reorthogonalisation from ``count`` random vectors (Ruhe, Mathematics of Computation 1979), on products of the
    Hessian with vectors (Pearlmutter, Neural Computation 1994), each of the cost of about two gradients. It keeps one vector a step: ``steps``
    times the memory of the weights at most, in float64 for weights of float64 and float32 for narrower ones.

    Args:
        loss: The loss as a function of weights by name, such as ``lambda w: cross_entropy(functional_call(model, w, x), y)``.
            It is called once.
        weights: Parameters by name, of floating point. They are not written to.
        count: How many eigenvalues, counted with multiplicity.
        steps: The most products with the Hessian.
        tolerance: Where to stop: the largest residual, as a share of the largest absolute eigenvalue. Errors of eigenvalues are smaller.
        seed: Seed of the start vectors; the global random state is not used.

    Returns:
        The eigenvalues with their residuals, and whether they converged; if they did not, each is a lower bound.

    Raises:
        TypeError: If the loss is no function or gives no tensor, the weights are no mapping of tensors of floating point, ``tolerance`` is no
            number, or ``seed`` no whole number.
        ValueError: If ``count`` is more than there are weights or ``steps``, or the loss is not one number, is NaN or infinite, or does not
            depend on the weights.
    """
    check_count("count", count)
    check_count("steps", steps)
    if steps < count:
        raise ValueError(f"steps must be a whole number of at least count={count}, got {steps}.")
    check_number("tolerance", tolerance)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}.")
    check_seed(seed)
    products = HessianProducts(loss, weights)
    if count > products.size:
        raise ValueError(f"count must be at most the number of weights, {products.size}, got {count}.")
    return _eigenvalues(products, count, steps, tolerance, seed)


def hessian_trace(loss: Loss, weights: Mapping[str, Tensor], samples: int = 10, *, seed: int = 0) -> HessianTrace:
    """Return an estimate of the trace of the Hessian of a loss.

    The mean of ``v' H v`` over vectors of random signs (Hutchinson, Communications in Statistics 1989), which is exact where the Hessian is
    diagonal; in general its variance is ``2 / samples`` times the sum of the squares off the diagonal.

    Args:
        loss: The loss as a function of weights by name. It is called once.
        weights: Parameters by name, of floating point. They are not written to.
        samples: How many vectors, at least 2.
        seed: Seed of the vectors; the global random state is not used.

    Raises:
        TypeError: If the loss is no function or gives no tensor, the weights are no mapping of tensors of floating point, or ``seed`` is no
            whole number.
        ValueError: If there are fewer than 2 samples, or the loss is not one number, is NaN or infinite, or does not depend on the weights.
    """
    check_count("samples", samples, 2)
    check_seed(seed)
    return _trace(HessianProducts(loss, weights), samples, seed)


def _eigenvalues(products: HessianProducts, count: int, steps: int, tolerance: float, seed: int) -> HessianEigenvalues:
    start = torch.randn(count, products.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return largest_eigenvalues(products, start.to(products.device, products.dtype), steps=steps, tolerance=tolerance)


def _trace(products: HessianProducts, samples: int, seed: int) -> HessianTrace:
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(samples, dtype=torch.float64)
    for k in range(samples):
        signs = 2 * torch.randint(2, (products.size,), generator=generator) - 1
        vector = signs.to(products.device, products.dtype)
        values[k] = float(vector @ products(vector))
    return HessianTrace(float(values.mean()), float(values.std()) / math.sqrt(samples))


class Sharpness(Metric):
    """The largest eigenvalue and the trace of the Hessian of a network's loss, on data.

    ``update`` takes the network, inputs and a target, and measures ``loss(model(*inputs), target)`` on them in evaluation mode, with respect to
    the parameters that take a gradient. ``compute`` returns the means over the batches, weighted by their examples, in float64:
    ``{"eigenvalue", "trace"}``, NaN before any batch. The network, its gradients and the global random state are left as they were.

    Where ``loss`` is a mean over the examples of a batch, the Hessian of the whole data is the mean of those of the batches. The trace is
    linear, so its mean is that of the whole data in expectation over the samples. The largest eigenvalue is convex, so its mean over batches
    is an upper bound of that of the whole data: compare numbers of batches of one size.

    Args:
        loss: ``loss(output, target)``, one number.
        steps: The most products with the Hessian for the eigenvalue of a batch; a warning says where they were not enough.
        samples: Vectors for the trace of a batch, at least 2.
        seed: Seed of both, the same for every batch.
        **kwargs: Of :class:`~torchmetrics.Metric`.

    Raises:
        TypeError: If the loss is no function or gives no tensor, the seed no whole number, the network no module, or the target has no length.
        ValueError: If an argument is out of range, a batch is empty or does not fit the network or the loss, no parameter takes a gradient, or
            the loss is not one number, is NaN or infinite.

    Example::

        sharpness = Sharpness()
        for x, y in batches:
            sharpness.update(model, x, y)
        sharpness.compute()["eigenvalue"]
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound: float | None = None
    plot_upper_bound: float | None = None

    eigenvalue: Tensor
    trace: Tensor
    examples: Tensor

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor] = cross_entropy,
        *,
        steps: int = 100,
        samples: int = 10,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_function("loss", loss, "output and target")
        check_count("steps", steps)
        check_count("samples", samples, 2)
        check_seed(seed)
        self.loss, self.steps, self.samples, self.seed = loss, steps, samples, seed
        for name in ("eigenvalue", "trace", "examples"):  # sums over examples, and how many
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, model: nn.Module, inputs: Any, target: Any) -> None:
        """Measure a batch."""
        check_module("model", model)
        examples = _length(target)
        found, trace = self._measure(model, to_device(inputs, model), to_device(target, model))
        if not found.converged:
            warnings.warn(
                f"The largest eigenvalue of the Hessian had not converged after steps={self.steps}: {float(found.values[0]):.3g} is a lower "
                f"bound, with a residual of {float(found.residuals[0]):.2g}.",
                stacklevel=2,
            )
        self.eigenvalue += float(found.values[0]) * examples
        self.trace += trace.mean * examples
        self.examples += examples

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the means."""
        return {"eigenvalue": self.eigenvalue / self.examples, "trace": self.trace / self.examples}  # 0 / 0 is NaN

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one result, or several after each other, as :meth:`torchmetrics.Metric._plot` does."""
        return self._plot(val, ax)

    def _measure(self, model: nn.Module, inputs: Any, target: Any) -> tuple[HessianEigenvalues, HessianTrace]:
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if not weights:
            raise ValueError(f"No parameter of the {type(model).__name__} takes a gradient: there is no curvature.")
        devices = sorted({tensor.device.index for tensor in weights.values() if tensor.is_cuda})
        with torch.inference_mode(False), attributes_kept(model.modules()), torch.random.fork_rng(devices):
            model.eval()
            # Tensors of inference mode cannot be differentiated through, and what a forward pass writes to buffers goes to copies.
            inputs, target, buffers = pytree.tree_map_only(
                Tensor, torch.clone, (inputs, target, dict(model.named_buffers()))
            )

            def loss(candidate: Mapping[str, Tensor]) -> Tensor:
                with saying(f"{type(model).__name__} cannot be run on the inputs of the batch"):
                    output = functional_call(model, {**candidate, **buffers}, arguments_of(inputs))
                with saying("loss cannot be computed of the network's output and the target"):
                    return self.loss(output, target)

            products = HessianProducts(loss, weights)
            found = _eigenvalues(products, 1, self.steps, _TOLERANCE, self.seed)
            return found, _trace(products, self.samples, self.seed)


def _length(target: Any) -> int:
    """Return the number of examples of a batch."""
    if not isinstance(target, Sized) or (isinstance(target, Tensor) and target.ndim == 0):
        given = f"a {type(target).__name__}" + (" of one number" if isinstance(target, Tensor) else "")
        raise TypeError(f"target must have an entry for each example of the batch, got {given}.")
    if len(target) == 0:
        raise ValueError("target holds no example: there is no loss of an empty batch.")
    return len(target)
