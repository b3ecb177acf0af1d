"""Where tasks begin."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lit_rebasin import RebasinMerge
from lit_rebasin.callbacks.start import begin

from .plain import Plain, batches
from .user_code import make_trainer


class Begun(Callback):
    """Keeps the weights that each fit trains from; stands after the merge."""

    def __init__(self):
        self.weights = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0 and trainer.current_epoch == 0:
            self.weights.append(copy.deepcopy(module.state_dict()))


def learn(tmp_path, n_tasks=3, module=None, **settings):
    torch.manual_seed(0)
    module = module or Plain()
    merge, begun = RebasinMerge(**settings), Begun()
    ends = []
    for task in range(n_tasks):
        trainer = make_trainer(tmp_path, merge, begun, max_epochs=2)
        trainer.fit(module, batches(task))
        ends.append(copy.deepcopy(module.state_dict()))
    return begun.weights, ends, merge


def test_previous_is_the_merged_network(tmp_path):
    begun, ends, _ = learn(tmp_path)
    for start, end in zip(begun[1:], ends, strict=False):
        for name, tensor in start.items():
            assert torch.equal(tensor, end[name])


def fresh(seed):
    module = Plain()
    torch.manual_seed(seed)
    for layer in module.net:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return module.state_dict()


def test_fresh_is_drawn_anew_with_the_seed(tmp_path):
    begun, ends, _ = learn(tmp_path, start="fresh", seed=5)
    for task in (1, 2):
        for name, tensor in fresh(5 + task).items():
            assert torch.equal(begun[task][name], tensor), name
            assert not torch.equal(begun[task][name], ends[task - 1][name])


def test_the_random_state_is_left_alone():
    module = Plain()
    state = torch.get_rng_state()
    begin(module, "fresh", 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_perturbed_is_half_of_either(tmp_path):
    begun, ends, _ = learn(tmp_path, start="perturbed")
    for name, tensor in fresh(1).items():
        torch.testing.assert_close(begun[1][name], (tensor + ends[0][name]) / 2)


def test_alignment_moves_the_neurons_of_a_fresh_start_and_none_of_the_previous(tmp_path):
    moved = {}
    for start in ("previous", "fresh"):
        _, _, merge = learn(tmp_path, start=start)
        moved[start] = [entry["moved"] for entry in merge.history]
    assert moved["previous"] == [0, 0]
    assert min(moved["fresh"]) > 10


def test_frozen_layers_stay(tmp_path):
    module = Plain()
    module.net[0].requires_grad_(False)
    begun, ends, _ = learn(tmp_path, module=module, start="fresh", method="identity")
    assert torch.equal(begun[1]["net.0.weight"], ends[0]["net.0.weight"])
    assert not torch.equal(begun[1]["net.3.weight"], ends[0]["net.3.weight"])


def test_a_head_that_the_task_does_not_train_is_the_previous_one(tmp_path):
    class Heads(Plain):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            self.turn = 0

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.heads[self.turn](self.net(batch[0])), batch[1])

    module = Heads()
    merge = RebasinMerge(start="fresh", alpha=0.4)
    kept = []
    for task in range(2):
        module.turn = task
        make_trainer(tmp_path, merge, max_epochs=2).fit(module, batches(task))
        kept.append(module.heads[0].weight.detach().clone())
    assert torch.equal(kept[0], kept[1])


def test_a_resumed_task_does_not_begin_again(tmp_path):
    merge = RebasinMerge(start="fresh")
    module = Plain()
    make_trainer(tmp_path, merge, max_epochs=1).fit(module, batches(0))
    merge._begin_task(module)
    weights = copy.deepcopy(module.state_dict())
    resumed = RebasinMerge(start="fresh")
    resumed.load_state_dict(copy.deepcopy(merge.state_dict()))
    resumed._begin_task(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_a_layer_that_cannot_be_reset_is_named(tmp_path):
    class Odd(Plain):
        def __init__(self):
            super().__init__()
            self.scale = nn.ParameterList([nn.Parameter(torch.ones(3))])

    with pytest.raises(ValueError, match=r"which 'scale' \(ParameterList\) lacks"):
        learn(tmp_path, module=Odd(), start="fresh")
    with pytest.raises(ValueError, match="start must be one of previous, fresh, perturbed, got 'new'"):
        RebasinMerge(start="new")
