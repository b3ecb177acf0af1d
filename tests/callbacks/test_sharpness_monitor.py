"""Sharpness against exact Hessians."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lit_rebasin import (
    SharpnessMonitor,
    hessian_eigenvalues,
    hessian_trace,
)

from .monitored import Plain, X, Y, fit


def test_sharpness_is_that_of_the_exact_hessian(tmp_path):
    module, monitor = Plain(rate=0.5), SharpnessMonitor(examples=60)
    fit(tmp_path, monitor, module, max_epochs=3)
    weights = [p.detach().double() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    network = nn.Sequential(module.net, module.head).double()

    def loss(flat):
        parts = flat.split([w.numel() for w in weights])
        renamed = {
            n.replace("net.", "0.").replace("head.", "1."): part.view_as(w)
            for n, part, w in zip(names, parts, weights, strict=True)
        }
        return cross_entropy(torch.func.functional_call(network, renamed, (X.double(),)), Y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([w.flatten() for w in weights]))
    found = monitor.history[-1]
    assert found["sharpness/eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.02)
    assert found["sharpness/residual"] < 0.01 * float(torch.linalg.eigvalsh(hessian).abs().max())
    assert abs(found["sharpness/trace"] - float(hessian.trace())) < 4 * found["sharpness/trace_error"] + 0.05


def test_sharpness_leaves_frozen_parameters_out(tmp_path):
    module = Plain()
    module.net.requires_grad_(False)
    monitor = SharpnessMonitor(examples=60)
    fit(tmp_path, monitor, module)
    with torch.no_grad():
        shares = module.head(module.net(X)).softmax(1)
        features = torch.cat([module.net(X), torch.ones(60, 1)], dim=1).double()
    shares = shares.double()
    # The Hessian of a linear classifier: the mean of (diag(p) - p p') times (f f').
    curvature = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None, :]
    hessian = torch.einsum("nij,na,nb->iajb", curvature, features, features).reshape(18, 18) / 60
    wanted = float(torch.linalg.eigvalsh(hessian)[-1])
    assert monitor.history[-1]["sharpness/eigenvalue"] == pytest.approx(wanted, rel=0.02)


def test_dropout_is_off_while_it_is_measured(tmp_path):
    class Drops(Plain):
        def __init__(self):
            super().__init__()
            self.net.insert(0, nn.Dropout(0.5))

    module, monitor = Drops(), SharpnessMonitor(examples=60)
    fit(tmp_path, monitor, module)
    module.eval()
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(one):
        network = nn.ModuleDict({"net": module.net, "head": module.head})
        hidden = torch.func.functional_call(network["net"], {n[4:]: w for n, w in one.items() if n[:4] == "net."}, (X,))
        return cross_entropy(hidden @ one["head.weight"].T + one["head.bias"], Y)

    wanted = hessian_eigenvalues(loss, weights, tolerance=1e-4)
    assert monitor.history[-1]["sharpness/eigenvalue"] == pytest.approx(float(wanted.values[0]), rel=0.02)
    trace = hessian_trace(loss, weights, 4, seed=0)
    assert monitor.history[-1]["sharpness/trace"] == pytest.approx(trace.mean, rel=1e-3)
    assert monitor.history[-1]["sharpness/trace_error"] == pytest.approx(trace.standard_error, rel=1e-2)


def test_a_seed_that_is_no_number_is_refused_before_the_fit():
    with pytest.raises(TypeError, match="seed must be a whole number, got a str"):
        SharpnessMonitor(seed="x")
