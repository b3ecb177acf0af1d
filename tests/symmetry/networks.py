"""Networks of many kinds, by name: how to build one, what goes in, and how many groups are to be found, counted by hand.

A group is one permutation that can be chosen by itself. Attention has three: the heads, and inside a head the neurons of query and key, and
those of value and output. A norm over groups of channels has two: the groups, and the channels inside one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    inputs: tuple[torch.Tensor, ...]
    groups: int
    kwargs: dict[str, Any] = field(default_factory=dict)


class Of(nn.Module):
    """A network from its parts and its forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def vectors(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tokens(*shape):
    return torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(0))


ROWS, IMAGE, WORDS = vectors(3, 4), vectors(2, 3, 8, 8), tokens(2, 5)


def residual_mlp():
    def forward(m, x):
        h = m.a(x).relu()
        return m.c(h + m.b(h).relu())

    return Of(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2))


def conv_net(*between):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))


def concat():
    def forward(m, x):
        return m.c(torch.cat([m.a(x).relu(), m.b(x).relu()], 1))

    return Of(forward, a=nn.Linear(4, 5), b=nn.Linear(4, 7), c=nn.Linear(12, 2))


def two_heads():
    return Of(
        lambda m, x: m.b(m.a(x).relu()) + m.c(m.a(x).relu()), a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(5, 2)
    )


def reused():
    return Of(
        lambda m, x: m.c(m.b(m.b(m.a(x).relu()).relu()).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2)
    )


def lstm():
    return Of(lambda m, x: m.head(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(4, 6, 2, batch_first=True), head=nn.Linear(6, 3))


def bidirectional_lstm():
    return Of(
        lambda m, x: m.head(m.lstm(x)[0].mean(1)),
        lstm=nn.LSTM(4, 6, batch_first=True, bidirectional=True, proj_size=5),
        head=nn.Linear(10, 3),
    )


def gru():
    return Of(
        lambda m, x: m.head(m.gru(m.embedding(x))[1].transpose(0, 1).flatten(1)),
        embedding=nn.Embedding(10, 7),
        gru=nn.GRU(7, 6, 2, bidirectional=True, batch_first=True),
        head=nn.Linear(24, 3),
    )


def lstm_cell():
    def forward(m, x):
        state = x.new_zeros(len(x), 6), x.new_zeros(len(x), 6)
        for step in x.unbind(1):
            state = m.cell(step, state)
        return m.head(state[0])

    return Of(forward, cell=nn.LSTMCell(4, 6), head=nn.Linear(6, 3))


def attention():
    return Of(
        lambda m, x: m.head(m.attention(m.a(x), m.a(x), m.a(x))[0].mean(1)),
        a=nn.Linear(5, 12),
        attention=nn.MultiheadAttention(12, 3, batch_first=True),
        head=nn.Linear(12, 2),
    )


def volumes():
    return nn.Sequential(
        nn.Conv3d(1, 4, 3),
        nn.BatchNorm3d(4),
        nn.ELU(),
        nn.AdaptiveAvgPool3d(2),
        nn.Conv3d(4, 6, 1),
        nn.Flatten(),
        nn.Linear(48, 4),
    )


def sequences():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(30, 4),
    )


def u_net():
    def forward(m, x):
        high = F.relu(m.norm1(m.down1(x)))
        low = F.relu(m.norm2(m.down2(F.max_pool2d(high, 2))))
        middle = F.relu(m.norm3(m.up1(torch.cat([m.up(low), high], 1))))
        both = torch.cat([F.interpolate(low, scale_factor=2, mode="bilinear"), middle], 1)
        return m.out(F.silu(m.up2(both)))

    return Of(
        forward,
        down1=nn.Conv2d(3, 8, 3, padding=1),
        norm1=nn.GroupNorm(4, 8),
        down2=nn.Conv2d(8, 16, 3, padding=1),
        norm2=nn.BatchNorm2d(16),
        up=nn.ConvTranspose2d(16, 12, 2, 2),
        up1=nn.Conv2d(20, 8, 3, padding=1),
        norm3=nn.GroupNorm(2, 8),
        up2=nn.Conv2d(24, 12, 1),
        out=nn.Conv2d(12, 2, 1),
    )


