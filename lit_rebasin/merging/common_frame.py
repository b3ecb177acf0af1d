"""Permutations that carry several models into one frame: each model has its own, so that going from any model to another is consistent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rebasin.alignment import weight_matching
from lit_rebasin.alignment.agreement import bound, joint_degree, joint_gain
from lit_rebasin.alignment.frank_wolfe import Objective, even_plans, search
from lit_rebasin.alignment.progress import shown
from lit_rebasin.symmetry import Group, PermutationSpec, compose, invert, neurons, permute
from lit_rebasin.transport import assignment, doubly_regularized_barycenter

Permutations = dict[str, Tensor]

# Of the barycenter of neurons: the strength of the inner regularization, as a share of how much nearer to a neuron of one model the nearest
# of another is than the average one; the steps of the particles; the Sinkhorn updates of each. Chosen by the spread of classifiers of digits
# (width 64) and of MNIST (width 128): half as much again and two thirds of the strength end with a larger one.
_INNER, _STEPS, _UPDATES = 0.08, 10, 20


@dataclass(frozen=True)
class Members:
    """What is brought together: the weights of every model in float64 on the CPU, their shares in the merge, and the groups that move."""

    models: Sequence[Mapping[str, Tensor]]
    shares: Sequence[float]
    spec: PermutationSpec

    def identity(self) -> list[Permutations]:
        """Return the permutations that leave every model as it is."""
        return [self.spec.identity() for _ in self.models]

    def moved(self, permutations: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return every model moved by its permutations or plans."""
        return [permute(model, self.spec, own) for model, own in zip(self.models, permutations, strict=True)]

    def spread(self, permutations: Sequence[Mapping[str, Tensor]]) -> float:
        """Return the mean over the weights of ``sum_i share_i (w_i - mean)^2`` of the permuted models, 0 if there are no weights."""
        moved = self.moved(permutations)
        count = sum(tensor.numel() for tensor in moved[0].values())
        total = 0.0
        for name in moved[0]:
            mean = weighted_sum([model[name] for model in moved], self.shares)
            squares = [(model[name] - mean).square().sum() for model in moved]
            total += float(weighted_sum(squares, self.shares))
        return total / max(count, 1)


@dataclass(frozen=True)
class Frame:
    """Permutations of each model into the common frame, the spread of the hard permutations along the way, and whether the end was reached."""

    permutations: list[Permutations]
    history: list[float]
    converged: bool


