import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lit_rebasin.metrics import Sharpness, hessian_eigenvalues, hessian_trace
from lit_rebasin.metrics.hessian import HessianProducts


def quadratic(matrix):
    return lambda w: 0.5 * w["w"] @ matrix @ w["w"]


def with_spectrum(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def point(n, dtype=torch.float64):
    return {"w": torch.linspace(-1, 1, n, dtype=dtype)}


def network(kind):
    torch.manual_seed(3)
    if kind == "conv":
        layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)]
        return nn.Sequential(*layers).double(), torch.randn(6, 1, 4, 4, dtype=torch.float64)
    inputs = torch.randn(12, 5, dtype=torch.float64)
    if kind == "norm":
        layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)]
        model = nn.Sequential(*layers).double()
        model(inputs)
        return model.eval(), inputs
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU() if kind == "relu" else nn.Tanh(), nn.Linear(6, 3)).double(), inputs


def problem(kind):
    """A network's loss on a batch, its weights, and the exact Hessian."""
    model, inputs = network(kind)
    target = torch.arange(len(inputs)) % 3
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(w):
        return cross_entropy(functional_call(model, dict(w), (inputs,)), target)

    def flat(vector):
        parts = vector.split([w.numel() for w in weights.values()])
        return loss({name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)})

    return loss, weights, hessian(flat, torch.cat([w.flatten() for w in weights.values()]))


KINDS = ["tanh", "relu", "conv", "norm"]


@pytest.mark.parametrize("kind", KINDS)
def test_eigenvalues_and_trace_are_those_of_the_whole_hessian(kind):
    loss, weights, exact = problem(kind)
    found = hessian_eigenvalues(loss, weights, 3, tolerance=1e-9)
    expected = torch.linalg.eigvalsh(exact).flip(0)[:3]
    assert found.converged
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-10)
    trace = hessian_trace(loss, weights, samples=200, seed=1)
    assert abs(trace.mean - float(exact.trace())) < 4 * trace.standard_error
    variance = 2 * (exact.square().sum() - exact.diag().square().sum())
    assert trace.standard_error == pytest.approx(math.sqrt(variance / 200), rel=0.3)


@pytest.mark.parametrize("unit", [1.0, 1e25])
def test_a_known_spectrum_with_negative_and_repeated_eigenvalues(unit):
    values = [-9.0, 4.0, 4.0, 4.0, 1.0, 1.0, 0.0, 0.0, -2.0]
    found = hessian_eigenvalues(quadratic(unit * with_spectrum(values)), point(9), 5)
    torch.testing.assert_close(found.values / unit, torch.tensor([4.0, 4, 4, 1, 1], dtype=torch.float64))
    assert found.converged
    assert found.residuals.max() < 1e-6 * unit


def test_the_largest_eigenvalue_may_be_negative():
    found = hessian_eigenvalues(quadratic(with_spectrum([-3.0, -1.0, -2.0])), point(3))
    assert float(found.values[0]) == pytest.approx(-1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 4), st.integers(0, 10**6), st.floats(-25, 25))
def test_eigenvalues_of_random_matrices_are_those_of_numpy(n, count, seed, scale):
    count = min(count, n)
    matrix = np.random.default_rng(seed).standard_normal((n, n)) * 10**scale
    matrix = matrix + matrix.T
    found = hessian_eigenvalues(quadratic(torch.from_numpy(matrix)), point(n), count, tolerance=1e-10)
    expected = np.linalg.eigvalsh(matrix)[::-1]
    assert found.converged
    assert found.iterations <= n
    np.testing.assert_allclose(found.values, expected[:count], rtol=0, atol=1e-9 * np.abs(expected).max())


