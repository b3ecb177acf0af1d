"""Products of a loss's Hessian with vectors."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_rebasin.transport.arguments import check_function

Loss = Callable[[Mapping[str, Tensor]], Tensor]


class HessianProducts:
    """``v -> H v`` for the Hessian ``H`` of a loss with respect to all weights, laid one after another.

    The loss and its gradient are computed once; each product is one more backward pass through the gradient (Pearlmutter, Neural Computation
    1994). Where the gradient does not depend on the weights, as in a piecewise linear network under a linear loss, products are zero.

    Args:
        loss: The loss as a function of weights by name.
        weights: Tensors of floating point by name. They are not written to.

    Attributes:
        size: Number of weights ``n``.
        dtype: Of vectors: that of the widest weights, at least float32.
        device: Of vectors: that of the first weights.

    Raises:
        TypeError: If the loss is no function or gives no tensor, or the weights are no mapping of tensors of floating point.
        ValueError: If there are no weights, or the loss is not one number, is NaN or infinite, or does not depend on the weights.
    """

    def __init__(self, loss: Loss, weights: Mapping[str, Tensor]) -> None:
        check_function("loss", loss, "weights by name")
        self.dtype = _check(weights)
        with twice_differentiable():
            leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
            self.leaves = list(leaves.values())
            value = checked_loss(loss(leaves))
            gradients = torch.autograd.grad(value, self.leaves, create_graph=True, allow_unused=True)
        # A gradient without a graph is constant: its derivative is zero.
        self.gradients = [(k, one) for k, one in enumerate(gradients) if one is not None and one.requires_grad]
        self.size = sum(leaf.numel() for leaf in self.leaves)
        self.device = self.leaves[0].device

    def __call__(self, vector: Tensor) -> Tensor:
        """Return ``H v``, ``(n,)`` in the dtype of ``v``.

        Args:
            vector: ``(n,)``.

        Raises:
            ValueError: If the product is NaN or infinite.
        """
        parts = vector.split([leaf.numel() for leaf in self.leaves])
        along = [parts[k].view_as(gradient).to(gradient) for k, gradient in self.gradients]
        product = torch.zeros_like(vector)
        if self.gradients:
            with twice_differentiable():
                found = torch.autograd.grad(
                    [gradient for _, gradient in self.gradients],
                    self.leaves,
                    along,
                    retain_graph=True,
                    allow_unused=True,
                )
            pieces = product.split([leaf.numel() for leaf in self.leaves])
            for piece, one in zip(pieces, found, strict=True):
                if one is not None:
                    piece.copy_(one.flatten())
        if not product.isfinite().all():
            raise ValueError("The Hessian of the loss at these weights is NaN or infinite, though the loss is not.")
        return product


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Record gradients whatever the surroundings, with kernels of attention that can be differentiated twice."""
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def checked_loss(value: Tensor) -> Tensor:
    """Return a loss of which a gradient can be taken, as a scalar.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is not one number, is NaN or infinite, or does not depend on anything that takes a gradient.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor of one number, got a {type(value).__name__}.")
    if value.numel() != 1:
        raise ValueError(f"loss must return one number, such as a mean over the batch, got shape {tuple(value.shape)}.")
    if not value.isfinite().all():
        raise ValueError(f"The loss at these weights is {value.item()}, so it has no curvature or gradient to measure.")
    if not value.requires_grad:
        raise ValueError(
            "The loss does not depend on the weights that it was given: compute it from them, without detach or no_grad."
        )
    return value.reshape(())


def _check(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype for vectors."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must be tensors by name, such as dict(model.named_parameters()), got a {type(weights).__name__}."
        )
    dtype = torch.float32
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"weights must be tensors of floating point, got {kind} for {name!r}: leave it out.")
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not sum(tensor.numel() for tensor in weights.values()):
        raise ValueError("weights holds no numbers, so there is nothing to differentiate by.")
    return dtype
