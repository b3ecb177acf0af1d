import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lit_rebasin import PermutationSpec, Schedule, SinkhornRebasin, permutation_spec, permute
from lit_rebasin.alignment import (
    incremental_cost,
    interpolate,
    l2_cost,
    midpoint_cost,
    random_point_cost,
    sinkhorn_alignment,
)
from lit_rebasin.symmetry import invert

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def mlp(seed, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def trained(seed):
    model = mlp(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model(X), Y).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def task_loss(weights):
    return cross_entropy(functional_call(mlp(0), dict(weights), (X,)), Y)


SPEC = permutation_spec(mlp(0), X)
(NAME,) = SPEC.groups


def test_start_is_sharp_and_is_the_given_permutation():
    p = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    spec = permutation_spec(mlp(0, 256), X)
    rebasin = SinkhornRebasin(spec, init={NAME: p}, sharpness=math.log(9 * 255))
    plan = rebasin.plans()[NAME]
    torch.testing.assert_close(plan[torch.arange(256), p], torch.full((256,), 0.9), rtol=1e-3, atol=1e-3)
    assert torch.equal(rebasin.permutations()[NAME], p)


def test_training_mode_is_soft_and_evaluation_mode_hard():
    weights = {name: tensor.detach() for name, tensor in mlp(0).named_parameters()}
    rebasin = SinkhornRebasin(SPEC, init={NAME: torch.arange(16).flip(0)})
    soft, hard = rebasin.train()(weights), rebasin.eval()(weights)
    assert torch.equal(hard["0.weight"], weights["0.weight"].flip(0))
    plan = rebasin.plans()[NAME]
    torch.testing.assert_close(soft["2.weight"], weights["2.weight"] @ plan.T)
    assert not torch.allclose(soft["0.weight"], hard["0.weight"])
    soft["0.weight"].square().sum().backward()
    assert rebasin.logits[0].grad.abs().sum() > 0


def test_soft_network_reaches_the_hard_one_as_the_temperature_falls():
    weights = {name: tensor.detach() for name, tensor in mlp(0).named_parameters()}
    rebasin = SinkhornRebasin(SPEC, sharpness=5.0)
    gaps = []
    for rebasin.temperature in (1.0, 0.5, 0.2):
        gaps.append(l2_cost(rebasin.train()(weights), rebasin.eval()(weights)).item())
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]


def test_l2_cost_recovers_a_planted_permutation():
    reference = trained(0)
    planted = {NAME: torch.randperm(16, generator=torch.Generator().manual_seed(3))}
    model = permute(reference, SPEC, planted)
    alignment = sinkhorn_alignment(
        model, SPEC, lambda permuted: l2_cost(permuted, reference), steps=300, learning_rate=0.2
    )
    assert torch.equal(alignment.permutations[NAME], invert(planted)[NAME])
    assert alignment.cost == pytest.approx(0, abs=1e-12)
    assert alignment.history[0] > 0.01


@pytest.mark.parametrize("kind", ["midpoint", "random-point", "incremental"])
def test_loss_driven_costs_lower_the_loss_at_the_midpoint(kind):
    reference, model = trained(0), trained(1)
    generator = torch.Generator().manual_seed(0)

    def cost(permuted):
        if kind == "midpoint":
            return midpoint_cost(permuted, reference, task_loss)
        if kind == "random-point":
            return random_point_cost(permuted, reference, task_loss, generator)
        return incremental_cost(permuted, reference, task_loss, 0.5, {})

    def evaluate(permuted):
        return midpoint_cost(permuted, reference, task_loss)

    alignment = sinkhorn_alignment(model, SPEC, cost, evaluate=evaluate, steps=100)
    naive = float(evaluate(model))
    assert alignment.cost == pytest.approx(float(evaluate(permute(model, SPEC, alignment.permutations))), rel=1e-5)
    assert alignment.cost < 0.7 * naive


def test_never_worse_than_its_start():
    reference = trained(0)
    up = lambda permuted: -l2_cost(permuted, reference)  # noqa: E731
    # The cost drives away from the reference, the evaluation asks to stay: the start is the best that is seen.
    alignment = sinkhorn_alignment(
        reference, SPEC, up, evaluate=lambda w: l2_cost(w, reference), steps=50, learning_rate=1.0
    )
    assert torch.equal(alignment.permutations[NAME], SPEC.identity()[NAME])
    assert alignment.cost == 0


def test_residual_is_trained_within_its_reach():
    reference, model = trained(0), trained(1)
    residual = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in model.items()}
    alignment = sinkhorn_alignment(
        model, SPEC, lambda p: incremental_cost(p, reference, task_loss, 0.5, residual), steps=40, residual=residual
    )
    reach = 40 * 0.05 * 1e-3  # steps * learning rate * clip
    largest = max(float(delta.abs().max()) for delta in alignment.residual.values())
    assert 0 < largest <= reach + 1e-9


