"""Operators that tell neurons apart in ways that are easy to overlook: a spec may be small, never wrong."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lit_rebasin import permutation_spec, permute

from .networks import Of, tokens, vectors
from .test_networks import leaves
from .test_random_networks import randomised

ROWS = vectors(3, 4)


def stacked(between, width=6, outputs=None):
    """Two branches laid side by side, so that each has neurons of its own, and read one by one."""

    def forward(m, x):
        return m.out(between(torch.stack([m.a(x), m.b(x)], 1)).flatten(1))

    return Of(forward, a=nn.Linear(4, width), b=nn.Linear(4, width), out=nn.Linear(outputs or 2 * width, 3))


def packed(between):
    """The same from one layer."""

    def forward(m, x):
        return m.out(between(m.a(x).unflatten(1, (2, -1))).flatten(1))

    return Of(forward, a=nn.Linear(4, 12), out=nn.Linear(12, 3))


MIXING = {
    "softmax": lambda t: t.softmax(1),
    "log_softmax": lambda t: t.log_softmax(1),
    "flip": lambda t: t.flip(1),
    "plus flip": lambda t: t + t.flip(1),
    "maximum of flip": lambda t: torch.maximum(t, t.flip(1)),
    "roll": lambda t: t.roll(1, 1),
    "cumsum": lambda t: t.cumsum(1),
    "cumprod": lambda t: t.cumprod(1),
    "layer norm over branches": lambda t: F.layer_norm(t.mT, (2,)).mT,
    "instance norm over branches": lambda t: F.instance_norm(t.mT).mT,
    "attention among branches": lambda t: F.scaled_dot_product_attention(t, t, t),
    "causal attention": lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True),
    "softmax of products": lambda t: (t @ t.mT).softmax(-1) @ t,
    "triangle": lambda t: t.tril(),
}
PAIRS = {
    "products": lambda t: t @ t.mT,
    "linear in itself": lambda t: torch.stack([F.linear(row, row) for row in t.unbind(0)]),
    "einsum": lambda t: torch.einsum("bid,bjd->bij", t, t),
    "inner": lambda t: torch.stack([torch.inner(row, row) for row in t.unbind(0)]),
    "differences": lambda t: (t[:, :, None] - t[:, None]).square().sum(-1),
}


def lookups():
    """DLRM: a dense feature and embeddings of one width, and the products of all pairs."""

    def forward(m, x, ids):
        dense = m.bottom(x).relu()
        every = torch.stack([dense, *(table(ids[:, k]) for k, table in enumerate(m.tables))], 1)
        return m.top(torch.cat([dense, torch.bmm(every, every.transpose(1, 2)).flatten(1)], 1))

    tables = nn.ModuleList([nn.Embedding(10, 8) for _ in range(3)])
    return Of(forward, bottom=nn.Linear(4, 8), tables=tables, top=nn.Linear(24, 2))


def written(write):
    """A constant that is written to before it scales the neurons."""

    def forward(m, x):
        z = torch.ones(3, 8, dtype=x.dtype)
        view = z.view(-1, 8)
        write(m, z, m.a(x))
        return m.b(m.c(x) * view)

    return Of(forward, a=nn.Linear(4, 8), c=nn.Linear(4, 8), b=nn.Linear(8, 3))


@torch.library.custom_op("lit_rebasin_tests::write_second", mutates_args=("out",))
def write_second(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


def write_without_gradient(m, z, h):
    with torch.no_grad():
        z.copy_(h)


def write_some_without_gradient(m, z, h):
    with torch.no_grad():
        z[:, 2:4] = 3.0


WRITES = {
    "in a region": write_without_gradient,
    "to some in a region": write_some_without_gradient,
    "to out": lambda m, z, h: torch.add(h.detach(), h.detach(), out=z),
    "to a list": lambda m, z, h: torch._foreach_add_([z], [h]),
    "by an operator's second argument": lambda m, z, h: torch.ops.lit_rebasin_tests.write_second(h, z),
}


def lstm_from_a_state():
    def forward(m, x):
        return m.out(m.lstm(x, (m.h, m.c))[0][:, -1])

    state = lambda: nn.Parameter(torch.zeros(1, 3, 6))  # noqa: E731
    return Of(forward, lstm=nn.LSTM(4, 6, batch_first=True), h=state(), c=state(), out=nn.Linear(6, 2))


def cell_from_a_state():
    def forward(m, x):
        return m.out(m.cell(x, (m.h, m.c))[0])

    return Of(
        forward,
        cell=nn.LSTMCell(4, 6),
        h=nn.Parameter(torch.zeros(3, 6)),
        c=nn.Parameter(torch.zeros(3, 6)),
        out=nn.Linear(6, 2),
    )


def grouped_queries():
    def forward(m, x):
        q = m.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        return m.out(F.scaled_dot_product_attention(q, m.k, m.v, enable_gqa=True).transpose(1, 2).flatten(2))

    keys = lambda: nn.Parameter(torch.zeros(2, 2, 7, 3))  # noqa: E731
    return Of(forward, q=nn.Linear(5, 12), k=keys(), v=keys(), out=nn.Linear(12, 2))


def loss_of_parameters():
    return Of(
        lambda m, x: F.cross_entropy(m.rows @ m.out.weight.T, torch.arange(3)) + m.out(x).sum(),
        rows=nn.Parameter(torch.zeros(3, 4)),
        out=nn.Linear(4, 5),
    )


def one_layer(between, outputs=8):
    return Of(lambda m, x: m.b(between(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(outputs, 3))


ORDER = torch.tensor([3, 0, 2, 1, 7, 4, 5, 6])
ORDERED = {
    "reflected": (lambda h: F.pad(h[:, None], (2, 2), mode="reflect")[:, 0], 12),
    "wrapped around": (lambda h: F.pad(h[:, None], (2, 2), mode="circular")[:, 0], 12),
    "selected by index": (lambda h: h.index_select(1, ORDER), 8),
    "indexed": (lambda h: h[:, ORDER], 8),
    "place of the largest": (lambda h: h + h.argmax(1, keepdim=True), 8),
    "largest with its place": (lambda h: h * h.max(1, keepdim=True).indices, 8),
    "every second": (lambda h: h[:, ::2], 4),
    "gathered": (lambda h: h.gather(1, ORDER.expand(3, 8)), 8),
    "sorted": (lambda h: h.sort(1).values * h, 8),
    "interleaved": (lambda h: h.repeat_interleave(2, 1), 16),
    "repeated": (lambda h: h.repeat(1, 2), 16),
    "shuffled pixels": (lambda h: F.pixel_shuffle(h.unflatten(1, (8, 1, 1)), 2).flatten(1), 8),
}

CASES = {
    **{name: (one_layer(*case), (ROWS,)) for name, case in ORDERED.items()},
    **{f"{name}, stacked": (stacked(f), (ROWS,)) for name, f in MIXING.items()},
    **{f"{name}, packed": (packed(f), (ROWS,)) for name, f in MIXING.items()},
    **{f"{name} of pairs": (stacked(f, outputs=4), (ROWS,)) for name, f in PAIRS.items()},
    **{f"written {name}": (written(write), (ROWS,)) for name, write in WRITES.items()},
    "stacked twice over": (stacked(lambda t: torch.cat([t, t], 1), outputs=24), (ROWS,)),
    "stacked and padded": (stacked(lambda t: F.pad(t, (0, 0, 1, 0)), outputs=18), (ROWS,)),
    "DLRM": (lookups(), (ROWS, tokens(3, 3))),
    "halves swapped after a softmax": (
        Of(
            lambda m, x: (lambda h: m.b(torch.cat([h[..., 4:], h[..., :4]], -1)))(
                m.a(x).unflatten(-1, (2, 4)).softmax(-2).flatten(-2)
            ),
            a=nn.Linear(4, 8),
            b=nn.Linear(8, 3),
        ),
        (ROWS,),
    ),
    "inner with a square weight": (
        Of(
            lambda m, x: m.b(torch.inner(m.a(x), m.w).relu()),
            a=nn.Linear(4, 8),
            b=nn.Linear(8, 3),
            w=nn.Parameter(torch.zeros(8, 8)),
        ),
        (ROWS,),
    ),
    "all dimensions reversed": (
        Of(
            lambda m, x: m.b((m.w.permute(2, 1, 0) * m.a(x)).sum(0)),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 3),
            w=nn.Parameter(torch.zeros(6, 6, 6)),
        ),
        (vectors(6, 4),),
    ),
    "LSTM from a state": (lstm_from_a_state(), (vectors(3, 5, 4),)),
    "LSTM cell from a state": (cell_from_a_state(), (ROWS,)),
    "grouped queries on parameters": (grouped_queries(), (vectors(2, 6, 5),)),
    "a loss of parameters": (loss_of_parameters(), (ROWS,)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_group_changes_the_function(name):
    model, inputs = CASES[name]
    model = randomised(model)
    spec = permutation_spec(model, *inputs, check=False)
    with torch.no_grad():
        expected = leaves(model(*inputs))
        for group in spec.groups.values():
            found = leaves(permute(model, spec, {group.name: torch.arange(group.size).roll(1)})(*inputs))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10 * float(b.abs().max()))


def test_pairs_of_features_of_one_width_are_one_group():
    model, inputs = CASES["DLRM"]
    (group,) = permutation_spec(randomised(model), *inputs).groups.values()
    assert {f"tables.{k}.weight[1]" for k in range(3)} | {"bottom.weight[0]"} <= set(map(str, group.axes))


def positions(read):
    def forward(m, x):
        return m.out((m.a(x) + read(m, x.shape[1])).relu())

    return Of(
        forward,
        a=nn.Linear(4, 8),
        out=nn.Linear(8, 2),
        norm=nn.LayerNorm(8),
        proj=nn.Linear(8, 8),
        first=nn.Parameter(torch.zeros(1, 8)),
        position=nn.Parameter(torch.zeros(20, 8)),
    )


READS = {
    "cut": lambda m, n: m.position[:n],
    "scaled": lambda m, n: (m.position * 2)[:n],
    "copied": lambda m, n: m.position.clone()[:n],
    "with a class token": lambda m, n: torch.cat([m.first, m.position])[:n],
    "normalised": lambda m, n: m.norm(m.position)[:n],
    "projected": lambda m, n: m.proj(m.position)[:n],
    "dropped out": lambda m, n: F.dropout(m.position, training=m.training)[:n],
}


@pytest.mark.parametrize("read", READS)
def test_positions_beyond_the_example_stay(read):
    model = randomised(positions(READS[read]))
    spec = permutation_spec(model, vectors(2, 4, 4))
    assert "position[0]" in spec.fixed
    assert "position[1]" not in spec.fixed
    longer = vectors(2, 11, 4)
    moved = permute(model, spec, spec.random(generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        torch.testing.assert_close(moved(longer), model(longer))
