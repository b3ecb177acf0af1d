"""Alpha by the Fisher information, against the closed form and a loop over examples."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import (
    LinearPath,
    RebasinMerge,
    align,
    fisher_alpha,
    layer_fisher_alphas,
    permutation_spec,
    permute,
)
from lit_rebasin.callbacks.step_fisher import step_fisher
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.merging.path import weights_of

from .plain import Held, Plain, X, Y, batches, merged, tensors
from .user_code import make_trainer


def fisher(network, task):
    """The mean over examples of squared gradients, one example at a time."""
    totals = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for x, y in zip(X, Y[task], strict=True):
        gradients = torch.autograd.grad(cross_entropy(network(x[None]), y[None]), list(network.parameters()))
        for total, gradient in zip(totals.values(), gradients, strict=True):
            total += gradient.square() / len(X)
    return totals


@pytest.mark.parametrize("norm", [False, True])
def test_fisher_alpha_of_the_second_task_is_the_closed_form(tmp_path, norm):
    module, held = merged(tmp_path, RebasinMerge("fisher"), tasks=1, norm=norm)
    previous = fisher(held.trained, 0)
    merge = RebasinMerge("fisher", seed=0)
    module, held = merged(tmp_path, merge, norm=norm)
    spec = permutation_spec(held.trained, X[:30])
    alignment = align(held.trained, held.previous, spec=spec, seed=1)
    measured = fisher(held.trained, 1)
    both = permute({**tensors(held.trained), **measured}, spec, alignment.permutations)
    new = {name: both[name] for name in measured}
    moved = permute(held.trained, spec, alignment.permutations)
    path = LinearPath(held.previous, moved)
    assert merge.history[0]["alpha"] == pytest.approx(fisher_alpha(path, previous, new), rel=1e-4)
    assert 0 < merge.history[0]["alpha"] < 1
    for name, diagonal in merge.state_dict()["known"].items():
        torch.testing.assert_close(diagonal, (previous[name[4:]] + new[name[4:]]) / 2, rtol=1e-3, atol=1e-9)

    merge = RebasinMerge("layer-fisher", statistics="none")
    module, _ = merged(tmp_path, merge, norm=norm)
    alphas = layer_fisher_alphas(path, previous, new)
    assert len(set(alphas.values())) == 3 + norm
    for name, tensor in path.at(alphas).items():
        torch.testing.assert_close(tensors(module.net)[name], tensor, rtol=1e-3, atol=1e-5)
    entries = {name: p.numel() for name, p in module.net.named_parameters()}
    mean = sum(alphas[name] * n for name, n in entries.items()) / sum(entries.values())
    assert merge.history[0]["alpha"] == pytest.approx(mean, rel=1e-4)


def test_fisher_information_is_the_mean_over_the_tasks_and_goes_on_in_a_checkpoint(tmp_path):
    whole = RebasinMerge("fisher", "identity")  # nothing moves, so the Fisher information stays where it is
    torch.manual_seed(0)
    module, held, measured = Plain(), Held(), []
    for task in range(3):
        make_trainer(tmp_path, held, whole, max_epochs=5).fit(module, batches(task))
        measured.append(fisher(held.trained, task % 2))
    for name, diagonal in whole.state_dict()["known"].items():
        mean = torch.stack([one[name[4:]] for one in measured]).mean(0)
        torch.testing.assert_close(diagonal, mean, rtol=1e-3, atol=1e-9)
    torch.manual_seed(0)
    module, half = Plain(), RebasinMerge("fisher", "identity")
    for task in range(3):
        state, half = half.state_dict(), RebasinMerge("fisher", "identity")
        half.load_state_dict(state)
        make_trainer(tmp_path, Held(), half, max_epochs=5).fit(module, batches(task))
    assert half.history[-1]["alpha"] == pytest.approx(whole.history[-1]["alpha"])


def test_fisher_information_that_a_state_lacks(tmp_path):
    merge = RebasinMerge(0.5)
    module, _ = merged(tmp_path, merge, tasks=1)
    other = RebasinMerge("fisher")
    other.load_state_dict(merge.state_dict())
    with pytest.raises(
        MisconfigurationException, match="Fisher information of the tasks so far, which this state lacks"
    ):
        make_trainer(tmp_path, other).fit(module, batches(1))


def test_fisher_information_of_batches_without_examples(tmp_path):
    class Joined(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step((torch.cat([batch[0], batch[0]]), torch.cat([batch[1], batch[1]])), batch_idx)

    def collate(items):
        return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items][:1] * len(items)), torch.zeros(3)

    data = DataLoader(TensorDataset(X, Y[0]), batch_size=30, collate_fn=collate)
    with pytest.raises(MisconfigurationException, match=r"\[3, 30\] entries along their first dimension"):
        make_trainer(tmp_path, RebasinMerge("fisher"), max_epochs=1).fit(Joined(), data)


def test_fisher_information_of_examples_that_cannot_be_told_apart(tmp_path):
    class OfExamples(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step((torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])), 0)

    class OfObject(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch.x, batch.y), 0)

    def together(items):
        return SimpleNamespace(x=torch.stack([x for x, _ in items]), y=torch.stack([y for _, y in items]))

    for module, collate, says in (
        (OfExamples(), list, r"OfExamples.training_step cannot be run on single examples, .*: give alpha a number"),
        (OfObject(), together, "holds no tensors in lists, tuples or dicts, .*: give alpha a number"),
    ):
        data = DataLoader(TensorDataset(X, Y[0]), batch_size=30, collate_fn=collate)
        with pytest.raises(MisconfigurationException, match=says):
            make_trainer(tmp_path, RebasinMerge("fisher"), max_epochs=1).fit(module, data)


def test_a_loss_without_gradients_on_single_examples_has_no_fisher_information(tmp_path):
    class Contrast(Plain):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]) @ self.net(batch[0]).T, torch.arange(len(batch[0])))

    with pytest.raises(MisconfigurationException, match="no gradient on single examples"):
        make_trainer(tmp_path, RebasinMerge("fisher")).fit(Contrast(), batches(0))


def test_state_of_a_version_without_fisher_information(tmp_path):
    merge = RebasinMerge()
    merged(tmp_path, merge, tasks=1)
    state = {name: value for name, value in merge.state_dict().items() if not name.startswith("known")}
    RebasinMerge().load_state_dict(state)


def test_fisher_information_is_measured_all_over_a_batch():
    """Replayed examples may all stand behind the new ones; here those in front teach nothing."""

    class Slope(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.zeros(()))

        def training_step(self, batch):
            return (self.slope * batch[0]).mean()

    step = StepLoss(Slope(), Precision())
    x = torch.cat([torch.zeros(400), torch.ones(400)])
    with step.quiet():
        found = step_fisher(step, weights_of(step.module), [[x]])
    assert float(found["slope"]) == pytest.approx(0.5, abs=0.01)
