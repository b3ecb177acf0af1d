"""Batches of one example, and networks that cannot be trained on them."""

import copy

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_rebasin import ContinualClassifier, ContinualDataModule, ModeConnectivity, RebasinMerge
from lit_rebasin.continual import RebasinIL
from lit_rebasin.continual.baselines import run_baseline
from lit_rebasin.continual.single_examples import check_single_examples

from .walk import walk

REST_OF_ONE = 359  # 1437 = 4 * 359 + 1


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 10))


def stream(**options):
    return ContinualDataModule("rotated-digits", **{"n_tasks": 2, "epochs_per_task": 1, **options})


@pytest.mark.parametrize("make", [lambda model: model, RebasinIL])
def test_a_rest_of_one_is_refused_before_training_where_batch_norm_meets_it(make):
    model = make(ContinualClassifier(network()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MisconfigurationException, match=r"Task 0 has a batch of one .*batch_size=359 leaves a rest"):
        walk(model, stream(batch_size=REST_OF_ONE), tasks=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_trial_leaves_network_and_random_state_alone():
    model, data = (
        network(nn.LayerNorm).append(nn.BatchNorm1d(10, momentum=None)).train(),
        stream(batch_size=REST_OF_ONE),
    )
    model[-1].eval()  # held in evaluation mode, it takes one example
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_single_examples(model, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{"batch_size": 64}, {"batch_size": REST_OF_ONE, "n_tasks": 3}])
def test_sizes_of_the_smallest_batches(options):
    data = stream(replay_per_class=1, **options)
    sizes = [min(len(y) for _, y, _ in data.training_loader(task, lambda: 0)) for task in range(data.n_tasks)]
    assert [data.smallest_batch(task) for task in range(data.n_tasks)] == sizes
    assert sizes[0] == (29 if options["batch_size"] == 64 else 1)


def test_baselines_say_so_too():
    with pytest.raises(ValueError, match=r"batch of one example, of which its normalization .* pass a batch_size"):
        run_baseline("finetune", ContinualClassifier(network()), stream(batch_size=REST_OF_ONE))


@pytest.mark.parametrize("callback", [RebasinMerge(examples="kept", batches=40), ModeConnectivity(batch_size=9)])
def test_a_merge_makes_no_batches_of_one_kept_example(callback):
    model = ContinualClassifier(network())
    walk(model, stream(replay_per_class=1), callback, tasks=2)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
