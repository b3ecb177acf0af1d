import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torchvision.models.resnet import BasicBlock

from lit_rebasin.metrics import suggest_scales
from lit_rebasin.metrics.residual import layout
from lit_rebasin.symmetry.keep import use_batch_statistics


def applied(model, scales):
    """A copy of the network with the initial scales that are suggested."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for scale in scales:
            for parameter in model.get_submodule(scale.name).parameters(recurse=False):
                parameter *= scale.weight_scale
    return model


def outputs(model, names, inputs):
    """The outputs of some layers, and the inputs of the last, of a network that takes statistics of the batch."""
    kept, handles = {}, []
    for name in names:

        def keep(_module, given, output, name=name):
            kept[name] = (given[0].detach().clone(), output.detach().clone())

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    model.eval()
    use_batch_statistics(model)
    output = model(inputs)
    for handle in handles:
        handle.remove()
    return output, kept


def rms(tensor):
    return float(tensor.square().mean().sqrt())


def step(model, scales, inputs, target, loss=cross_entropy):
    """One step of plain gradient descent by torch's own optimizer: what each layer takes off the loss, and the change of the features."""
    last = scales[-1].name
    output, before = outputs(model, [last], inputs)
    groups = [
        {"params": list(model.get_submodule(s.name).parameters(recurse=False)), "lr": s.learning_rate} for s in scales
    ]
    loss(output, target).backward()
    decays = [g["lr"] * sum(float(p.grad.square().sum()) for p in g["params"]) for g in groups]
    torch.optim.SGD(groups, lr=1).step()
    _, after = outputs(model, [last], inputs)
    return decays, float((after[last][0] - before[last][0]).norm() / before[last][0].norm())


def deep(depth=10, width=48):
    torch.manual_seed(0)
    layers = [nn.Linear(20, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 5))
    with torch.no_grad():
        for k in range(0, 2 * depth, 4):
            model[k].weight *= 3 + k
        model[2].weight *= 0.01
    return model


class Residual(nn.Module):
    """Branches of two layers; with ``norm`` each ends in a normalization."""

    def __init__(self, branches, kind="linear", norm=None):
        super().__init__()
        torch.manual_seed(branches)
        width = 16
        layer = nn.Linear if kind == "linear" else lambda n, m: nn.Conv2d(n, m, 3, padding=1)
        ends = {"layer": lambda: [nn.LayerNorm(width)], "batch": lambda: [nn.BatchNorm2d(width)], None: list}[norm]
        self.stem = layer(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(layer(width, width), nn.ReLU(), layer(width, width), *ends()) for _ in range(branches)
        )
        self.pool = nn.Identity() if kind == "linear" else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.pool(x))


def batch_for(model):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, nn.Sequential):
        return 2 * torch.randn(64, 20, generator=generator), torch.arange(64) % 5
    shape = (32, 3) if isinstance(model.stem, nn.Linear) else (16, 3, 6, 6)
    return torch.randn(shape, generator=generator), torch.arange(shape[0]) % 4


NETWORKS = [
    deep,
    lambda: Residual(6),
    lambda: Residual(4, "conv"),
    lambda: Residual(3, "conv", "batch"),
    lambda: Residual(3, norm="layer"),
]
IDS = ["deep", "residual", "convolutions", "batch norm", "layer norm"]


@pytest.mark.parametrize("make", NETWORKS, ids=IDS)
def test_signals_propagate(make):
    model = make()
    inputs, target = batch_for(model)
    scales = suggest_scales(model, (inputs, target))
    _, kept = outputs(applied(model, scales), [s.name for s in scales], inputs)
    branches = len(model.blocks) if isinstance(model, Residual) else 0
    for scale in scales[:-1]:
        expected = 1 / math.sqrt(branches) if scale.on_branch else 1
        assert rms(kept[scale.name][1]) == pytest.approx(expected, rel=0.01), scale
    assert scales[-1].weight_scale == 1
    assert sum(scale.on_branch for scale in scales) == branches


@pytest.mark.parametrize("make", NETWORKS, ids=IDS)
@pytest.mark.parametrize("change", [0.01, 0.1])
def test_a_step_moves_the_features_as_asked_and_layers_contribute_alike(make, change):
    model = make()
    inputs, target = batch_for(model)
    scales = suggest_scales(model, (inputs, target), change=change)
    decays, moved = step(applied(model, scales), scales, inputs, target)
    assert moved == pytest.approx(change, rel=0.03)
    assert max(decays) == pytest.approx(min(decays), rel=1e-3)


