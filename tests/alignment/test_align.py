import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lit_rebasin import align, permutation_spec, permute
from lit_rebasin.alignment import METHODS, l2_cost
from lit_rebasin.symmetry import invert

X = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
DATA = [(X[:60], Y[:60]), (X[60:], Y[60:])]
NEEDS_DATA = {name for name, (_, needs, _) in METHODS.items() if needs == "inputs"}


def mlp(seed, width=12):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def trained(seed):
    model = mlp(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


SPEC = permutation_spec(mlp(0), X)


def midpoint_loss(model, reference):
    weights = {n: (p + q) / 2 for (n, p), q in zip(model.named_parameters(), reference.parameters(), strict=True)}
    return float(cross_entropy(torch.func.functional_call(mlp(0), weights, (X,)), Y))


def options(method):
    return {"steps": 15} if METHODS[method][1] == "labels" else {}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_the_function_and_the_networks_as_they_are(method):
    model, reference = trained(0), trained(1)
    before = [copy.deepcopy(network.state_dict()) for network in (model, reference)]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = align(model, reference, method=method, data=DATA, **options(method))
    assert torch.equal(torch.get_rng_state(), state)
    assert found.method == method
    assert (found.moved > 0) == (method != "identity")
    torch.testing.assert_close(permute(model, SPEC, found.permutations)(X), model(X))
    for network, kept in zip((model, reference), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items())
        assert network.training


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_answer(method):
    model, reference = trained(0), trained(1)
    first, again = (align(model, reference, method=method, data=DATA, seed=3, **options(method)) for _ in range(2))
    assert first.history == again.history
    assert all(torch.equal(first.permutations[name], p) for name, p in again.permutations.items())


@pytest.mark.parametrize("method", METHODS)
def test_never_worse_than_the_start_it_is_given(method):
    model, reference = trained(0), trained(1)
    start = SPEC.random(generator=torch.Generator().manual_seed(0))
    found = align(model, reference, method=method, data=DATA, init=start, **options(method))
    assert found.cost <= found.history[0] + 1e-9
    if method == "identity":
        assert all(torch.equal(found.permutations[name], p) for name, p in SPEC.identity().items())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"identity", "straight-through"}))
def test_planted_permutations_are_found(method):
    reference = mlp(0)
    planted = SPEC.random(generator=torch.Generator().manual_seed(5))
    model = permute(reference, SPEC, planted)
    more = {"cost": "l2", "init": "identity", "steps": 200, "learning_rate": 1.0} if method == "sinkhorn" else {}
    found = align(model, reference, method=method, data=DATA if method in NEEDS_DATA else None, spec=SPEC, **more)
    assert all(torch.equal(found.permutations[name], p) for name, p in invert(planted).items())


@pytest.mark.parametrize("cost", ["l1", "l2", "cosine"])
def test_distances_of_weights_need_no_data(cost):
    model, reference = trained(0), trained(1)
    found = align(model, reference, method="sinkhorn", cost=cost, spec=SPEC, init="identity", steps=60)
    moved = permute(model, SPEC, found.permutations)
    ours, theirs = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (moved, reference))
    expected = {
        "l1": (ours - theirs).abs().mean(),
        "l2": (ours - theirs).square().mean(),
        "cosine": 1 - torch.cosine_similarity(ours, theirs, dim=0),
    }[cost]
    assert found.cost == pytest.approx(float(expected), rel=1e-4)
    assert found.cost < found.history[0]


@pytest.mark.parametrize("method", ["sinkhorn", "straight-through"])
def test_the_midpoint_cost_is_the_loss_half_way(method):
    model, reference = trained(0), trained(1)
    found = align(model, reference, method=method, data=DATA, init="identity", steps=60)
    moved = permute(model, SPEC, found.permutations)
    assert found.history[0] == pytest.approx(midpoint_loss(model, reference), rel=1e-5)
    assert found.cost == pytest.approx(midpoint_loss(moved, reference), rel=1e-5)
    assert found.cost < 0.7 * found.history[0]