def test_incremental_cost_equals_its_formula():
    previous, new = trained(0), trained(1)
    residual = {"0.bias": torch.full((16,), 0.3)}
    merged = {name: 0.8 * previous[name] + 0.2 * new[name] for name in new}
    merged["0.bias"] = merged["0.bias"] + 0.3
    torch.testing.assert_close(incremental_cost(new, previous, task_loss, 0.8, residual), task_loss(merged))


def test_random_point_is_fresh_and_seeded():
    previous, new = trained(0), trained(1)
    draw = lambda g: [float(random_point_cost(new, previous, task_loss, g)) for _ in range(3)]  # noqa: E731
    first = draw(torch.Generator().manual_seed(0))
    assert len(set(first)) == 3
    assert first == draw(torch.Generator().manual_seed(0))


def test_interpolate_takes_counters_from_the_new_model():
    merged = interpolate({"n": torch.tensor(3), "w": torch.zeros(2)}, {"n": torch.tensor(7), "w": torch.ones(2)}, 0.75)
    assert int(merged["n"]) == 7
    assert torch.equal(merged["w"], torch.full((2,), 0.25))


def test_costs_on_the_path_are_at_the_points_that_they_say():
    """With the reference at 1 and the model at 0, the weight is its own place on the path."""
    reference, model, place = {"w": torch.ones(())}, {"w": torch.zeros(())}, lambda weights: weights["w"]
    assert midpoint_cost(model, reference, place) == 0.5
    drawn = torch.Generator().manual_seed(5)
    generator = torch.Generator().manual_seed(5)
    points = [float(random_point_cost(model, reference, place, generator)) for _ in range(300)]
    assert points == [float(torch.rand((), generator=drawn)) for _ in range(300)]
    assert min(points) < 0.05
    assert max(points) > 0.95


def test_l2_cost_is_the_mean_over_all_entries():
    a = {"big": torch.randn(4, 5), "small": torch.randn(3), "count": torch.tensor(7)}
    b = {"big": torch.randn(4, 5), "small": torch.randn(3), "count": torch.tensor(1)}
    difference = np.concatenate([(a[name] - b[name]).numpy().ravel() for name in ("big", "small")]).astype(float)
    assert float(l2_cost(a, b)) == pytest.approx((difference**2).mean(), rel=1e-5)
    assert l2_cost({}, {}) == 0


def test_history_is_the_cost_of_hard_permutations_throughout():
    reference, model = trained(0), trained(1)
    seen = []

    def evaluate(permuted):
        seen.append(float(l2_cost(permuted, reference)))
        return torch.tensor(seen[-1])

    def cost(permuted):  # of another size altogether
        return 1000 + 100 * l2_cost(permuted, reference)

    alignment = sinkhorn_alignment(model, SPEC, cost, evaluate=evaluate, steps=40)
    assert alignment.history == seen
    assert len(seen) == 11
    assert alignment.history[0] == pytest.approx(float(l2_cost(model, reference)))
    assert alignment.cost == min(alignment.history) < alignment.history[0]


@pytest.mark.parametrize(("rate", "hard"), [(1e-9, True), (0.5, False)])
def test_converged_says_whether_the_plans_are_hard_in_the_end(rate, hard):
    """Pulled away from the start by every step, the plans are soft when the steps are over."""
    model = trained(0)
    average = {name: tensor.mean(0, keepdim=True).expand_as(tensor) for name, tensor in model.items()}
    alignment = sinkhorn_alignment(
        model,
        SPEC,
        lambda permuted: l2_cost({"0.weight": permuted["0.weight"]}, average),
        steps=20,
        learning_rate=rate,
        sharpness=4.0,
        schedule=Schedule(beta_0=1.0, kappa=0.01) if not hard else None,
    )
    assert alignment.converged == hard


def test_temperature_falls_by_the_schedule_from_step_to_step():
    weights = trained(0)
    seen = []

    def cost(permuted):
        seen.append(permuted["0.weight"].detach())
        return 0 * permuted["0.weight"].sum()

    sinkhorn_alignment(
        weights,
        SPEC,
        cost,
        evaluate=lambda _: torch.ones(()),
        steps=4,
        learning_rate=1e-9,
        schedule=Schedule(beta_0=2.0, kappa=0.5),
        noise=0.0,
    )
    rebasin = SinkhornRebasin(SPEC).train()
    for step, soft in enumerate(seen, 1):
        rebasin.temperature = 1 / (2 * (1 + step) ** 0.5)
        torch.testing.assert_close(soft, rebasin(weights)["0.weight"].detach())
    assert len(seen) == 4


