"""The diagonal Fisher information of a training step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils import _pytree as pytree

from lit_rebasin.callbacks.refusal import reason_of
from lit_rebasin.callbacks.step_loss import NoLossError, StepLoss
from lit_rebasin.merging import SquaredGradients, zeros_to_sum
from lit_rebasin.merging.data import evaluating
from lit_rebasin.merging.path import weights_of

# Examples that a merge measures it on. The sums of it that choose an alpha run over all weights, so they need few.
_EXAMPLES = 256
_ELSE = "give alpha a number, or line-search."


def step_fisher(step: StepLoss, weights: Mapping[str, Tensor], batches: Sequence[Any]) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradients of ``training_step`` on one example: the empirical Fisher information.

    BatchNorm uses its running statistics, for one example has none. Use inside :meth:`StepLoss.quiet`.

    Args:
        step: The training step.
        weights: All parameters and buffers.
        batches: Training batches, of which some 256 examples are taken in equal shares.

    Returns:
        For every parameter that takes a gradient, by name, a tensor of its shape.

    Raises:
        ValueError: If the tensors of a batch do not hold one example along their first dimension each.
    """
    measured = {name: weights[name] for name, parameter in step.module.named_parameters() if parameter.requires_grad}
    totals = zeros_to_sum(measured)
    examples = 0
    with evaluating(step.module), step.silent():
        for batch in batches:
            leaves, structure = pytree.tree_flatten(batch)
            places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim]
            length = _length([leaves[k] for k in places])
            count = min(length, -(-_EXAMPLES // len(batches)))
            # Evenly over the batch, whose replayed examples may stand together at its end.
            chosen = torch.arange(count, device=leaves[places[0]].device) * length // max(1, count)

            def loss(
                measured: dict[str, Tensor], *example: Tensor, leaves: Any = leaves, structure: Any = structure
            ) -> Tensor:
                given = iter(example)
                single = [
                    next(given).unsqueeze(0) if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves
                ]
                return step.at({**weights, **measured}, pytree.tree_unflatten(single, structure))

            squares = SquaredGradients(loss)(measured, *(leaves[k][chosen] for k in places))
            for name, square in squares.items():
                totals[name] += square
            examples += count
    return {name: total / examples for name, total in totals.items()}


def check_fisher(step: StepLoss, batch: Any) -> None:
    """Raise a MisconfigurationException if single examples teach nothing, before a task is spent."""
    with step.quiet():
        try:
            found = step_fisher(step, weights_of(step.module), [batch])
        except NoLossError:
            return
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        except (RuntimeError, TypeError, LookupError) as error:
            if reason_of(error) is not None:
                raise
            raise MisconfigurationException(
                f"{type(step.module).__name__}.training_step cannot be run on single examples, as the Fisher information needs ({error}): "
                f"{_ELSE}"
            ) from error
    if not any(diagonal.any() for diagonal in found.values()):
        raise MisconfigurationException(
            f"{type(step.module).__name__}.training_step has no gradient on single examples, so there is no Fisher information: {_ELSE}"
        )


def _length(tensors: Sequence[Tensor]) -> int:
    lengths = {len(tensor) for tensor in tensors}
    if not lengths:
        raise ValueError(
            "A training batch holds no tensors in lists, tuples or dicts, so that its examples cannot be told apart, as the Fisher information "
            f"needs: {_ELSE}"
        )
    if len(lengths) > 1:
        raise ValueError(
            f"The tensors of a training batch have {sorted(lengths)} entries along their first dimension, so that its examples cannot be told "
            f"apart, as the Fisher information needs: {_ELSE}"
        )
    return lengths.pop()
