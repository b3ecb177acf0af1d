"""Merges that are undone."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lit_rebasin import RebasinMerge, input_moments
from lit_rebasin.callbacks.refusal import WorseMergeError, check_loss

from .plain import Held, Plain, batches, tensors
from .user_code import make_trainer

METHOD = "lit_rebasin.callbacks.merge.find"


def two_tasks(tmp_path, merge, epochs=2, second=1, **options):
    """Train two tasks; return the module, and the networks that the second merge was of."""
    torch.manual_seed(0)
    module, held = Plain(), Held()
    for task in (0, second):
        make_trainer(tmp_path, held, merge, max_epochs=epochs, **options).fit(module, batches(task))
    return module, held


def run_out(error):
    def find(*args, **kwargs):
        raise error

    return find


def same(first, second):
    first, second = tensors(first), tensors(second)
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_merge_that_is_far_worse_than_both_networks_is_undone(tmp_path):
    """Two networks for one task that are averaged as they are: how much worse that is, and a margin around it."""
    free = RebasinMerge(0.5, "identity", margin=float("inf"))
    two_tasks(tmp_path, free, epochs=30, second=0)
    (entry,) = free.history
    excess = entry["loss_after"] - max(entry["loss_before"], entry["loss_previous"])
    assert excess > 0.05
    for margin, undone in ((0.99 * excess, True), (1.01 * excess, False)):
        merge = RebasinMerge(0.5, "identity", margin=margin)
        module, held = two_tasks(tmp_path, merge, epochs=30, second=0)
        assert ("refused" in merge.history[0]) == undone
        assert same(module.net, held.trained) == undone
        if undone:
            assert f"more than margin={margin:g} above" in merge.history[0]["refused"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_a_merge_that_runs_out_of_memory_is_undone(tmp_path, monkeypatch, error):
    monkeypatch.setattr(METHOD, run_out(error))
    merge = RebasinMerge(0.5)
    logger, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"merge after task 1 is refused: out of memory.*The trained model is kept"):
        module, held = two_tasks(tmp_path, merge, logger=[logger, table])
    assert same(module.net, held.trained)
    assert not same(module.net, held.previous)
    assert merge.history[0]["kept"] == "trained"
    assert merge.n_tasks == 2
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("merge/refused")] == [1]
    assert "merge/refused_because/text_summary" in events.Tags()["tensors"]
    monkeypatch.undo()
    make_trainer(tmp_path, merge, max_epochs=1).fit(module, batches(2))
    assert "alpha" in merge.history[-1]  # with what was kept


@pytest.mark.parametrize("options", [{}, {"alpha": "fisher"}])
def test_a_network_too_large_for_a_second_copy_is_kept(tmp_path, monkeypatch, options):
    merge, module, held = RebasinMerge(**options), Plain(), Held()
    make_trainer(tmp_path, held, merge).fit(module, batches(0))
    known = dict(merge.state_dict()["known"])
    monkeypatch.setattr("lit_rebasin.callbacks.task_merger.copied", run_out(MemoryError()))
    with pytest.warns(UserWarning, match=r"merge after task 1 is refused: out of memory.*The trained model is kept"):
        make_trainer(tmp_path, held, merge).fit(module, batches(1))
    assert same(module.net, held.trained)
    assert not same(module.net, held.previous)
    assert merge.n_tasks == 2
    now = merge.state_dict()["known"]
    assert now.keys() == known.keys()
    assert not any(torch.equal(now[name], known[name]) for name in known)


def test_lack_of_memory_after_the_first_task_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rebasin.callbacks.measured.step_fisher", run_out(MemoryError()))
    with pytest.raises(
        RuntimeError, match=r"The Fisher information after the first task.* out of memory: MemoryError\. "
    ):
        make_trainer(tmp_path, RebasinMerge("fisher")).fit(Plain(), batches(0))


class Endless(Plain):
    """Its loss may be infinite, though its weights are not."""

    added = 0.0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.added


@pytest.mark.parametrize(
    "error",
    [
        torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge"),
        ValueError("previous_moments['net.0.weight'] must be finite: the inputs of the layer hold NaN or infinity."),
        ValueError("gain holds a NaN or an infinity, so it has no best permutation."),
        ValueError("matrix contains invalid numeric entries"),
        WorseMergeError("its loss on training batches is far greater"),
    ],
)
@pytest.mark.parametrize("diverges", [False, True])
def test_a_merge_that_meets_infinity_is_undone(tmp_path, monkeypatch, error, diverges):
    """What is kept is the trained network, or the previous one where the trained has no loss."""
    monkeypatch.setattr(METHOD, run_out(error))
    merge, module, held = RebasinMerge(0.5), Endless(), Held()
    make_trainer(tmp_path, held, merge).fit(module, batches(0))
    previous = {name: tensor.clone() for name, tensor in tensors(module.net).items()}
    module.added = float("inf") if diverges else 0.0
    with pytest.warns(UserWarning, match="merge after task 1 is refused"):
        make_trainer(tmp_path, held, merge).fit(module, batches(1))
    assert merge.history[0]["kept"] == ("previous" if diverges else "trained")
    assert merge.history[0]["refused"] == str(error).rstrip(".")
    if not diverges:
        assert same(module.net, held.trained)
    else:
        assert all(torch.equal(tensor, previous[name]) for name, tensor in tensors(module.net).items())


class Divided(Plain):
    """Divides its inputs by a number, which a callback sets: of 2 and -2 the mean is 0."""

    def __init__(self):
        super().__init__(norm=True)
        self.divisor = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0] / self.divisor, batch[1]], batch_idx)


class Divisor(Callback):
    def __init__(self, value):
        self.value = value

    def on_train_batch_end(self, trainer, module, *args):
        with torch.no_grad():
            module.divisor.fill_(self.value)


@pytest.mark.parametrize("statistics", ["reestimate", "repair", "rescale", "data-free", "none"])
def test_a_merge_whose_activations_are_infinite_is_undone(tmp_path, statistics):
    merge, module, held = RebasinMerge(0.5, "identity", statistics=statistics), Divided(), Held()
    make_trainer(tmp_path, Divisor(2.0), held, merge).fit(module, batches(0))
    with pytest.warns(UserWarning, match=r"is refused: .* NaN .*The trained model is kept"):
        make_trainer(tmp_path, Divisor(-2.0), held, merge).fit(module, batches(1))
    assert same(module.net, held.trained)
    assert module.divisor == -2


def test_other_errors_leave_the_trained_network_and_are_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(METHOD, run_out(RuntimeError("a fault of the method")))
    merge, module, held = RebasinMerge(0.5), Plain(), Held()
    make_trainer(tmp_path, held, merge).fit(module, batches(0))
    with pytest.raises(RuntimeError, match="a fault of the method"):
        make_trainer(tmp_path, held, merge).fit(module, batches(1))
    assert same(module.net, held.trained)
    assert merge.history == []


def test_an_interruption_within_a_merge_leaves_the_trained_network(tmp_path, monkeypatch):
    """Once the merged weights are written, and before they are looked at."""
    monkeypatch.setattr("lit_rebasin.callbacks.task_merger.correct", run_out(KeyboardInterrupt()))
    merge, module, held = RebasinMerge(0.5), Plain(), Held()
    make_trainer(tmp_path, held, merge).fit(module, batches(0))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path, held, merge).fit(module, batches(1))
    assert same(module.net, held.trained)
    assert merge.history == []


def test_a_merge_that_its_correction_breaks_is_undone(tmp_path, monkeypatch):
    def broken(merged, *args, **kwargs):
        with torch.no_grad():
            merged.net[0].weight.fill_(float("nan"))
        return []

    monkeypatch.setattr("lit_rebasin.callbacks.correction.repair", broken)
    merge = RebasinMerge(0.5, statistics="repair")
    with pytest.warns(UserWarning, match=r"is refused: the loss of the merged model .* NaN.*The trained model is kept"):
        module, held = two_tasks(tmp_path, merge)
    assert same(module.net, held.trained)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_whose_statistics_are_no_numbers_is_undone(tmp_path, monkeypatch, value):
    merge, module, held = RebasinMerge(0.5), Plain(norm=True), Held()
    make_trainer(tmp_path, held, merge).fit(module, batches(0))
    monkeypatch.setattr(
        "lit_rebasin.callbacks.correction.reestimate_batch_norm",
        lambda module, *args, **kwargs: module.net[1].running_var.fill_(value),
    )
    with pytest.warns(UserWarning, match=r"NaN or infinity in 'net.1.running_var'\. The trained model is kept"):
        make_trainer(tmp_path, held, merge).fit(module, batches(1))
    assert same(module.net, held.trained)
    assert all(torch.equal(merge.previous[f"net.{name}"], tensor) for name, tensor in tensors(held.trained).items())


def test_what_is_known_after_a_refusal_is_of_the_network_that_is_kept(tmp_path, monkeypatch):
    merge, module, held = RebasinMerge(0.5, combine="regmean"), Plain(), Held()
    make_trainer(tmp_path, held, merge).fit(module, batches(0))
    monkeypatch.setattr(METHOD, run_out(MemoryError()))
    make_trainer(tmp_path, held, merge).fit(module, batches(1))
    assert merge.history[0]["kept"] == "trained"
    with torch.no_grad():
        expected = input_moments(module, lambda batch: module.net(batch[0]), batches(1))
    known = merge.state_dict()["known"]
    assert known.keys() == expected.keys()
    for name, moments in expected.items():
        torch.testing.assert_close(known[name], moments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_tasks", "2"),
        ("n_tasks", -1),
        ("previous", {"w": "junk"}),
        ("previous", {"w": torch.full((2,), torch.nan)}),
        ("previous", {"w": torch.ones(2, device="meta")}),
        ("previous", {"w": torch.eye(2).to_sparse()}),
        ("trained", ["w", 3]),
        ("history", [None]),
        ("known", {"w": None}),
        ("known", {"w": 3.0}),
        ("known_tasks", -1),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, name, value):
    merge = RebasinMerge(0.5)
    make_trainer(tmp_path, merge).fit(Plain(), batches(0))
    state = merge.state_dict()
    with pytest.raises(ValueError, match="The state of RebasinMerge is damaged"):
        RebasinMerge(0.5).load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match="The state of RebasinMerge is damaged: it lacks n_tasks"):
        RebasinMerge(0.5).load_state_dict({})
    RebasinMerge(0.5).load_state_dict(state)


def test_a_network_without_a_finite_loss_is_none_to_compare_with():
    nan, inf = float("nan"), float("inf")
    for previous, trained in ((nan, 0.1), (0.1, nan), (inf, 0.1), (0.1, 0.2)):
        with pytest.raises(WorseMergeError):
            check_loss(2.0, previous, trained, margin=1.0)
    for previous, trained in ((nan, inf), (0.1, 3.0), (3.0, 0.1), (0.9, 1.1)):
        check_loss(2.0, previous, trained, margin=1.0)


@pytest.mark.parametrize("margin", [-0.1, float("nan"), "1"])
def test_a_margin_that_is_none(margin):
    with pytest.raises(ValueError, match="margin must be a number of at least 0"):
        RebasinMerge(margin=margin)
