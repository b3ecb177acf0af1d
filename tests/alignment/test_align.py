import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lit_rebasin import align, permutation_spec, permute
from lit_rebasin.alignment import METHODS, l2_cost, straight_through_alignment, weight_matching
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


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"identity"}))
def test_never_worse_than_the_start_it_is_given(method):
    model, reference = trained(0), trained(1)
    start = SPEC.random(generator=torch.Generator().manual_seed(0))
    found = align(model, reference, method=method, data=DATA, init=start, **options(method))
    assert found.cost <= found.history[0] + 1e-9


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


def test_straight_through_takes_adam_steps_from_the_reference():
    """The first step moves the free weights by the learning rate, against the sign of the gradient at the hard network."""
    model, reference = (dict(trained(seed).named_parameters()) for seed in (2, 3))
    start = weight_matching(model, reference, SPEC).permutations
    hard = {n: p.detach().clone().requires_grad_() for n, p in permute(model, SPEC, start).items()}
    target = {n: p.detach() for n, p in reference.items()}
    seen = []

    def cost(weights):
        value = sum((weights[n] - 0.3 * target[n]).square().sum() for n in target)
        if torch.is_grad_enabled():
            seen.append({n: w.detach().clone() for n, w in weights.items()})
        return value

    rate = 0.7
    found = straight_through_alignment(model, target, SPEC, cost, init=start, steps=2, learning_rate=rate)
    for name, tensor in hard.items():
        torch.testing.assert_close(seen[0][name], tensor.detach())
    gradient = {n: 2 * (hard[n].detach() - 0.3 * target[n]) for n in target}
    free = {n: target[n] - rate * gradient[n].sign() for n in target}
    second = weight_matching(model, free, SPEC, init=start, seed=2).permutations
    for name, tensor in permute(model, SPEC, second).items():
        torch.testing.assert_close(seen[1][name], tensor.detach())
    assert any(not torch.equal(second[name], start[name]) for name in start)
    assert found.history[0] == pytest.approx(float(cost({n: p.detach() for n, p in hard.items()})))


def test_straight_through_starts_at_weight_matching():
    model, reference = trained(2), trained(3)
    found = align(model, reference, method="straight-through", cost="l2", spec=SPEC, steps=0)
    expected = align(model, reference, method="weights", spec=SPEC)
    assert found.moved > 0
    assert all(torch.equal(found.permutations[name], p) for name, p in expected.permutations.items())


def test_every_candidate_meets_the_same_random_points():
    model, reference = trained(0), trained(1)
    start = align(model, reference, method="weights", spec=SPEC).permutations
    found = align(
        model, reference, method="sinkhorn", cost="random-point", data=DATA, init=start, steps=10, learning_rate=1e-9
    )
    assert len(found.history) == 11
    assert len({round(cost, 7) for cost in found.history if cost == found.history[0]}) == 1
    draws = torch.Generator().manual_seed(0)
    moved = permute(model, SPEC, start)
    losses = []
    for x, y in DATA:
        t = float(torch.rand((), generator=draws))
        weights = {
            n: t * q + (1 - t) * p for (n, p), q in zip(moved.named_parameters(), reference.parameters(), strict=True)
        }
        losses.append(float(cross_entropy(torch.func.functional_call(mlp(0), weights, (x,)), y)))
    assert found.history[0] == pytest.approx(sum(losses) / 2, rel=1e-5)


def normed(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    model(3 * X + 1)  # statistics that are not those of the data
    return model.eval()


def test_costs_of_a_network_with_batch_norm_are_on_the_batch():
    model, reference = normed(0), normed(1)
    before = copy.deepcopy([model.state_dict(), reference.state_dict()])
    found = align(model, reference, method="sinkhorn", cost="midpoint", data=[(X, Y)], steps=0)
    moved = permute(model, permutation_spec(reference, X[:2]), found.permutations)
    half = normed(2)
    with torch.no_grad():
        for p, q, r in zip(half.parameters(), moved.parameters(), reference.parameters(), strict=True):
            p.copy_((q + r) / 2)
    half[1].train()
    assert found.cost == pytest.approx(float(cross_entropy(half(X), Y)), rel=1e-5)
    for network, kept in zip((model, reference), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, dtype):
    reference = mlp(1).to(dtype)
    model = permute(reference, SPEC, SPEC.random(generator=torch.Generator().manual_seed(0)))
    data = [(x.to(dtype), y) for x, y in DATA]
    cost = {"cost": "l2"} if METHODS[method][1] == "labels" else {}
    found = align(model, reference, method=method, data=data, **cost, **options(method))
    assert all(p.dtype == torch.long for p in found.permutations.values())
    if method != "identity":
        moved = permute(model, SPEC, found.permutations)
        assert all(torch.equal(p, q) for p, q in zip(moved.parameters(), reference.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_cuda(method):
    model, reference = trained(0).cuda(), trained(1).cuda()
    found = align(model, reference, method=method, data=DATA, spec=SPEC, **options(method))
    expected = align(model.cpu(), reference.cpu(), method=method, data=DATA, spec=SPEC, **options(method))
    if METHODS[method][1] != "labels":  # training differs by rounding
        assert all(torch.equal(found.permutations[name], p) for name, p in expected.permutations.items())


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
    with pytest.raises(ValueError, match=r"init must be one of .*`alignment.permutations`"):
        call(init=align(model, reference, spec=SPEC))
    with pytest.raises(ValueError, match="starts nowhere; leave init out"):
        call(method="identity", init="weights")
    with pytest.raises(ValueError, match=r"alpha .* must lie in \[0, 1\], got 2"):
        call(method="sinkhorn", cost="incremental", alpha=2.0, data=DATA)
    for data, message in (
        (X, r"such as a DataLoader or \[inputs\], got a tensor of shape \(120, 6\)"),
        ((X, Y), r"such as a DataLoader or \[\(inputs, targets\)\]"),
        (5, "got int 5"),
        ("train.npz", "got str 'train.npz'"),
        ([], "data holds no batch"),
        ([(X, Y), (X.log(), Y)], "Batch 1 of data holds a NaN or an infinity"),
    ):
        for method in ("covariance", "activations", "sinkhorn", "straight-through"):
            with pytest.raises(ValueError, match=message):
                call(method=method, data=data)
    for method, wrong, message in (
        ("weights", {"normalize": "no"}, "'normalize' of method 'weights' must be True or False, got 'no'"),
        ("covariance", {"power": "1"}, "'power' of method 'covariance' must be a number, got '1'"),
        ("covariance", {"power": True}, "must be no truth value, got True"),
        ("sinkhorn", {"schedule": "cosine"}, "schedule must be a Schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            call(method=method, data=DATA, **wrong)
    with torch.no_grad():
        model[0].weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"'0.weight' of the model holds a NaN or an infinity"):
        call()
    with torch.no_grad():
        model[0].weight[1, 2] = 0.0
    with torch.no_grad():
        model[2].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"'2.bias' of the model holds a NaN"):
        call()
