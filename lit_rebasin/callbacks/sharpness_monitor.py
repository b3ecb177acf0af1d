"""The callback that watches how sharp the minimum is that a training comes to."""

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lit_rebasin.callbacks.monitor import Monitor
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.merging.path import weights_of
from lit_rebasin.metrics import hessian_eigenvalues, hessian_trace
from lit_rebasin.transport.arguments import check_seed

# The largest eigenvalue to two or three digits, which is what a curve shows.
_TOLERANCE = 1e-2
_STEPS = 30
_SAMPLES = 4


class SharpnessMonitor(Monitor):
    """Log the largest eigenvalue of the Hessian of the training loss, and its trace.

    By Lanczos iteration and Hutchinson's estimator, on Hessian-vector products of ``training_step``, with respect to the parameters that are
    trained. Tags are ``sharpness/eigenvalue`` and ``sharpness/residual``, within which an eigenvalue of the Hessian lies, and
    ``sharpness/trace`` and ``sharpness/trace_error``, the standard error of the trace; see ``docs/curvature.md``. Put this callback before
    ``RebasinMerge`` to see the network as it was trained and not the merge.

    The iteration ends after 30 products at the latest, and what it has then is a lower bound.

    Args:
        every_n_epochs: How many epochs lie between two measurements; a task ends with one in any case.
        examples: How many examples are kept aside.
        seed: Seed of the vectors.

    Attributes:
        history: One entry a measurement: the epoch, the task and the numbers.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[SharpnessMonitor()])
    """

    def __init__(self, every_n_epochs: int = 1, examples: int = 128, seed: int = 0) -> None:
        super().__init__(every_n_epochs, examples)
        check_seed(seed)
        self.seed = seed

    @override
    def _measure(self, trainer: "pl.Trainer", step: StepLoss, batch: object) -> dict[str, float]:
        weights = weights_of(step.module)
        trained = {name: p.detach() for name, p in step.module.named_parameters() if p.requires_grad}

        def loss(candidate: Mapping[str, Tensor]) -> Tensor:
            return step.at({**weights, **candidate}, batch)

        top = hessian_eigenvalues(loss, trained, steps=_STEPS, tolerance=_TOLERANCE, seed=self.seed)
        trace = hessian_trace(loss, trained, _SAMPLES, seed=self.seed)
        return {
            "sharpness/eigenvalue": float(top.values[0]),
            "sharpness/residual": float(top.residuals[0]),
            "sharpness/trace": trace.mean,
            "sharpness/trace_error": trace.standard_error,
        }
