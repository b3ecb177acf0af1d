"""One call for every way to find the permutation that carries a model towards a reference."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lit_rebasin.alignment.batches import Batches, inputs_of
from lit_rebasin.alignment.costs import (
    DISTANCES,
    LOSS_COSTS,
    check_same_architecture,
    incremental_cost,
    midpoint_cost,
    random_point_cost,
)
from lit_rebasin.alignment.methods import METHODS, Problem, check_method, check_start, find
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.symmetry import (
    FeatureReader,
    Features,
    PermutationSpec,
    attributes_kept,
    permutation_spec,
    use_batch_statistics,
)
from lit_rebasin.symmetry.spec import tensors_of

Weights = Mapping[str, Tensor]
# Batches that the candidates of a search are compared on.
_EVALUATED = 10


def align(
    model: nn.Module,
    reference: nn.Module,
    *,
    method: str = "weights",
    spec: PermutationSpec | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    cost: str | None = None,
    init: str | Mapping[str, Tensor] | None = None,
    alpha: float = 0.5,
    seed: int = 0,
    **options: Any,
) -> Alignment:
    """Find the permutation of a model's neurons that carries it towards a reference.

    Both networks are left as they are; ``permute(model, spec, alignment.permutations)`` applies what is found, and changes no output.

    ==================  ========  ==========================================================================================
    method              data      what it does
    ==================  ========  ==========================================================================================
    identity            -         nothing
    weights             -         weight matching by coordinate descent: :func:`weight_matching`
    covariance          inputs    the same in the metric of the layers' inputs: :func:`covariance_matching`
    frank-wolfe         -         all layers climb together: :func:`frank_wolfe_matching`
    activations         inputs    match what neurons respond to: :func:`activation_matching`
    straight-through    labels    train weights that are rounded to permutations: :func:`straight_through_alignment`
    sinkhorn            labels    train soft permutations on any cost: :func:`sinkhorn_alignment`
    ==================  ========  ==========================================================================================

    Args:
        model: The network to permute.
        reference: The one that stays put, of the same architecture.
        method: A name of the table.
        spec: The symmetries of the two. Default: traced from the reference on the first batch of ``data``.
        data: Batches, such as a DataLoader: a tensor of inputs, or a tuple of inputs and targets. Not an iterator, for some methods read it
            more than once.
        loss: Maps outputs and targets of a batch to a scalar, for costs that need it.
        cost: What sinkhorn and straight-through minimise: the distance of the weights, ``"l1"``, ``"l2"`` or ``"cosine"``; or the loss of the
            networks between, ``"midpoint"``, ``"random-point"`` or ``"incremental"`` (at ``alpha``), in evaluation mode but for BatchNorm,
            which takes the statistics of the batch. Default: ``"midpoint"`` with data, else ``"l2"``.
        init: Where to start: the name of a method, or permutations by group name. Default: ``"weights"`` for sinkhorn and straight-through,
            else the method's own, which is no worse than the identity.
        alpha: Weight of the reference in the incremental cost.
        seed: Of everything drawn.
        **options: Further arguments of the method's function.

    Returns:
        The alignment, never worse than its start in the method's own cost.

    Raises:
        ValueError: If a name or an option is unknown, data is missing, the networks differ, or they or the data hold a NaN or an infinity.

    Example:
        >>> alignment = align(model, reference, method="covariance", data=loader)
        >>> moved = permute(model, permutation_spec(model, x), alignment.permutations)
    """
    check_method(method, options)
    check_start(method, init)
    _check_networks(model, reference)
    needs = METHODS[method][1]
    if cost is not None:
        _check_cost(method, needs, cost)
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the weight of the reference and must lie in [0, 1], got {alpha!r}.")
    if data is not None:
        data = Batches(data, reference)
    cost = cost or ("midpoint" if data is not None else "l2")
    _check_data(method, needs, cost, init, data)
    if spec is None:
        spec = _traced(reference, data)
    spec.validate(tensors_of(reference))
    problem = Problem(
        _detached(model),
        _detached(reference),
        [name for name, _ in reference.named_parameters()],
        spec,
        _reading(reference, spec, data or ()),
        lambda: _costs(reference, cost, data, loss, alpha, seed),
    )
    return find(problem, method, init, seed, options)


def _detached(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors_of(network).items()}


def _reading(reference: nn.Module, spec: PermutationSpec, data: Iterable[Any]) -> Any:
    """Return how to read the features of a network on data."""
    reader = FeatureReader(reference, spec)

    def read(networks: Sequence[Weights], averaged: Collection[str]) -> Iterator[tuple[Features, ...]]:
        return (tuple(reader.read(one, inputs_of(batch), averaged) for one in networks) for batch in data)

    return read


def _check_cost(method: str, needs: str, cost: str) -> None:
    known = [*DISTANCES, *LOSS_COSTS]
    if needs != "labels":
        raise ValueError(f"method {method!r} takes no cost; leave it out.")
    if cost not in known:
        raise ValueError(f"cost must be one of {', '.join(known)}, got {cost!r}.")


def _check_networks(model: nn.Module, reference: nn.Module) -> None:
    for name, network in (("model", model), ("reference", reference)):
        if not isinstance(network, nn.Module):
            raise ValueError(f"{name} must be a torch.nn.Module, got {type(network).__name__}.")
        parameters = {tensor for tensor, _ in network.named_parameters(remove_duplicate=False)}
        for tensor, value in tensors_of(network).items():
            if value.isnan().any() or (tensor in parameters and value.isinf().any()):
                raise ValueError(f"{tensor!r} of the {name} holds a NaN or an infinity.")
    check_same_architecture(tensors_of(model), tensors_of(reference))


def _check_data(
    method: str, needs: str, cost: str, init: str | Mapping[str, Tensor] | None, data: Iterable[Any] | None
) -> None:
    if data is not None:
        return
    if needs == "labels" and cost in LOSS_COSTS:
        raise ValueError(f"the {cost} cost needs data: give data=, batches of inputs and targets.")
    for argument, name in (("method", method), ("init", init)):
        if isinstance(name, str) and METHODS[name][1] == "inputs":
            raise ValueError(f"{argument} {name!r} needs data: give data=, batches of inputs.")


def _traced(reference: nn.Module, data: Iterable[Any] | None) -> PermutationSpec:
    """Return the symmetries of a network on the first batch."""
    batch = next(iter(data), None) if data is not None else None
    if batch is None:
        raise ValueError("Give spec=permutation_spec(model, example_input), or data= from which it can be traced.")
    return permutation_spec(reference, *inputs_of(batch))


def _costs(
    reference: nn.Module,
    cost: str,
    data: Iterable[Any] | None,
    loss: Callable[[Any, Any], Tensor],
    alpha: float,
    seed: int,
) -> tuple[Callable[[Weights], Tensor], Callable[[Weights], Tensor]]:
    """Return a cost as a function of permuted weights: of the next batch, and of always the same ones."""
    theirs = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    if cost in DISTANCES:
        distance = DISTANCES[cost]
        return (lambda permuted: distance({name: permuted[name] for name in theirs}, theirs),) * 2
    assert data is not None
    held = list(islice(data, _EVALUATED))
    if not held or any(not isinstance(batch, list | tuple) or len(batch) < 2 for batch in held):
        raise ValueError(f'The {cost} cost needs data with targets, batches (inputs, targets); cost="l2" needs none.')
    stream = (batch for _ in count() for batch in data)

    def on(batch: Any) -> Callable[[Weights], Tensor]:
        return lambda weights: loss(_run(reference, weights, inputs_of(batch)), batch[1])

    def at(weights: Weights, task: Callable[[Weights], Tensor], generator: torch.Generator) -> Tensor:
        permuted = {name: weights[name] for name in theirs}
        if cost == "midpoint":
            return midpoint_cost(permuted, theirs, task)
        if cost == "incremental":
            return incremental_cost(permuted, theirs, task, alpha, {})
        return random_point_cost(permuted, theirs, task, generator)

    drawn = torch.Generator().manual_seed(seed)

    def evaluate(permuted: Weights) -> Tensor:
        # Every candidate meets the same points.
        points = torch.Generator().manual_seed(seed)
        return torch.stack([at(permuted, on(batch), points) for batch in held]).mean()

    return lambda permuted: at(permuted, on(next(stream)), drawn), evaluate


def _run(network: nn.Module, weights: Weights, inputs: tuple[Any, ...]) -> Any:
    """Run a network in evaluation mode on other weights, BatchNorm on the batch: a merge gets statistics of its own."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}  # BatchNorm writes to them
    with attributes_kept(network.modules()):
        network.eval()
        use_batch_statistics(network)
        return functional_call(network, {**buffers, **weights}, inputs)
