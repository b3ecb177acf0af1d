"""Networks of random structure, drawn by hypothesis."""

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st
from torch import nn

BLOCKS = (
    "conv",
    "depthwise",
    "grouped",
    "norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "activation",
    "prelu",
    "residual",
    "bottleneck",
    "dense",
    "squeeze_excite",
    "gate",
    "shuffle",
    "halves",
    "pool",
    "transposed",
    "attention",
    "packed_attention",
    "mix_tokens",
    "concatenate_norm",
    "pad",
    "scale",
)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Dense(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.cat([x, self.inner(x)], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Gate(nn.Module):
    def __init__(self, channels, chunked):
        super().__init__()
        self.both, self.chunked = nn.Conv2d(channels, 2 * channels, 1), chunked

    def forward(self, x):
        if not self.chunked:
            return F.glu(self.both(x), 1)
        value, gate = self.both(x).chunk(2, 1)
        return value * F.silu(gate)


class Halves(nn.Module):
    """Works on one half of the channels, as ShuffleNet does."""

    def __init__(self, channels, shuffled):
        super().__init__()
        self.kept, self.shuffled = channels // 2, shuffled
        self.inner = nn.Conv2d(channels - self.kept, channels - self.kept, 3, padding=1)

    def forward(self, x):
        y = torch.cat([x[:, : self.kept], self.inner(x[:, self.kept :])], 1)
        if self.shuffled and y.shape[1] % 2 == 0:
            batch, channels, height, width = y.shape
            y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return y


class Tokens(nn.Module):
    """Runs a layer on the positions of a feature map as a sequence."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens + self.inner(tokens)).transpose(1, 2).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    def __init__(self, width, heads, packed):
        super().__init__()
        self.heads, self.packed = heads, packed
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x))
        if self.packed:
            q, k, v = qkv.reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))


class MixTokens(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.first, self.second = nn.Linear(length, 5), nn.Linear(5, length)

    def forward(self, x):
        return self.second(F.gelu(self.first(x.transpose(1, 2)))).transpose(1, 2)


class LastNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PadChannels(nn.Module):
    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 1, 2))


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        return x * self.scale


def block(draw, kind, c):
    """Return a layer and the number of channels that it gives."""
    divisors = [d for d in range(1, c + 1) if c % d == 0]
    pick = lambda options: draw(st.sampled_from(options))  # noqa: E731
    if kind == "conv":
        out = draw(st.integers(2, 9))
        return nn.Conv2d(c, out, pick([1, 3]), padding="same", bias=pick([True, False])), out
    if kind == "grouped":
        groups = pick(divisors)
        out = groups * draw(st.integers(1, 3))
        return nn.Conv2d(c, out, 3, padding=1, groups=groups), out
    if kind == "transposed":
        groups = pick(divisors)
        out = groups * draw(st.integers(1, 3))
        return nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups), out
    if kind == "dense":
        grown = draw(st.integers(1, 5))
        return Dense(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, grown, 3, padding=1))), c + grown
    if kind == "concatenate_norm":
        grown = draw(st.integers(1, 5))
        groups = pick([d for d in range(1, c + grown + 1) if (c + grown) % d == 0])
        return nn.Sequential(Dense(nn.Conv2d(c, grown, 1)), nn.GroupNorm(groups, c + grown)), c + grown
    if kind == "bottleneck":
        hidden = draw(st.integers(2, 6))
        layers = [nn.Conv2d(c, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6(), nn.Conv2d(hidden, c, 3, padding=1)]
        return Residual(nn.Sequential(*layers)), c
    if kind == "pad":
        return PadChannels(), c + 3
    same = {
        "depthwise": lambda: nn.Conv2d(c, c, 3, padding=1, groups=c),
        "norm": lambda: nn.BatchNorm2d(c, affine=pick([True, False])),
        "group_norm": lambda: nn.GroupNorm(pick(divisors), c),
        "instance_norm": lambda: nn.InstanceNorm2d(c, affine=True, track_running_stats=pick([True, False])),
        "layer_norm": lambda: LastNorm(c),
        "activation": lambda: pick([nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Tanh(), nn.LeakyReLU(0.1)]),
        "prelu": lambda: nn.PReLU(c),
        "residual": lambda: Residual(nn.Conv2d(c, c, 3, padding=1)),
        "squeeze_excite": lambda: SqueezeExcite(c),
        "gate": lambda: Gate(c, pick([True, False])),
        "shuffle": lambda: nn.ChannelShuffle(pick(divisors)),
        "halves": lambda: Halves(c, pick([True, False])) if c > 1 else nn.Identity(),
        "pool": lambda: nn.AvgPool2d(3, 1, 1),
        "attention": lambda: Tokens(Attention(c, pick(divisors), packed=False)),
        "packed_attention": lambda: Tokens(Attention(c, pick(divisors), packed=True)),
        "mix_tokens": lambda: Tokens(MixTokens(16)),
        "scale": lambda: Scale(c),
    }
    return same[kind](), c


@st.composite
def networks(draw):
    """Draw a classifier of images ``(2, 3, 4, 4)`` with up to eight blocks."""
    channels = draw(st.integers(2, 8))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers = [nn.Conv2d(3, channels, 3, padding=1)]
    for kind in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=8)):
        layer, channels = block(draw, kind, channels)
        layers.append(layer)
    if draw(st.booleans()):
        head = [nn.Flatten(), nn.Linear(16 * channels, 3)]
    else:
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return nn.Sequential(*layers, *head)
