"""What a merge is given beyond averaged weights, against the functions for plain modules."""

import copy

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.functional import cross_entropy

from lit_rebasin import (
    LinearPath,
    RebasinMerge,
    align,
    permutation_spec,
    permute,
    reestimate_batch_norm,
    repair,
    reset_batch_norm,
)
from lit_rebasin.callbacks.settings import STATISTICS

from .plain import Held, Plain, X, batches, merged, tensors
from .user_code import make_trainer


@pytest.mark.parametrize("statistics", STATISTICS)
def test_statistics_of_a_merge(tmp_path, statistics):
    merge = RebasinMerge(0.4, statistics=statistics)
    module, held = merged(tmp_path, merge, norm=True)
    spec = permutation_spec(held.trained, X[:30])
    found = align(held.trained, held.previous, spec=spec, seed=1)
    path = LinearPath(held.previous, permute(held.trained, spec, found.permutations))
    expected, data = path.module_at(0.4).eval(), [x for x, _ in batches(1)]
    if statistics == "reestimate":
        expected[1].train()
        reestimate_batch_norm(expected, expected, data)
    elif statistics == "data-free":
        assert reset_batch_norm(expected, path, 0.4, expected, data[0]) == ["1"]
    elif statistics != "none":
        assert repair(expected, path, 0.4, expected, data, mean=statistics == "repair") == ["3"]
    for name, tensor in tensors(expected).items():
        torch.testing.assert_close(tensors(module.net)[name], tensor, rtol=1e-4, atol=1e-5)
    expected[1].train()
    losses = [cross_entropy(expected(x), y) for x, y in batches(1)]
    assert merge.history[0]["loss_after"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert merge.history[0]["train_loss_after"] == pytest.approx(merge.history[0]["loss_after"])


def test_repair_leaves_frozen_layers_and_new_heads_alone(tmp_path):
    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.net[3].requires_grad_(False)

    module, merge = Frozen(), RebasinMerge(0.5, "identity", statistics="repair")
    for task in range(2):
        before = copy.deepcopy(module.net[3])
        make_trainer(tmp_path, merge, max_epochs=3).fit(module, batches(task))
    assert torch.equal(module.net[3].weight, before.weight)
    assert torch.equal(module.net[3].bias, before.bias)


def test_batch_norm_that_is_held_keeps_its_statistics(tmp_path):
    class HeldNorm(Plain):
        def on_train_epoch_start(self):
            self.net[1].eval()

    for statistics in STATISTICS:
        torch.manual_seed(0)
        module, merge = HeldNorm(norm=True), RebasinMerge(0.5, statistics=statistics)
        for task in range(2):
            make_trainer(tmp_path, Held(), merge, max_epochs=2).fit(module, batches(task))
        if statistics != "data-free":
            assert module.net[1].running_mean.abs().max() == 0


def test_data_free_statistics_need_a_batch_norm(tmp_path):
    with pytest.raises(MisconfigurationException, match="is for BatchNorm, of which Plain has none"):
        make_trainer(tmp_path, RebasinMerge(statistics="data-free")).fit(Plain(), batches(0))