def test_without_the_scales_the_features_of_the_deep_network_vanish_or_blow_up():
    model = deep()
    inputs, _ = batch_for(model)
    _, kept = outputs(copy.deepcopy(model), ["2", "16"], inputs)
    assert rms(kept["2"][1]) < 0.5
    assert rms(kept["16"][1]) > 3


def test_a_loss_of_ones_own():
    model = deep()
    inputs, _ = batch_for(model)
    target = torch.randn(64, 5)
    scales = suggest_scales(model, [inputs, target], loss=mse_loss)
    decays, moved = step(applied(model, scales), scales, inputs, target, mse_loss)
    assert moved == pytest.approx(0.01, rel=0.03)
    assert max(decays) == pytest.approx(min(decays), rel=1e-3)
    assert scales != suggest_scales(model, (inputs, target), loss=lambda o, t: mse_loss(o, t, reduction="sum"))


@pytest.mark.parametrize(("kind", "norm"), [("linear", "layer"), ("conv", "batch")])
def test_norms_that_end_branches_are_measured_whatever_their_weights(kind, norm):
    model = Residual(2, kind, norm)
    with torch.no_grad():
        for block, weight in zip(model.blocks, (0.1, 3.0), strict=True):
            block[-1].weight.fill_(weight)
            block[-1].bias.fill_(0.2)
    inputs, target = batch_for(model)
    scales = suggest_scales(model, (inputs, target))
    names = [f"blocks.{k}.3" for k in range(2)]
    assert [scale.name for scale in scales if scale.on_branch] == names
    _, kept = outputs(applied(model, scales), names, inputs)
    assert [rms(kept[name][1]) for name in names] == pytest.approx([1 / math.sqrt(2)] * 2, rel=0.01)


class Blocks(nn.Module):
    """Two blocks of torchvision's, the first with a layer in its shortcut."""

    def __init__(self, zero=False):
        super().__init__()
        torch.manual_seed(0)
        shortcut = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(BasicBlock(3, 8, downsample=shortcut), BasicBlock(8, 8), BasicBlock(8, 8))
        self.head = nn.Linear(8, 4)
        if zero:
            nn.init.zeros_(self.blocks[2].bn2.weight)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


IMAGES = (torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)


def test_blocks_of_torchvision_scale_the_norm():
    scales = {scale.name: scale for scale in suggest_scales(Blocks(), IMAGES)}
    ends = {name for name, scale in scales.items() if scale.on_branch}
    assert ends == {"blocks.1.bn2", "blocks.2.bn2"}
    assert all(scales[name].weight_scale == pytest.approx(1 / math.sqrt(2), rel=0.01) for name in ends)
    assert "blocks.0.bn2" not in scales
    assert list(scales).index("blocks.1.conv2") + 1 == list(scales).index("blocks.1.bn2")


