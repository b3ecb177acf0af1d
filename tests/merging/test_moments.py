import numpy as np
import pytest
import torch

from lit_rebasin.merging.moments import Moments


@pytest.mark.parametrize("pieces", [1, 3, 20])
def test_moments_over_batches_are_those_of_all_rows(pieces):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 5, generator=generator) * torch.tensor([1e-3, 1.0, 10.0, 1.0, 1e3])
    rows = rows + torch.tensor([1.0, -3.0, 0.0, 1000.0, 5.0])
    moments = Moments()
    for piece in rows.tensor_split(pieces):
        moments.add(piece)
    moments.add(rows[:0])
    np.testing.assert_allclose(moments.mean.numpy(), rows.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std.numpy(), rows.double().numpy().std(0), rtol=1e-9)


def test_a_spread_of_the_size_of_rounding_is_none():
    """A constant that was summed up in another order in every row; scaling it up would scale up noise."""
    step = torch.finfo(torch.float32).eps
    rows = torch.tensor([[100 * (1 + step), 0.0, step], [100.0, 0.0, -step]])
    moments = Moments()
    moments.add(rows)
    assert moments.std.tolist() == [0.0, 0.0, pytest.approx(step)]
