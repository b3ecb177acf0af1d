"""The diagonal of the Fisher information: how much a network's predictions depend on each of its weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from lit_rebasin.alignment.progress import shown
from lit_rebasin.merging.data import arguments_of, evaluating, labelled, to_device

# Entries of single examples' gradients that are held at a time (32 MiB of float32: more is slower on a CPU), and the fewest examples.
_HELD, _FEWEST = 2**23, 8

Weights = dict[str, Tensor]


def diagonal_fisher(
    model: nn.Module, dataloader: Iterable[Any], *, loss: Callable[[Any, Any], Tensor] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradients of the log-likelihood of one example.

    Without ``loss``, of a classifier whose outputs are logits, with labels drawn from its own predictions: one draw an example of the Fisher
    information ``E_x E_{y ~ p(y|x)} (d log p(y|x) / d w)^2``, which is the curvature of the loss where the predictions fit (Kunstner et al.,
    NeurIPS 2019, tell it from the next). With ``loss``, at the targets of the data, which is the empirical Fisher. The network runs in
    evaluation mode and is not changed.

    Args:
        model: The network.
        dataloader: Batches that begin with an input and, for ``loss``, a target; each one example a row. Bare inputs do without ``loss``.
        loss: ``loss(output, target)``, the negative log-likelihood of a batch of one.
        seed: Seed of the labels that are drawn.

    Returns:
        For every parameter that takes a gradient, by name, a tensor of its shape.

    Raises:
        TypeError: If a batch lacks what is needed, or the output is no tensor of logits and ``loss`` is not given.
        ValueError: If there are no batches.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    totals = zeros_to_sum(weights)
    measure = loss if loss is not None else cross_entropy

    def example_loss(weights: Weights, *example: Tensor) -> Tensor:
        *inputs, target = (part.unsqueeze(0) for part in example)
        return measure(functional_call(model, weights, tuple(inputs)), target)

    examples = 0
    squares = SquaredGradients(example_loss)
    with evaluating(model):
        pairs = labelled(dataloader, model) if loss is not None else _self_labelled(model, dataloader, generator)
        for inputs, target in shown(pairs, "Fisher information"):
            for name, square in squares(weights, *arguments_of(inputs), target).items():
                totals[name] += square
            examples += len(target)
    return {name: total / examples for name, total in totals.items()}


def zeros_to_sum(weights: Weights) -> Weights:
    """Return zeros of the shapes of some weights, in a precision that squares of gradients can be summed in."""
    return {name: torch.zeros_like(_wide(tensor)) for name, tensor in weights.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class SquaredGradients:
    """The sum over examples of the squared gradients of their losses; one by one as soon as ``vmap`` cannot take the network.

    Args:
        loss: ``loss(weights, *example)``, of one example.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss
        self.vectorized = True

    def __call__(self, weights: Weights, *batch: Tensor) -> Weights:
        """Return the sums by name, over the examples that lie along the first dimension of every tensor of a batch."""
        entries = sum(tensor.numel() for tensor in weights.values())
        chunk = max(_FEWEST, _HELD // max(1, entries))
        parts = [self._of_chunk(weights, some) for some in zip(*(tensor.split(chunk) for tensor in batch), strict=True)]
        return {name: torch.stack([part[name] for part in parts]).sum(0) for name in weights}

    def _of_chunk(self, weights: Weights, batch: tuple[Tensor, ...]) -> Weights:
        if self.vectorized:
            try:
                gradients = vmap(grad(self.loss), in_dims=(None, *(0 for _ in batch)))(weights, *batch)
                return {name: _wide(gradient).square().sum(0) for name, gradient in gradients.items()}
            except (RuntimeError, NotImplementedError, ValueError):
                # Branches on data, operators without a rule, random numbers. A fault of the network's own comes up again below.
                self.vectorized = False
        totals = zeros_to_sum(weights)
        for example in zip(*batch, strict=True):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
            gradients = torch.autograd.grad(self.loss(leaves, *example), list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    totals[name] += _wide(gradient).square()
        return totals


def _self_labelled(
    model: nn.Module, dataloader: Iterable[Any], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs with labels drawn from the softmax of the model's logits."""
    empty = True
    for batch in dataloader:
        empty = False
        inputs = to_device(batch[0] if isinstance(batch, tuple | list) else batch, model)
        with torch.no_grad():
            logits = model(*arguments_of(inputs))
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            raise TypeError("The model's output is no tensor of logits with classes in dimension 1: give a loss.")
        shares = logits.movedim(1, -1).softmax(-1).cpu()
        labels = torch.multinomial(shares.flatten(0, -2), 1, generator=generator).view(shares.shape[:-1])
        yield inputs, labels.to(logits.device)
    if empty:
        raise ValueError("dataloader gave no batches: it is empty.")
