"""How fast a layer's features are learned, and how straight."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lit_rebasin.transport.arguments import check_tensor


class FeatureSpeed(Metric):
    """How far one step of training moves the features of a layer, and at what angle to the backward pass.

    ``update`` takes the features of a layer before and after a step, and the gradient of the loss with respect to them before it, all of one
    shape ``(B, ...)``. ``compute`` returns four numbers in float64, over all that was seen as if it were one long vector:

    * ``speed``: ``|after - before| / |before|``, the relative change.
    * ``cosine``: of the angle between ``after - before`` and minus the gradient.
    * ``forward``: root mean square of ``before``.
    * ``backward``: root mean square of the gradient, of the loss as it is given: of a loss that is a mean over B examples, it is smaller by B
      than that of their sum.

    The feature speed formula (Chizat and Netrapalli, NeurIPS 2024, arXiv 2311.18718) says what they have to do with the loss. After a small
    step of gradient descent, in one batch, with learning rates ``eta_v`` and the gradients ``g_v`` of the layers up to this one,

        ``cosine * speed * forward * backward * entries = sum_v eta_v |g_v|^2``,

    which is what these layers take off the loss, to first order: of two layers with the same decay and backward pass, that with the smaller
    cosine has to move further.

    Vectors of zeros give no NaN: ``speed`` is 0 where nothing moved, and infinite where what moved was zero; ``cosine`` is 0 where there is no
    update or no gradient. Before any update all four are NaN, and so is what comes of features or gradients that are NaN.

    Args:
        **kwargs: Of :class:`~torchmetrics.Metric`.

    Raises:
        TypeError: If what an update takes are no tensors of floating point.
        ValueError: If the three tensors of an update differ in shape.

    Example::

        speed = FeatureSpeed()
        speed.update(before, after, gradient)
        speed.compute()["cosine"]
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound: float | None = None
    plot_upper_bound: float | None = None

    moved: Tensor
    features: Tensor
    gradients: Tensor
    along: Tensor
    entries: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Sums of squares of the updates, the features and the gradients, inner products of updates and minus gradients, and how many numbers.
        for name in ("moved", "features", "gradients", "along", "entries"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, before: Tensor, after: Tensor, gradient: Tensor) -> None:
        """Add the features of a batch, each ``(B, ...)``."""
        given = {"before": before, "after": after, "gradient": gradient}
        for name, tensor in given.items():
            check_tensor(name, tensor, floating=True)
        if len({tensor.shape for tensor in given.values()}) > 1:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
            raise ValueError(f"before, after and gradient must have one shape, got {shapes}.")
        start, end, slope = (tensor.detach().double().flatten() for tensor in given.values())
        step = end - start
        self.moved += step @ step
        self.features += start @ start
        self.gradients += slope @ slope
        self.along -= step @ slope
        self.entries += len(step)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return speed, cosine, forward and backward."""
        nothing = torch.where(self.entries > 0, 0.0, float("nan")).to(self.moved)
        lengths = self.moved.sqrt() * self.gradients.sqrt()  # the product of the squares may underflow
        return {
            "speed": torch.where(self.moved == 0, nothing, (self.moved / self.features).sqrt()),
            "cosine": torch.where(lengths == 0, nothing, self.along / lengths),
            "forward": (self.features / self.entries).sqrt(),  # 0 / 0 is NaN
            "backward": (self.gradients / self.entries).sqrt(),
        }

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one result, or several after each other, as :meth:`torchmetrics.Metric._plot` does."""
        return self._plot(val, ax)