def test_other_costs_on_the_path_and_other_losses():
    model, reference = trained(0), trained(1)
    incremental = align(model, reference, method="sinkhorn", data=DATA, cost="incremental", alpha=1.0, steps=2)
    assert incremental.history[0] == pytest.approx(float(cross_entropy(reference(X), Y)), rel=1e-5)
    squares = [(x, nn.functional.one_hot(y, 3).float()) for x, y in DATA]
    found = align(model, reference, method="sinkhorn", data=squares, loss=mse_loss, cost="random-point", steps=5)
    assert found.cost <= found.history[0]


def test_starts_by_name_and_the_usual_one():
    model, reference = trained(0), trained(1)
    matched = align(model, reference, method="weights", spec=SPEC)
    for start in ("weights", matched.permutations, None):
        found = align(model, reference, method="sinkhorn", cost="l2", spec=SPEC, init=start, steps=0)
        assert all(torch.equal(found.permutations[name], p) for name, p in matched.permutations.items())
        parameters = [dict(net.named_parameters()) for net in (permute(model, SPEC, matched.permutations), reference)]
        assert found.cost == pytest.approx(float(l2_cost(*parameters)), rel=1e-5)
    from_covariance = align(model, reference, method="weights", init="covariance", data=DATA)
    expected = align(model, reference, method="covariance", data=DATA)
    found = align(model, reference, method="weights", init=expected.permutations, spec=SPEC)
    assert from_covariance.history == found.history


def test_straight_through_follows_the_gradient_of_the_hard_network():
    """Its cost falls along the way, and its candidates are permutations of the model itself."""
    model, reference = trained(2), trained(3)
    found = align(model, reference, method="straight-through", data=DATA, steps=100, learning_rate=0.01)
    assert len(found.history) == 11
    assert found.cost == min(found.history)
    assert found.cost < found.history[0]
    assert not all(a == b for a, b in pairwise(found.history[1:]))


def test_errors():
    model, reference = mlp(0), mlp(1)
    call = lambda **arguments: align(model, reference, **{"spec": SPEC, **arguments})  # noqa: E731
    with pytest.raises(ValueError, match=r"method must be one of identity, weights, .*, got 'weight'"):
        call(method="weight")
    with pytest.raises(ValueError, match="method 'covariance' needs data"):
        call(method="covariance")
    with pytest.raises(ValueError, match="the midpoint cost needs data: give data=, batches of inputs and targets"):
        call(method="sinkhorn", cost="midpoint")
    with pytest.raises(ValueError, match="midpoint cost needs data with targets"):
        call(method="sinkhorn", cost="midpoint", data=[X])
    with pytest.raises(ValueError, match=r"cost must be one of l1, l2, cosine, .*, got 'l3'"):
        call(method="sinkhorn", cost="l3")
    with pytest.raises(
        ValueError, match="method 'weights' has no option 'steps'; it has normalize, restarts, max_sweeps"
    ):
        call(method="weights", steps=3)
    with pytest.raises(ValueError, match="method 'sinkhorn' has no option 'residual_clip'"):
        call(method="sinkhorn", cost="l2", residual_clip=0.1)
    with pytest.raises(ValueError, match="method 'weights' takes no cost"):
        call(method="weights", cost="l1")
    for method in ("covariance", "sinkhorn"):
        with pytest.raises(ValueError, match="a DataLoader or a list, not an iterator"):
            call(method=method, data=iter(DATA))
    with pytest.raises(ValueError, match="Give spec="):
        align(model, reference)
    with pytest.raises(ValueError, match=r"'0.weight' has shape"):
        align(mlp(0, 13), reference, spec=SPEC)
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got dict"):
        align(dict(model.named_parameters()), reference, spec=SPEC)
    with pytest.raises(ValueError, match="Group '0' expects dimension 0"):
        align(model, reference, spec=permutation_spec(mlp(0, 13), X))
    with pytest.raises(ValueError, match="init names unknown groups"):
        call(init={"other": torch.arange(12)})
    with torch.no_grad():
        model[2].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"'2.bias' of the model holds a NaN"):
        call()
