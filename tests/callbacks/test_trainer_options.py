"""Merges and monitors beside what a Trainer can be told, and in compiled modules."""

import pytest
import torch

from lit_rebasin import RebasinMerge

from .monitored import MONITORS, Plain, whole
from .user_code import make_trainer


class Inner(Plain):
    """With a compiled part."""

    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


def merged(tmp_path, make=Plain, **options):
    """Train two tasks from fresh weights; return the weights of the merge, and the callbacks."""
    torch.manual_seed(0)
    module, merge, monitors = make(), RebasinMerge(alpha=0.5, start="fresh"), [kind() for kind in MONITORS]
    for _ in range(2):
        make_trainer(tmp_path, *monitors, merge, **options).fit(module, whole())
    return [parameter.detach() for parameter in module.parameters()], merge, monitors


@pytest.mark.parametrize("make", [Inner, lambda: torch.compile(Plain(), backend="eager")])
def test_compiled_modules_are_merged_as_others_are(tmp_path, make):
    expected, _, _ = merged(tmp_path)
    found, merge, monitors = merged(tmp_path, make)
    assert merge.history[0]["moved"] > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(monitor.history for monitor in monitors)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 4},
        {"fast_dev_run": True},
        {"overfit_batches": 1},
        {"limit_train_batches": 1},
    ],
)
def test_options_of_the_trainer(tmp_path, options):
    weights, merge, monitors = merged(tmp_path, **options)
    (entry,) = merge.history
    assert "refused" not in entry
    assert entry["task"] == 1
    assert all(weight.isfinite().all() for weight in weights)
    assert all(monitor.history for monitor in monitors)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_a_merge_takes_its_losses_in_the_precision_of_the_training(tmp_path, precision, dtype):
    class Watched(RebasinMerge):
        def on_train_batch_end(self, trainer, module, *args):
            handle = module.head.register_forward_hook(lambda layer, inputs, output: found.append(output.dtype))
            super().on_train_batch_end(trainer, module, *args)
            handle.remove()

    torch.manual_seed(0)
    module, merge, found = Plain(), Watched(start="fresh"), []
    for _ in range(2):
        make_trainer(tmp_path, merge, precision=precision).fit(module, whole())
    assert set(found) == {dtype}