def test_residual_decays_where_the_cost_does_not_ask_for_it():
    residual = {"0.bias": torch.ones(16, requires_grad=True)}
    alignment = sinkhorn_alignment(
        trained(0),
        SPEC,
        lambda permuted: 0 * (permuted["0.bias"] + residual["0.bias"]).sum(),
        evaluate=lambda _: residual["0.bias"].sum(),
        steps=20,
        residual=residual,
        residual_learning_rate=0.5,
        residual_weight_decay=0.1,
    )
    torch.testing.assert_close(alignment.residual["0.bias"], torch.full((16,), 0.95**20))


def test_residual_returned_is_that_of_the_best_candidate():
    """The cost drives the residual up, which the evaluation likes until it is 0.0115."""
    residual = {"0.bias": torch.zeros(16, requires_grad=True)}
    alignment = sinkhorn_alignment(
        trained(0),
        SPEC,
        lambda permuted: (permuted["0.bias"] - residual["0.bias"]).sum(),
        evaluate=lambda _: (residual["0.bias"][0] - 0.0115).abs(),
        steps=40,
        residual=residual,
        residual_learning_rate=1.0,
        residual_weight_decay=0.0,
    )
    torch.testing.assert_close(alignment.residual["0.bias"], torch.full((16,), 0.012), rtol=0, atol=1e-6)
    torch.testing.assert_close(residual["0.bias"].detach(), torch.full((16,), 0.04))


def test_without_a_learning_rate_the_residual_alone_is_trained():
    """Another start would be nearer; the cost of the residual is a distance, so that it has something to learn."""
    reference, model = trained(0), trained(1)
    residual = {"0.bias": torch.zeros(16, requires_grad=True)}

    def cost(permuted):
        return ((permuted["0.bias"] + residual["0.bias"] - reference["0.bias"]) ** 2).sum()

    found = {
        rate: sinkhorn_alignment(
            model,
            SPEC,
            cost,
            steps=40,
            learning_rate=rate,
            residual=residual,
            residual_learning_rate=1.0,
            sharpness=8.0,
        )
        for rate in (0.0, 0.5)
    }
    assert all(torch.equal(p, torch.arange(len(p))) for p in found[0.0].permutations.values())
    assert any(not torch.equal(p, torch.arange(len(p))) for p in found[0.5].permutations.values())
    assert found[0.0].residual["0.bias"].abs().min() > 0
    assert found[0.0].cost < found[0.0].history[0]


def test_costs_that_are_not_finite_teach_nothing_and_are_never_the_best():
    reference, model = trained(0), trained(1)
    calls = iter(range(100))

    def cost(permuted):
        return l2_cost(permuted, reference) * (float("nan") if next(calls) % 3 == 0 else 1.0)

    candidates = iter(range(100))

    def evaluate(permuted):
        return l2_cost(permuted, reference) * (float("nan") if next(candidates) % 2 == 0 else 1.0)

    alignment = sinkhorn_alignment(model, SPEC, cost, evaluate=evaluate, steps=60, learning_rate=0.5)
    assert alignment.history[0] == float("inf")
    assert alignment.cost == min(alignment.history) < float(l2_cost(model, reference))


def test_errors():
    with pytest.raises(ValueError, match="no permutation group"):
        SinkhornRebasin(PermutationSpec())
    with pytest.raises(ValueError, match="sharpness and noise must be 0 or more"):
        SinkhornRebasin(SPEC, sharpness=-1.0)


def test_gradients_that_are_not_finite_teach_nothing():
    """A cost may be finite where its gradient is not, as the root of zero."""
    weights = {name: tensor.detach() for name, tensor in mlp(0).named_parameters()}
    calls = []

    def cost(permuted):
        calls.append(None)
        value = l2_cost(permuted, trained_reference)
        return value + (0 * permuted["0.weight"]).abs().sum().sqrt() if len(calls) == 3 else value

    trained_reference = permute(weights, SPEC, {NAME: torch.arange(16).flip(0)})
    result = sinkhorn_alignment(weights, SPEC, cost, steps=60, learning_rate=1.0)
    assert len(calls) > 3
    assert result.cost < 1e-10


def test_a_candidate_of_cost_0_ends_the_search():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    spec = permutation_spec(network, torch.randn(2, 6))
    weights = {name: tensor.detach() for name, tensor in network.named_parameters()}
    planted = permute(weights, spec, spec.random(generator=torch.Generator().manual_seed(0)))
    calls = []

    def cost(permuted):
        calls.append(1)
        return l2_cost(permuted, weights)

    found = sinkhorn_alignment(
        planted, spec, cost, evaluate=lambda permuted: l2_cost(permuted, weights), steps=1000, learning_rate=1.0
    )
    assert found.cost == found.history[-1] == 0
    assert found.converged
    assert len(calls) == 100 * (len(found.history) - 1) < 1000
