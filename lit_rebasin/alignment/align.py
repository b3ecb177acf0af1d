"""One call for every way to find the permutation that carries a model towards a reference."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lit_rebasin.alignment.activations import activation_matching
from lit_rebasin.alignment.costs import (
    check_same_architecture,
    cosine_distance,
    incremental_cost,
    l1_cost,
    l2_cost,
    midpoint_cost,
    random_point_cost,
)
from lit_rebasin.alignment.covariance import covariance_matching
from lit_rebasin.alignment.frank_wolfe import frank_wolfe_matching
from lit_rebasin.alignment.result import Alignment
from lit_rebasin.alignment.sinkhorn import sinkhorn_alignment
from lit_rebasin.alignment.straight_through import straight_through_alignment
from lit_rebasin.alignment.weights import weight_matching
from lit_rebasin.symmetry import PermutationSpec, attributes_kept, permutation_spec
from lit_rebasin.symmetry.spec import tensors_of

Weights = Mapping[str, Tensor]
# The method's function, what it takes of the data ("", "inputs" or "labels"), and the start that it has unless told.
METHODS: dict[str, tuple[Callable[..., Alignment] | None, str, str]] = {
    "identity": (None, "", "identity"),
    "weights": (weight_matching, "", "identity"),
    "covariance": (covariance_matching, "inputs", "identity"),
    "activations": (activation_matching, "inputs", "identity"),
    "frank-wolfe": (frank_wolfe_matching, "", "identity"),
    "straight-through": (straight_through_alignment, "labels", "weights"),
    "sinkhorn": (sinkhorn_alignment, "labels", "weights"),
}
DISTANCES: dict[str, Callable[[Weights, Weights], Tensor]] = {
    "l1": l1_cost,
    "l2": l2_cost,
    "cosine": cosine_distance,
}
LOSS_COSTS = ("midpoint", "random-point", "incremental")
# Batches that the candidates of a search are compared on.
_EVALUATED = 10
# What `align` gives the methods itself.
_OWN = {"init", "seed", "cost", "evaluate"}


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
            networks between, ``"midpoint"``, ``"random-point"`` or ``"incremental"`` (at ``alpha``). Default: ``"midpoint"`` with data, else
            ``"l2"``.
        init: Where to start: the name of a method, or permutations by group name. Default: ``"weights"`` for sinkhorn and straight-through,
            else the identity.
        alpha: Weight of the reference in the incremental cost.
        seed: Of everything drawn.
        **options: Further arguments of the method's function.

    Returns:
        The alignment, never worse than its start in the method's own cost.

    Raises:
        ValueError: If a name or an option is unknown, data is missing, the networks differ, or one of them holds a NaN.

    Example:
        >>> alignment = align(model, reference, method="covariance", data=loader)
        >>> moved = permute(model, permutation_spec(model, x), alignment.permutations)
    """
    function, needs, usual = _method(method)
    _check_networks(model, reference)
    _check_options(method, function, options)
    if cost is not None:
        _check_cost(method, needs, cost)
    if data is not None and iter(data) is data:
        raise ValueError("data must give its batches more than once: a DataLoader or a list, not an iterator.")
    cost = cost or ("midpoint" if data is not None else "l2")
    if data is None and (needs == "inputs" or (needs == "labels" and cost in LOSS_COSTS)):
        what = f"method {method!r}" if needs == "inputs" else f"the {cost} cost"
        raise ValueError(
            f"{what} needs data: give data=, batches of {'inputs' if needs == 'inputs' else 'inputs and targets'}."
        )
    if spec is None:
        spec = _traced(reference, data)
    spec.validate(tensors_of(reference))
    ours, theirs = _parameters(model), _parameters(reference)
    if function is None:
        distance = float(l2_cost(ours, theirs))
        return Alignment(spec.identity(), distance, [distance], "identity", True, 0.0)
    start = _start(init or usual, model, reference, spec, data, seed)
    if method == "frank-wolfe":
        return frank_wolfe_matching(ours, theirs, spec, init=start if init else None, **options)
    if method == "weights":
        return weight_matching(ours, theirs, spec, init=start, seed=seed, **options)
    if needs == "inputs":
        drawn = {"seed": seed} if method == "covariance" else {}
        return function(model, reference, spec, _Inputs(data), init=start, **drawn, **options)
    step, evaluate = _costs(reference, cost, data, loss, alpha, seed)
    shared = {"evaluate": evaluate, "init": start, "seed": seed, **options}
    if method == "sinkhorn":
        return sinkhorn_alignment(ours, spec, step, **shared)
    return straight_through_alignment(ours, theirs, spec, step, **shared)


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """Return the arguments of a forward pass that a batch stands for: the first of a tuple or list, else the batch."""
    first = batch[0] if isinstance(batch, list | tuple) else batch
    return tuple(first) if isinstance(first, list | tuple) else (first,)