def ends(forward, **parts):
    """The branches of a network with the forward pass and the parts given."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x):
            return forward(self, x)

    found = layout(Network(), (torch.randn(4, 6),))
    return found.branches, set(found.ends)


def linear():
    return nn.Linear(6, 6)


def test_what_is_a_residual_branch():
    assert ends(lambda m, x: m.a(x) + x, a=linear()) == (1, {"a"})
    assert ends(lambda m, x: x + m.b(m.a(x)).relu().mul(2), a=linear(), b=linear()) == (1, {"b"})
    assert ends(lambda m, x: (y := m.a(x)) + m.b(y) * m.c(x), a=linear(), b=linear(), c=linear()) == (1, {"b"})
    assert ends(lambda m, x: m.a(x) + m.b(x), a=linear(), b=linear()) == (0, set())
    assert ends(lambda m, x: m.a(x + x.tanh() + 1), a=linear()) == (0, set())
    assert ends(lambda m, x: x - m.a(x), a=linear()) == (0, set())
    assert ends(lambda m, x: x + (m.a(x) + m.b(x)), a=linear(), b=linear()) == (1, {"a", "b"})


def test_branches_that_are_written_in_place():
    def forward(m, x):
        y = m.a(x)
        y += x
        return m.b(y.relu_()) + y

    assert ends(forward, a=linear(), b=linear()) == (2, {"a", "b"})


def test_a_gate_does_not_set_the_size_of_a_branch():
    def forward(m, x):
        y = m.a(x)
        return x + y * m.gate(y).sigmoid()

    assert ends(forward, a=linear(), gate=linear()) == (1, {"a"})


def test_norms_at_the_end_of_a_branch():
    assert ends(lambda m, x: x + m.n(m.a(x)), a=linear(), n=nn.LayerNorm(6)) == (1, {"n"})
    assert ends(lambda m, x: x + m.a(m.n(x)), a=linear(), n=nn.LayerNorm(6)) == (1, {"a"})
    assert ends(lambda m, x: x + m.n(x), n=nn.LayerNorm(6)) == (0, set())
    bare = nn.LayerNorm(6, elementwise_affine=False)
    assert ends(lambda m, x: x + m.n(m.a(x)), a=linear(), n=bare) == (1, set())


def test_attention_is_scaled_where_it_ends():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
    )
    model = nn.Sequential(nn.Linear(5, 8), encoder, nn.Flatten(), nn.Linear(24, 3))
    inputs, target = torch.randn(16, 3, 5), torch.arange(16) % 3
    scales = {scale.name: scale for scale in suggest_scales(model, (inputs, target))}
    assert {name for name, scale in scales.items() if scale.on_branch} == {
        f"1.layers.{k}.{name}" for k in range(2) for name in ("self_attn.out_proj", "linear2")
    }
    assert scales["1.layers.0.self_attn.out_proj"].weight_scale == 0.5
    _, kept = outputs(applied(model, scales.values()), ["1.layers.1.linear1", "1.layers.1.linear2"], inputs)
    assert rms(kept["1.layers.1.linear1"][1]) == pytest.approx(1, rel=0.01)
    assert rms(kept["1.layers.1.linear2"][1]) == pytest.approx(0.5, rel=0.01)


class Restless(nn.Module):
    """Draws random numbers and keeps what it computed, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.inner, self.kept = Residual(2, "conv", "batch"), None

    def forward(self, x):
        self.kept = self.inner(x) + 0 * torch.rand(())
        return self.kept


def test_the_network_and_the_random_state_are_left_alone():
    model = Restless()
    model.inner.blocks[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    state = torch.get_rng_state()
    inputs, target = batch_for(model.inner)
    with torch.inference_mode():
        suggest_scales(model, (inputs.clone(), target.clone()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == [part.training for part in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert model.kept is None


def test_a_module_that_stands_in_a_network_twice():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 3))
    batch = torch.randn(20, 4), torch.arange(20) % 3
    scales = suggest_scales(model, batch)
    assert [scale.name for scale in scales] == ["0", "4"]
    decays, moved = step(applied(model, scales), scales, *batch)
    assert moved == pytest.approx(0.01, rel=0.03)
    assert decays[0] == pytest.approx(decays[1], rel=1e-3)


def test_layers_that_are_used_twice_and_frozen_ones():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.shared, self.last = nn.Linear(20, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.last(self.shared(self.shared(self.first(x)).tanh()))

    model = Twice()
    model.first.requires_grad_(False)
    inputs, target = torch.randn(32, 20), torch.arange(32) % 5
    scales = suggest_scales(model, (inputs, target))
    assert [scale.name for scale in scales] == ["shared", "last"]
    with torch.no_grad():
        assert scales[0].weight_scale * rms(model.shared(model.first(inputs))) == pytest.approx(1, rel=1e-4)
    decays, moved = step(applied(model, scales), scales, inputs, target)
    assert moved == pytest.approx(0.01, rel=0.03)
    assert decays[0] == pytest.approx(decays[1], rel=1e-3)


def test_a_weight_shared_with_an_embedding_is_the_output_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.middle, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.middle(self.embedding(x)).tanh())

    tokens = torch.arange(28) % 7
    scales = suggest_scales(Tied(), (tokens, tokens.roll(1)))
    assert [scale.name for scale in scales] == ["middle", "head"]
    assert scales[1].weight_scale == 1
    decays, moved = step(applied(Tied(), scales), scales, tokens, tokens.roll(1))
    assert moved == pytest.approx(0.01, rel=0.03)
    assert decays[0] == pytest.approx(decays[1], rel=1e-3)


def test_a_layer_of_zeros_stays_as_it_is():
    model = Residual(2)
    for block in model.blocks:
        block[0] = nn.Identity()
        nn.init.zeros_(block[2].weight)
        nn.init.zeros_(block[2].bias)
    scales = suggest_scales(model, batch_for(model))
    assert [scale.weight_scale for scale in scales if scale.on_branch] == [1, 1]
    decays, moved = step(applied(model, scales), scales, *batch_for(model))
    assert moved == pytest.approx(0.01, rel=0.03)
    assert max(decays) == pytest.approx(min(decays), rel=1e-3)


def test_large_changes_grow_faster_than_the_step():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(20, 20, bias=False) for _ in range(6)], nn.Linear(20, 5))
    inputs, target = batch_for(model)
    scales = suggest_scales(model, (inputs, target), change=50.0)
    assert step(applied(model, scales), scales, inputs, target)[1] == pytest.approx(50, rel=0.03)