class MixerBlock(nn.Module):
    def __init__(self, n_tokens, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = nn.Sequential(nn.Linear(n_tokens, 9), nn.GELU(), nn.Linear(9, n_tokens))
        self.channels = nn.Sequential(nn.Linear(channels, 11), nn.GELU(), nn.Linear(11, channels))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def mixer():
    return Of(
        lambda m, x: m.head(m.blocks(m.patches(x).flatten(2).transpose(1, 2)).mean(1)),
        patches=nn.Conv2d(3, 8, 2, 2),
        blocks=nn.Sequential(MixerBlock(16, 8), MixerBlock(16, 8)),
        head=nn.Linear(8, 4),
    )


def encoder_decoder(**options):
    def forward(m, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        place = m.position[: source.shape[1]]
        out = m.transformer(m.embedding(source) + place, m.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return m.head(out)

    return Of(
        forward,
        embedding=nn.Embedding(10, 12),
        position=nn.Parameter(torch.zeros(9, 12)),
        transformer=nn.Transformer(12, 3, 2, 2, 20, batch_first=True, **options),
        head=nn.Linear(12, 10),
    )


def tied():
    model = Of(
        lambda m, x: m.out(F.relu(m.hidden(m.embedding(x)))),
        embedding=nn.Embedding(10, 12),
        hidden=nn.Linear(12, 12),
        out=nn.Linear(12, 10, bias=False),
    )
    model.out.weight = model.embedding.weight
    return model


def loop_and_branch():
    def forward(m, x):
        for layer in m.layers:
            x = layer(x)
            x = F.relu(x) if x.shape[-1] > 6 else torch.tanh(x) * 2 + x
        return m.head(x)

    layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 9)])
    return Of(forward, layers=layers, head=nn.Linear(9, 2))


def several_inputs():
    def forward(m, a, b, scale):
        gate = torch.sigmoid(m.b(b))
        return {"x": m.out(m.a(a) * gate), "y": [m.other(m.b(b)) * scale]}

    return Of(forward, a=nn.Linear(4, 6), b=nn.Linear(5, 6), out=nn.Linear(6, 2), other=nn.Linear(6, 3))


def token_convolutions():
    """Convolutions of width one, by which no position is told from another."""

    def forward(m, x):
        h = m.a(x)
        h = m.mix(F.gelu(m.spread(h.transpose(0, 1)))).transpose(0, 1)  # over the batch; features are positions
        return m.head(h.sum(1))

    return Of(
        forward,
        a=nn.Linear(5, 7),
        spread=nn.Conv1d(2, 4, 1),
        mix=nn.Conv1d(4, 2, 1),
        head=nn.Linear(7, 3),
    )


def split_heads():
    """Eight heads in three parts of 2, 3 and 3, each with weights of its own, over one and the same kind of channel (CoaT)."""

    def forward(m, x):
        heads = m.v(m.a(x)).unflatten(-1, (8, 4)).flatten(2)
        parts = [part * scale for part, scale in zip(heads.split([8, 12, 12], -1), m.scales, strict=True)]
        mixed = torch.cat(parts, -1).unflatten(-1, (8, 4)) @ m.inside
        return m.head(mixed.flatten(2).mean(1))

    scales = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in (8, 12, 12)])
    inside = nn.Parameter(torch.zeros(4, 4))
    return Of(forward, a=nn.Linear(5, 9), v=nn.Linear(9, 32), scales=scales, inside=inside, head=nn.Linear(32, 2))


def avalanche(name, **options):
    def build():
        from avalanche import models

        return getattr(models, name)(**options)

    return build


def slim_resnet18():
    from avalanche.models import SlimResNet18

    return SlimResNet18(nclasses=5, nf=4)


def torchvision(name, **options):
    def build():
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=5, **options)

    return build


def small_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=20, num_classes=5
    )


