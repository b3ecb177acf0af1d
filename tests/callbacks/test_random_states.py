"""Fits that draw from every generator there is, resumed."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lit_rebasin import RandomStates

from .plain import Plain, X, Y
from .user_code import make_trainer

DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "python": random.random,
    "numpy": np.random.rand,
}


class Drawing(Plain):
    """Adds to each loss what it draws."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.drawn = draw, []

    def training_step(self, batch, batch_idx):
        self.drawn.append(self.draw())
        return self.drawn[-1] * super().training_step(batch, batch_idx)


def fit(folder, draw, resume=None, states=True, **options):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    module = Drawing(DRAWS[draw])
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [saver, *([RandomStates()] if states else [])]
    trainer = make_trainer(folder, *callbacks, max_epochs=3, enable_checkpointing=True, **options)
    trainer.fit(module, DataLoader(TensorDataset(X, Y[0]), batch_size=30, shuffle=True), ckpt_path=resume)
    return module


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_fit_resumed_after_an_epoch_draws_what_it_would_have_drawn(tmp_path, draw, every):
    options = {"reload_dataloaders_every_n_epochs": every}
    whole = fit(tmp_path / "whole", draw, **options)
    for epoch in (0, 1):
        checkpoint = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        resumed = fit(tmp_path / str(epoch), draw, checkpoint, **options)
        assert resumed.drawn == whole.drawn[3 * (epoch + 1) :]
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    bare = fit(tmp_path / "bare", draw, tmp_path / "whole" / "epoch=0.ckpt", states=False, **options)
    assert bare.drawn != whole.drawn[3:]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_fit_of_any_precision_is_resumed_with_the_weights_that_it_had(tmp_path, precision):
    options = {"reload_dataloaders_every_n_epochs": 1, "precision": precision}
    whole = fit(tmp_path / "whole", "torch", **options)
    resumed = fit(tmp_path / "resumed", "torch", tmp_path / "whole" / "epoch=0.ckpt", **options)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    if precision == "64-true":
        assert {tensor.dtype for tensor in whole.parameters()} == {torch.float64}


@pytest.mark.parametrize("part", ["torch", "python", "numpy"])
@pytest.mark.parametrize("of_others", [False, True])
def test_damaged_states_are_refused_before_any_is_put_back(part, of_others):
    state, now = RandomStates().state_dict(), torch.get_rng_state()
    damaged = {**state, part: 3}
    with pytest.raises(ValueError, match="The state of RandomStates is damaged"):
        RandomStates().load_state_dict({**state, "others": [damaged]} if of_others else damaged)
    assert torch.equal(torch.get_rng_state(), now)