def dead():
    model = deep(3)
    nn.init.zeros_(model[6].weight)
    return model


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(20, 5)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def infinite():
    model = deep(3)
    with torch.no_grad():
        model[2].bias[0] = float("inf")
    return model


@pytest.mark.parametrize(
    ("make", "change", "error", "text"),
    [
        (deep, {"change": 0}, ValueError, "change must be a share above 0"),
        (deep, {"change": "a"}, TypeError, "change must be a number, got a str"),
        (lambda: None, {}, TypeError, "model must be a torch.nn.Module, got a NoneType"),
        (deep, {"loss": "mse"}, TypeError, "loss must be a function of output and target, got a str"),
        (deep, {"batch": torch.ones(3, 20)}, TypeError, "pair of inputs and target, got a Tensor"),
        (deep, {"batch": (torch.ones(3, 20),) * 3}, TypeError, "pair of inputs and target, got a tuple of 3"),
        (
            deep,
            {"batch": (torch.ones(3, 7), torch.zeros(3).long())},
            ValueError,
            "Sequential cannot be run on the inputs of the batch: RuntimeError: .*shapes cannot be multiplied",
        ),
        (deep, {"batch": (np.ones((3, 20)), torch.zeros(3).long())}, ValueError, "cannot be run .* not numpy.ndarray"),
        (
            deep,
            {"batch": (torch.ones(3, 20), None)},
            ValueError,
            "loss cannot be computed of .* output and the target: ",
        ),
        (deep, {"batch": (torch.ones(3, 20), torch.zeros(2).long())}, ValueError, "loss cannot be computed of .*"),
        (lambda: nn.Linear(20, 5), {}, ValueError, "Linear uses 1 linear or convolution layers"),
        (lambda: nn.ReLU(), {}, ValueError, "ReLU uses 0 linear"),
        (lambda: deep().requires_grad_(False), {}, ValueError, "uses 0 linear"),
        (dead, {}, ValueError, "gradient of the loss in layer '0' is zero.*initialized to zeros"),
        (Branching, {}, ValueError, "residual branches of Branching .* torch.export cannot make it: "),
        (infinite, {}, ValueError, "output of layer '2' is NaN or infinite"),
        (deep, {"loss": lambda o, t: cross_entropy(o, t, reduction="none")}, ValueError, "must return one number"),
        (deep, {"loss": lambda o, t: cross_entropy(o, t) * float("nan")}, ValueError, "is nan"),
        (deep, {"loss": lambda o, t: o.detach().sum()}, ValueError, "does not depend"),
        (
            lambda: nn.Sequential(nn.Linear(20, 9), nn.Sigmoid(), nn.Linear(9, 5)),
            {"change": 99.0},
            ValueError,
            "change=99",
        ),
    ],
)
def test_errors(make, change, error, text):
    batch = change.pop("batch", batch_for(nn.Sequential()))
    with pytest.raises(error, match=text):
        suggest_scales(make(), batch, **change)


def test_a_branch_that_starts_at_zero_says_what_to_do():
    with pytest.raises(ValueError, match=r"in layer 'blocks.2.conv1' is zero.*initialized to zeros"):
        suggest_scales(Blocks(zero=True), IMAGES)