def weighted_sum(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return ``sum_i share_i * tensor_i``."""
    return torch.stack([share * tensor for share, tensor in zip(shares, tensors, strict=True)]).sum(0)


def cycle_consistent_frame(members: Members, max_steps: int) -> Frame:
    """Maximise ``sum_{i<j} share_i share_j <P_i W_i, P_j W_j>`` over all plans of all models at once, by Frank-Wolfe.

    The objective of C2M3 (Crisostomi et al., NeurIPS 2024). There every model moves and starts at the identity. Here the first model is the
    frame and the others start at even plans, as two models do in Frank-Wolfe matching: a permutation of all models together changes
    nothing, and merges of digits classifiers had a lower training loss so (0.089 against 0.140, eight merges of five).
    """
    objective = pairwise_objective(members)
    indices = range(1, len(members.models))
    even, identity = even_plans(members.spec), members.spec.identity()
    first = {(index, name): identity[name] for index in indices for name in identity}
    start = {(index, name): even[name] for index in indices for name in even}
    found = search(objective, first, start, max_steps)
    return Frame(_by_model(found.permutations, members), found.history, found.converged)


def pairwise_objective(members: Members) -> Objective[tuple[int, str]]:
    """Return the sum over pairs as a function of plans by model and group, those of the first model left out."""
    spec, count = members.spec, len(members.models)
    scaled = [
        {name: share * tensor for name, tensor in model.items()}
        for model, share in zip(members.models, members.shares, strict=True)
    ]
    names = {axis.tensor for group in spec.groups.values() for axis in group.axes}

    def gradient(plans: Mapping[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
        own = _by_model(plans, members)
        moved = [permute(model, spec, one) for model, one in zip(scaled, own, strict=True)]
        total = {name: torch.stack([model[name] for model in moved]).sum(0) for name in names}
        gains: dict[tuple[int, str], Tensor] = {}
        for index in range(1, count):
            others = {name: total[name] - moved[index][name] for name in names}
            gained = joint_gain(scaled[index], others, spec, own[index])
            gains |= {(index, name): gain for name, gain in gained.items()}
        return gains

    return Objective(
        gradient=gradient,
        cost=lambda permutations: members.spread(_by_model(permutations, members)),
        # Two models that both move meet in a product of both their polynomials.
        degree=joint_degree(spec, scaled[0]) * min(count - 1, 2),
        bounds={
            (index, group.name): sum(bound(scaled[index], scaled[j], group) for j in range(count) if j != index)
            for index in range(1, count)
            for group in spec.groups.values()
        },
    )


def _by_model(plans: Mapping[tuple[int, str], Tensor], members: Members) -> list[dict[str, Tensor]]:
    """Return the plans of each model by group; the first model stays as it is."""
    own = [members.spec.identity(), *({} for _ in members.models[1:])]
    for (index, name), plan in plans.items():
        own[index][name] = plan
    return own


def merge_many_frame(members: Members, generator: torch.Generator, max_sweeps: int) -> Frame:
    """Match one model at a time to the average of the others, in random order, until none moves (Ainsworth et al., ICLR 2023, algorithm 3)."""
    permutations = members.identity()
    moved = members.moved(permutations)
    history = [members.spread(permutations)]
    converged = False
    for _ in shown(range(max_sweeps), "Matching each to the others"):
        converged = True
        for index in torch.randperm(len(moved), generator=generator).tolist():
            others = [j for j in range(len(moved)) if j != index]
            shares = [members.shares[j] for j in others]
            average = {name: weighted_sum([moved[j][name] for j in others], shares) for name in moved[index]}
            seed = int(torch.randint(2**31, (), generator=generator))
            step = weight_matching(moved[index], average, members.spec, normalize=False, seed=seed)
            if step.moved:
                permutations[index] = compose(permutations[index], step.permutations)
                moved[index] = permute(moved[index], members.spec, step.permutations)
                converged = False
        history.append(members.spread(permutations))
        if converged:
            break
    return Frame(_in_frame_of_first(permutations), history, converged)


def barycenter_frame(members: Members, generator: torch.Generator, max_passes: int) -> Frame:
    """Match the neurons of each model, group by group, to the particles of the barycenter of all models' neurons.

    In the first pass a neuron is a point made of those of its weights whose other side is in the common frame already, so it goes from the ends
    of the network inwards; in the next ones, of all its weights. Passes go on while the spread falls.
    """
    order = _from_the_ends(members)
    best = permutations = members.identity()
    history = [members.spread(best)]
    for number in range(max_passes):
        for place, name in enumerate(shown(order, f"Barycenters of neurons, pass {number + 1}", len(order))):
            group = members.spec.groups[name]
            tensors = _settled(members.spec, group, order[:place] if number == 0 else order)
            clouds = [_neurons(model, group, tensors) for model in members.moved(permutations)]
            steps = _to_barycenter(clouds, members.shares, generator)
            permutations = [compose(own, {name: step}) for own, step in zip(permutations, steps, strict=True)]
        history.append(members.spread(permutations))
        if not history[-1] < min(history[:-1]):
            return Frame(_in_frame_of_first(best), history, True)
        best = permutations
    return Frame(_in_frame_of_first(best), history, False)


def _to_barycenter(clouds: Sequence[Tensor], shares: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """Return for every cloud ``(size, d)`` the permutation that brings its points nearest to the particles of the barycenter."""
    distances = torch.stack([torch.cdist(clouds[0], cloud).square() / 2 for cloud in clouds[1:]])
    inner = _INNER * float((distances.mean(-1) - distances.amin(-1)).mean())
    if inner <= 0:
        return [torch.arange(len(cloud)) for cloud in clouds]
    found = doubly_regularized_barycenter(
        [cloud.float() for cloud in clouds],
        torch.tensor(shares),
        inner,
        # The noise has this variance along each dimension; along all of them together, half the inner strength.
        inner / (2 * clouds[0].shape[1]),
        max_iterations=_UPDATES,
        particles=len(clouds[0]),
        steps=_STEPS,
        step_size=1.0,
        generator=generator,
    )
    return [assignment(found.support.double() @ cloud.T) for cloud in clouds]


def _neurons(model: Mapping[str, Tensor], group: Group, tensors: set[str]) -> Tensor:
    """Return what each neuron of a group has in some tensors, ``(size, d)``."""
    parts = [neurons(model[axis.tensor], axis, group.size) for axis in group.axes if axis.tensor in tensors]
    return torch.cat([part.flatten(1) for part in parts], 1)


def _settled(spec: PermutationSpec, group: Group, names: Sequence[str]) -> set[str]:
    """Return the tensors of a group that no group moves but this and the named ones; all of its tensors if there is none."""
    mine = {axis.tensor for axis in group.axes}
    others = [other for other in spec.groups.values() if other != group and other.name not in names]
    return mine - {axis.tensor for other in others for axis in other.axes} or mine


def _from_the_ends(members: Members) -> list[str]:
    """Return the names of the groups, next always the one with the largest share of its weights settled by those before it."""
    sizes = {name: tensor.numel() for name, tensor in members.models[0].items()}
    order: list[str] = []

    def share(name: str) -> float:
        group = members.spec.groups[name]
        whole = {axis.tensor for axis in group.axes}
        left = whole - _settled(members.spec, group, order)
        return 1 - sum(sizes[tensor] for tensor in left) / sum(sizes[tensor] for tensor in whole)

    while len(order) < len(members.spec.groups):
        order.append(max((name for name in members.spec.groups if name not in order), key=share))
    return order


def _in_frame_of_first(permutations: Sequence[Permutations]) -> list[Permutations]:
    """Return the permutations followed by that which leaves the first model where it was."""
    back = invert(permutations[0])
    return [compose(own, back) for own in permutations]