TABLE = {
    "MLP": Network(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), (ROWS,), 2
    ),
    "MLP without bias": Network(
        lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)), (ROWS,), 1
    ),
    "Linear on 3-D input": Network(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (vectors(2, 3, 4),), 1
    ),
    "residual MLP": Network(residual_mlp, (ROWS,), 1),
    "Conv, Flatten, Linear": Network(
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 2)), (IMAGE,), 1
    ),
    "Conv and BN": Network(lambda: conv_net(nn.BatchNorm2d(8)), (IMAGE,), 2),
    "Conv and BN without affine": Network(lambda: conv_net(nn.BatchNorm2d(8, affine=False)), (IMAGE,), 2),
    "Conv and GroupNorm(4)": Network(lambda: conv_net(nn.GroupNorm(4, 8)), (IMAGE,), 3),
    "Linear and LayerNorm": Network(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)), (ROWS,), 1
    ),
    "PReLU per channel": Network(lambda: nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 2)), (ROWS,), 1),
    "depthwise conv": Network(lambda: conv_net(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)), (IMAGE,), 2),
    "ConvTranspose": Network(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2, 2), nn.ReLU(), nn.Conv2d(5, 2, 1)
        ),
        (IMAGE,),
        2,
    ),
    "concat": Network(concat, (ROWS,), 2),
    "two heads summed": Network(two_heads, (ROWS,), 1),
    "same layer used twice": Network(reused, (ROWS,), 1),
    "LSTM": Network(lstm, (vectors(2, 5, 4),), 2),
    "MultiheadAttention": Network(attention, (vectors(2, 6, 5),), 5),
    "Avalanche SimpleMLP": Network(avalanche("SimpleMLP", input_size=192, num_classes=5), (IMAGE,), 1),
    "Avalanche SimpleCNN": Network(avalanche("SimpleCNN", num_classes=5), (vectors(2, 3, 32, 32),), 5),
    "Avalanche SlimResNet18": Network(slim_resnet18, (vectors(2, 3, 32, 32),), 12),
    "torchvision resnet18": Network(torchvision("resnet18"), (vectors(1, 3, 32, 32),), 12),
    "torchvision vgg11_bn": Network(torchvision("vgg11_bn"), (vectors(1, 3, 32, 32),), 10),
    "torchvision mobilenet_v2": Network(torchvision("mobilenet_v2"), (vectors(1, 3, 32, 32),), 25),
    "torchvision densenet121": Network(torchvision("densenet121"), (vectors(1, 3, 32, 32),), 120),
    "torchvision ViT, 2 blocks": Network(small_vit, (IMAGE,), 9),
}

OTHERS = {
    "LSTM, bidirectional with projection": Network(bidirectional_lstm, (vectors(2, 5, 4),), 4),
    "GRU on words": Network(gru, (WORDS,), 5),
    "LSTM cell in a loop": Network(lstm_cell, (vectors(2, 5, 4),), 1),
    "1-D convolutions": Network(sequences, (vectors(2, 3, 16),), 3),
    "3-D convolutions": Network(volumes, (vectors(2, 1, 6, 6, 6),), 2),
    "U-Net": Network(u_net, (IMAGE,), 7),
    "MLP-Mixer": Network(mixer, (IMAGE,), 5),
    "encoder-decoder": Network(encoder_decoder, (WORDS, tokens(2, 4)), 23),
    "encoder-decoder, norm first": Network(lambda: encoder_decoder(norm_first=True), (WORDS, tokens(2, 4)), 23),
    "tied embedding": Network(tied, (WORDS,), 1),
    "loop and branch on shapes": Network(loop_and_branch, (ROWS,), 3),
    "RMSNorm": Network(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8, eps=1e-6), nn.SiLU(), nn.Linear(8, 2)), (ROWS,), 1
    ),
    "pointwise convolutions over tokens": Network(token_convolutions, (vectors(2, 6, 5),), 2),
    "heads of three kinds": Network(split_heads, (vectors(2, 6, 5),), 6),
    "several inputs, dictionary output": Network(
        several_inputs, (ROWS, vectors(3, 5)), 1, kwargs={"scale": torch.tensor(2.0, dtype=torch.float64)}
    ),
}