class _Inputs:
    """The inputs of batches, as often as they are asked for."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return map(inputs_of, self.data)


def _method(method: str) -> tuple[Callable[..., Alignment] | None, str, str]:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    return METHODS[method]


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
        for tensor, value in tensors_of(network).items():
            if value.is_floating_point() and value.isnan().any():
                raise ValueError(f"{tensor!r} of the {name} holds a NaN.")
    check_same_architecture(tensors_of(model), tensors_of(reference))


def _check_options(method: str, function: Callable[..., Alignment] | None, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values() if function else []
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    # A residual belongs to the merge of a stream of tasks: nothing here would add it.
    known = [name for name in keywords if name not in _OWN and not name.startswith("residual")]
    for name in options:
        if name not in known:
            raise ValueError(f"method {method!r} has no option {name!r}; it has {', '.join(known) or 'none'}.")


def _traced(reference: nn.Module, data: Iterable[Any] | None) -> PermutationSpec:
    """Return the symmetries of a network on the first batch."""
    batch = next(iter(data), None) if data is not None else None
    if batch is None:
        raise ValueError("Give spec=permutation_spec(model, example_input), or data= from which it can be traced.")
    return permutation_spec(reference, *inputs_of(batch))


def _start(
    init: str | Mapping[str, Tensor],
    model: nn.Module,
    reference: nn.Module,
    spec: PermutationSpec,
    data: Iterable[Any] | None,
    seed: int,
) -> dict[str, Tensor]:
    """Return the permutations to start from."""
    if isinstance(init, str):
        if init == "identity":
            return spec.identity()
        return align(model, reference, method=init, spec=spec, data=data, seed=seed).permutations
    unknown = sorted(set(init) - set(spec.groups))
    if unknown:
        raise ValueError(f"init names unknown groups {unknown}; the spec has {sorted(spec.groups)}.")
    return {**spec.identity(), **init}


def _parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def _costs(
    reference: nn.Module,
    cost: str,
    data: Iterable[Any] | None,
    loss: Callable[[Any, Any], Tensor],
    alpha: float,
    seed: int,
) -> tuple[Callable[[Weights], Tensor], Callable[[Weights], Tensor]]:
    """Return a cost as a function of permuted weights: of the next batch, and of always the same ones."""
    theirs = _parameters(reference)
    if cost in DISTANCES:
        distance = DISTANCES[cost]
        return (lambda permuted: distance(permuted, theirs),) * 2
    assert data is not None
    held = list(islice(data, _EVALUATED))
    if not held or any(not isinstance(batch, list | tuple) or len(batch) < 2 for batch in held):
        raise ValueError(f"The {cost} cost needs data with targets: batches (inputs, targets).")
    stream = (batch for _ in count() for batch in data)

    def on(batch: Any) -> Callable[[Weights], Tensor]:
        return lambda weights: loss(_run(reference, weights, inputs_of(batch)), batch[1])

    def at(permuted: Weights, task: Callable[[Weights], Tensor], generator: torch.Generator) -> Tensor:
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
    """Run a network in evaluation mode on other weights."""
    with attributes_kept(network.modules()):
        network.eval()
        return functional_call(network, dict(weights), inputs)