def test_fewer_products_than_weights_are_made_and_residuals_bound_the_error():
    values = [10.0, 9.9, *np.linspace(0, 1, 298)]
    loss = quadratic(with_spectrum(values))
    found = hessian_eigenvalues(loss, point(300), 2)
    assert found.converged
    assert found.iterations < 60
    torch.testing.assert_close(found.values, torch.tensor([10.0, 9.9], dtype=torch.float64), rtol=1e-6, atol=0)
    short = hessian_eigenvalues(loss, point(300), 2, steps=4, tolerance=1e-9)
    assert not short.converged
    assert short.iterations == 4
    errors = torch.tensor([10.0, 9.9], dtype=torch.float64) - short.values
    assert (errors > 0).all()
    nearest = (short.values[:, None] - torch.tensor(values, dtype=torch.float64)).abs().min(1).values
    assert (nearest <= short.residuals).all()


def test_residuals_are_those_of_the_ritz_vectors():
    """A basis of two: the Ritz vectors follow from the start vector and the matrix by hand."""
    matrix = with_spectrum([5.0, 2.0, -1.0, 0.5])
    start = torch.randn(1, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[0]
    basis = torch.linalg.qr(torch.stack([start, matrix @ start]).T)[0]
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    ritz = basis @ vectors[:, -1]
    found = hessian_eigenvalues(quadratic(matrix), point(4), steps=2, seed=7)
    assert float(found.values[0]) == pytest.approx(float(values[-1]))
    assert float(found.residuals[0]) == pytest.approx(float((matrix @ ritz - values[-1] * ritz).norm()))


def test_one_product_leaves_a_residual():
    matrix = with_spectrum([5.0, 2.0, -1.0, 0.5])
    start = torch.randn(1, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[0]
    unit = start / start.norm()
    found = hessian_eigenvalues(quadratic(matrix), point(4), steps=1, seed=7)
    assert (found.iterations, found.converged) == (1, False)
    assert float(found.values[0]) == pytest.approx(float(unit @ matrix @ unit))
    assert float(found.residuals[0]) == pytest.approx(float((matrix @ unit - found.values[0] * unit).norm()))


def test_a_ridge_does_not_hide_a_sharp_direction():
    """Almost every direction bends by 1: the first residuals are small, the sharp direction is hardly in them."""
    n = 20_000
    scales = torch.ones(n, dtype=torch.float64)
    scales[0] = 5
    for seed in range(3):
        found = hessian_eigenvalues(
            lambda w: 0.5 * (scales * w["w"] ** 2).sum(), point(n), steps=50, tolerance=0.05, seed=seed
        )
        assert float(found.values[0]) == pytest.approx(5)


@pytest.mark.parametrize("n", [1, 7])
def test_an_invariant_span_stops_the_iteration(n):
    found = hessian_eigenvalues(lambda w: 1.5 * (w["w"] ** 2).sum(), point(n))
    assert found.converged
    assert found.iterations == 1
    assert float(found.values[0]) == pytest.approx(3)


def test_float32_weights():
    loss, weights, exact = problem("tanh")
    narrow = {name: w.float() for name, w in weights.items()}

    def of_narrow(w):
        return loss({name: one.double() for name, one in w.items()})

    found = hessian_eigenvalues(of_narrow, narrow, 3)
    assert found.converged
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(exact).flip(0)[:3], rtol=1e-5, atol=1e-6)
    half = hessian_eigenvalues(
        lambda w: loss({n: one.double() for n, one in w.items()}), {n: w.half() for n, w in weights.items()}
    )
    assert float(half.values[0]) == pytest.approx(float(found.values[0]), rel=0.02)


@pytest.mark.parametrize(
    ("narrow", "wide", "wanted"),
    [
        (torch.float16, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_vectors_are_as_wide_as_the_widest_weights_and_at_least_of_float32(narrow, wide, wanted):
    weights = {"a": torch.ones(2, dtype=narrow), "b": torch.ones(3, dtype=wide)}
    products = HessianProducts(lambda w: sum(one.double().square().sum() for one in w.values()), weights)
    assert products.dtype == wanted
    product = products(torch.arange(5, dtype=products.dtype))
    assert product.dtype == wanted
    assert product.tolist() == [0, 2, 4, 6, 8]


def test_many_products_in_float32_stay_orthogonal():
    values = np.linspace(-1, 1, 120)
    matrix = with_spectrum(values).float()
    found = hessian_eigenvalues(quadratic(matrix), point(120, torch.float32), 4, steps=200, tolerance=0)
    assert found.iterations <= 120
    expected = torch.from_numpy(values[::-1].copy())[:4]
    torch.testing.assert_close(found.values, expected, rtol=0, atol=2e-6)


def test_zero_hessians():
    for loss in (lambda w: w["w"].sum(), lambda w: w["w"].relu().sum(), lambda w: 0 * (w["w"] ** 2).sum()):
        found = hessian_eigenvalues(loss, point(6), 2)
        assert found.converged
        assert found.values.tolist() == [0, 0]
        assert found.residuals.tolist() == [0, 0]
        assert hessian_trace(loss, point(6)).mean == 0


def test_weights_without_a_part_in_the_loss_bend_it_by_nothing():
    weights = point(3) | {"idle": torch.ones(4, dtype=torch.float64), "straight": torch.ones(2, dtype=torch.float64)}
    matrix = with_spectrum([-1.0, 2.0, -3.0])
    found = hessian_eigenvalues(lambda w: quadratic(matrix)(w) + w["straight"].sum(), weights, 9)
    torch.testing.assert_close(
        found.values, torch.tensor([2.0, 0, 0, 0, 0, 0, 0, -1, -3], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_the_trace_of_a_diagonal_hessian_is_exact():
    scales = torch.tensor([3.0, -1.0, 0.5, 8.0], dtype=torch.float64)
    trace = hessian_trace(lambda w: 0.5 * (scales * w["w"] ** 2).sum(), point(4), samples=3)
    assert trace.mean == pytest.approx(10.5)
    assert trace.standard_error == pytest.approx(0, abs=1e-12)


def test_the_standard_error_is_that_of_the_mean():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)  # v'Hv is 6 or -2
    trace = hessian_trace(quadratic(matrix), point(2), samples=50)
    share = (trace.mean + 2) / 8
    assert trace.standard_error == pytest.approx(8 * math.sqrt(share * (1 - share) / 49))


def test_seeds_determine_the_result_and_the_global_state_is_not_used():
    loss, weights, _ = problem("tanh")
    before = torch.get_rng_state()
    first, again = (hessian_eigenvalues(loss, weights, steps=3, seed=1) for _ in range(2))
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, hessian_eigenvalues(loss, weights, steps=3, seed=2).values)
    assert hessian_trace(loss, weights, seed=1) == hessian_trace(loss, weights, seed=1)
    assert hessian_trace(loss, weights, seed=1) != hessian_trace(loss, weights, seed=2)
    assert torch.equal(before, torch.get_rng_state())


def test_attention_and_inference_mode():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0).double()
    inputs = torch.randn(2, 3, 8, dtype=torch.float64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(w):
        return functional_call(layer, dict(w), (inputs,)).pow(3).mean()

    found = hessian_eigenvalues(loss, weights, steps=20)
    with torch.inference_mode():
        same = {name: weight.clone() for name, weight in weights.items()}
        assert torch.equal(hessian_eigenvalues(loss, same, steps=20).values, found.values)
    products = torch.autograd.functional.hvp(
        lambda w: loss({**weights, "linear1.weight": w}),
        weights["linear1.weight"],
        torch.ones(8, 8, dtype=torch.float64),
    )[1]
    part = hessian_eigenvalues(lambda w: loss({**weights, **w}), {"linear1.weight": weights["linear1.weight"]})
    assert float(part.values[0]) >= float(products.sum()) / 64


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"count": 0}, ValueError, "count must be a whole number of at least 1"),
        ({"count": 1.5}, ValueError, "count must be a whole number of at least 1, got 1.5"),
        ({"count": 4}, ValueError, "at most the number of weights, 3, got 4"),
        ({"count": 2, "steps": 1}, ValueError, "steps must be a whole number of at least count=2"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be at least 0"),
        ({"tolerance": "small"}, TypeError, "tolerance must be a number, got a str"),
        ({"seed": "a"}, TypeError, "seed must be a whole number, got a str"),
        ({"seed": 2**64}, ValueError, "seed must be a whole number of 64 bits, got 18446744073709551616"),
        ({"loss": 3}, TypeError, "loss must be a function of weights by name, got a int"),
        ({"weights": {}}, ValueError, "holds no numbers"),
        ({"weights": [torch.ones(3)]}, TypeError, "weights must be tensors by name, .* got a list"),
        ({"weights": {"w": torch.ones(3).long()}}, TypeError, r"torch.int64 for 'w': leave it out"),
        ({"loss": lambda w: w["w"]}, ValueError, r"one number.*shape \(3,\)"),
        ({"loss": lambda w: 1.0}, TypeError, "got a float"),
        ({"loss": lambda w: w["w"].sum() * float("nan")}, ValueError, "is nan"),
        ({"loss": lambda w: w["w"].square().sum() * float("inf")}, ValueError, "is inf"),
        ({"loss": lambda w: w["w"].detach().sum()}, ValueError, "does not depend on the weights"),
        (
            {"loss": lambda w: (w["w"] - w["w"].detach()).abs().pow(1.5).sum()},
            ValueError,
            "Hessian .* is NaN or infinite",
        ),
    ],
)
def test_errors(change, error, text):
    arguments = {"loss": quadratic(torch.eye(3, dtype=torch.float64)), "weights": point(3)} | change
    with pytest.raises(error, match=text):
        hessian_eigenvalues(**arguments)


def test_samples_must_be_two():
    for samples in (1, 2.5):
        with pytest.raises(ValueError, match=f"samples must be a whole number of at least 2, got {samples}"):
            hessian_trace(quadratic(torch.eye(3)), point(3, torch.float32), samples=samples)


def test_a_trace_of_no_function_or_with_a_seed_that_is_no_number():
    with pytest.raises(TypeError, match="loss must be a function of weights by name, got a int"):
        hessian_trace(3, point(3))
    with pytest.raises(TypeError, match="seed must be a whole number, got a str"):
        hessian_trace(quadratic(torch.eye(3)), point(3), seed="a")


def test_a_loss_by_name_is_none():
    with pytest.raises(TypeError, match="loss must be a function of output and target, got a str"):
        Sharpness(loss="cross_entropy")


# The metric


def data(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def exact_hessian(model, inputs, target):
    weights = dict(model.named_parameters())

    def flat(vector):
        parts = vector.split([w.numel() for w in weights.values()])
        named = {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}
        return cross_entropy(functional_call(model, named, (inputs,)), target)

    return hessian(flat, torch.cat([w.detach().flatten() for w in weights.values()]))


def test_sharpness_is_the_mean_over_examples():
    model = network("norm")[0]
    metric = Sharpness(samples=300)
    parts = [data(12), data(4, seed=1)]
    for inputs, target in parts:
        metric.update(model.train(), inputs, target)
    exact = [exact_hessian(model.eval(), *part) for part in parts]
    tops = [float(torch.linalg.eigvalsh(one)[-1]) for one in exact]
    found = metric.compute()
    assert set(found) == {"eigenvalue", "trace"}
    assert float(found["eigenvalue"]) == pytest.approx((12 * tops[0] + 4 * tops[1]) / 16, rel=1e-4)
    assert float(found["trace"]) == pytest.approx((12 * exact[0].trace() + 4 * exact[1].trace()).item() / 16, rel=0.1)
    whole = exact_hessian(model, *(torch.cat(halves) for halves in zip(*parts, strict=True)))
    assert float(found["eigenvalue"]) >= float(torch.linalg.eigvalsh(whole)[-1])


class Restless(nn.Module):
    """Draws random numbers, counts its calls and keeps what it computed, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.inner = network("norm")[0]
        self.register_buffer("calls", torch.zeros(()))
        self.kept = None

    def forward(self, x):
        self.calls += 1
        self.kept = self.inner(nn.functional.dropout(x, 0.5, training=True))
        return self.kept


def test_the_network_and_the_random_state_are_left_alone():
    model = Restless()
    model.inner[0].eval()
    model.inner[2].train()
    inputs, target = data()
    cross_entropy(model(inputs), target).backward()
    kept = model.kept
    before = copy.deepcopy(dict(model.state_dict(keep_vars=False)))
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="not converged after steps=2"):
        Sharpness(steps=2).update(model, inputs, target)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(grad, p.grad) for grad, p in zip(grads, model.parameters(), strict=True))
    assert modes == [part.training for part in model.modules()]
    assert model.kept is kept


def test_frozen_weights_are_left_out():
    model = network("tanh")[0]
    model[0].requires_grad_(False)
    inputs, target = data()
    metric = Sharpness()
    metric.update(model, inputs, target)
    whole = exact_hessian(model, inputs, target)[36:, 36:]
    assert float(metric.compute()["eigenvalue"]) == pytest.approx(float(torch.linalg.eigvalsh(whole)[-1]), rel=1e-4)
    with pytest.raises(ValueError, match="No parameter of the Sequential takes a gradient"):
        metric.update(model.requires_grad_(False), inputs, target)


def test_in_inference_mode_and_with_a_loss_of_ones_own():
    model, inputs = network("tanh")
    first, second = Sharpness(lambda output, target: (output - target).square().mean()), Sharpness()
    with torch.inference_mode():
        first.update(model, inputs.clone(), torch.zeros(12, 3, dtype=torch.float64))
        second.update(model, inputs.clone(), torch.arange(12) % 3)
    third = Sharpness()
    third.update(model, inputs, torch.arange(12) % 3)
    assert second.compute() == third.compute()
    assert first.compute() != second.compute()


def test_the_metric_as_a_metric():
    metric = Sharpness()
    assert metric.higher_is_better is False
    assert not metric.full_state_update
    assert not metric.is_differentiable
    assert metric.compute()["eigenvalue"].isnan()
    metric.reset()
    inputs, target = data()
    batch = metric(network("tanh")[0], inputs, target)
    assert batch["eigenvalue"] == metric.compute()["eigenvalue"] > 0
    figure, _ = metric.plot()
    figure.savefig(io.BytesIO())
    with pytest.raises(ValueError, match="steps"):
        Sharpness(steps=0)
    with pytest.raises(ValueError, match="samples"):
        Sharpness(samples=1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": None}, TypeError, "model must be a torch.nn.Module, got a NoneType"),
        (
            {"inputs": torch.zeros(0, 5).double(), "target": torch.zeros(0).long()},
            ValueError,
            "target holds no example",
        ),
        ({"target": None}, TypeError, "target must have an entry for each example of the batch, got a NoneType"),
        ({"target": torch.tensor(1)}, TypeError, "target must have .* got a Tensor of one number"),
        (
            {"target": torch.zeros(3).long()},
            ValueError,
            "loss cannot be computed of .* output and the target: ValueError: ",
        ),
        (
            {"inputs": torch.zeros(12, 4).double()},
            ValueError,
            "Linear cannot be run on the inputs of the batch: Runtime",
        ),
        ({"inputs": np.zeros((12, 5))}, ValueError, "Linear cannot be run .* must be Tensor, not numpy.ndarray"),
    ],
)
def test_what_an_update_cannot_measure(change, error, text):
    inputs, target = data()
    metric = Sharpness()
    with pytest.raises(error, match=text):
        metric.update(**({"model": nn.Linear(5, 3).double(), "inputs": inputs, "target": target} | change))
    assert metric.examples == 0
