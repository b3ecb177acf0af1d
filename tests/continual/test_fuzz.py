"""Streams, networks, learners and methods of any configuration: an error that says what is wrong, or a complete result."""

import random
import re
from dataclasses import replace
from math import isfinite

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rebasin.continual.baselines import BASELINES

from .random_runs import cases
from .runs import METHODS, OURS, Case, train

BATCH_NORMS = ("batch", "cumulative", "plain")
# What an error says, and what there must be in a case for it; arguments that are left out have their defaults.
STATED = {
    r"Task \d of arrays has no test examples|x_test has 0 examples": lambda case, given: (
        given.get("scenario") == "domain" or any(test == 0 for *_, test in case.counts)
    ),
    r"Task \d of arrays has no (training|held-back) examples: .*validation_fraction": lambda case, given: (
        given.get("validation_fraction") or given.get("scenario") == "domain"
    ),
    r"cannot be split over n_tasks=\d: pass": lambda case, given: given.get("n_tasks", 5) > len(case.counts),
    r"batch of one example.*batch_size": lambda case, given: given.get("norm", "none") != "none",
    r"left NaN or infinity in|ended in NaN or infinity|after the first task is NaN or infinite": lambda case, given: (
        given.get("optimizer") == "exploding"
    ),
    r"has no permutable group": lambda case, given: given.get("kind") == "linear" or given.get("width") == 1,
    r'statistics="data-free"': lambda case, given: given.get("norm") not in BATCH_NORMS,
    r"replay_per_class=\d": lambda case, given: not given.get("replay_per_class") or given.get("fits"),
    r"combine='regmean' leaves the linear path": lambda case, given: isinstance(given["alpha"], str),
    r"takes no cost; leave it out|starts nowhere; leave init out": lambda case, given: {"cost", "init"} & set(given),
    r"method 'sinkhorn' has no option 'residual_learning_rate'": lambda case, given: given["cost"] != "incremental",
    r"has no gradient on single examples": lambda case, given: "fisher" in given["alpha"],
    r"needs a datamodule with tasks": lambda case, given: given.get("fits"),
    r"knows no network with a head a task": lambda case, given: given.get("scenario") == "task",
    r"batch_size=\d is too small for": lambda case, given: given.get("scenario") == "task",
    r"You requested to check 0.5 of the": lambda case, given: given["limit_train_batches"] == 0.5,
}


def check(case):
    """Run a case; it may fail in the ways that are stated, else its result must be whole, and the process as it was."""
    pl.seed_everything(0, verbose=False)
    before = global_state(case)
    try:
        outcome = train(case)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        if not any(re.search(words, str(error)) and may(case, case.given) for words, may in STATED.items()):
            raise
        outcome = None
    assert global_state(case) == before
    if outcome is not None:
        check_matrix(case, outcome)
        check_model(case, outcome)
    return outcome


def global_state(case):
    """Return what a run must leave alone; Avalanche draws from the random states of Python."""
    numpy = np.random.get_state()  # noqa: NPY002 - that of others, not our own draws
    drawn = () if case.method in BASELINES else (random.getstate(), numpy[1].tobytes(), numpy[2])
    flags = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled()
    return torch.get_default_dtype(), torch.get_num_threads(), flags, drawn


def check_matrix(case, outcome):
    """Every task is measured on every task, on all of its test examples, and at the end as one would measure it by hand."""
    loaders = outcome.data.val_dataloader()
    columns = outcome.trained if case.method in BASELINES else len(loaders)
    loaders = loaders[:columns]
    assert outcome.matrix.shape == (max(outcome.trained, columns), columns)
    rows = outcome.matrix[: outcome.trained]
    if case.method == "joint":
        rows = rows[-1:]
    assert not rows.isnan().any()
    assert rows.min() >= 0
    assert rows.max() <= 1 + 1e-6
    right = rows * torch.tensor([len(loader.dataset.new[1]) for loader in loaders])
    torch.testing.assert_close(right, right.round(), rtol=0, atol=1e-4)
    if case.given.get("precision") != "bf16-mixed":
        torch.testing.assert_close(rows[-1], accuracies(outcome.model, loaders), rtol=0, atol=1e-6)


@torch.no_grad()
def accuracies(model, loaders):
    model.eval()
    dtype = next(model.parameters()).dtype
    found = []
    for loader in loaders:
        x, y, tasks = loader.dataset.new
        found.append((model(x.to(dtype), tasks).argmax(1) == y).double().mean())
    return torch.stack(found)


def check_model(case, outcome):
    """The weights are numbers, and so is all that is noted of the merges, of which there is one after every task but the first."""
    if case.method == "rebasin" or case.given.get("optimizer") != "exploding":
        broken = [name for name, tensor in outcome.model.state_dict().items() if not tensor.isfinite().all()]
        assert broken == []
    assert not {"log", "log_dict"} & set(vars(outcome.model))
    if case.method == "rebasin":
        assert [entry["task"] for entry in outcome.history] == list(range(1, outcome.trained))
        for entry in outcome.history:
            assert all(isfinite(number) for number in entry.values() if isinstance(number, float)), entry


def quickly(examples):
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@quickly(60)
@given(cases(methods=OURS))
def test_a_run_ends_with_a_complete_result_or_a_stated_error(case):
    check(case)


@quickly(20)
@given(cases(methods=tuple(BASELINES)))
def test_a_baseline_ends_with_a_complete_result_or_a_stated_error(case):
    check(case)


@pytest.mark.slow
@quickly(900)
@given(cases())
def test_many_runs_end_with_a_complete_result_or_a_stated_error(case):
    check(case)


BATCH_NORM = (("norm", "batch"),)
KEPT = (("n_tasks", 2), ("replay_per_class", 1))
DOUBLE = (("precision", "64-true"),)
EXPLODING = (("optimizer", "exploding"),)
ONE_CLASS = (("n_tasks", 4), ("scenario", "task"))


@pytest.mark.parametrize(
    "case",
    [
        Case("no-merge", data=ONE_CLASS),
        Case("rebasin-il", data=ONE_CLASS),
        Case("no-merge", ((3, 4, 2), (7, 4, 2), (40, 4, 2)), data=(("n_tasks", 3),)),
        Case("no-merge", ((1, 1, 5),), shape=(1, 1, 1), data=(("n_tasks", 1),)),
        Case(data=KEPT, network=BATCH_NORM, merge=(("batches", 9), ("examples", "kept"))),
        Case("mc-sgd", ((0, 30, 2), (1, 30, 2)), data=(("n_tasks", 2), ("replay_per_class", 11)), network=BATCH_NORM),
        Case("mc-sgd", data=KEPT, trainer=DOUBLE),
        Case(data=KEPT, trainer=DOUBLE, merge=(("examples", "kept"),)),
        Case("rebasin-il", data=KEPT, trainer=DOUBLE),
        Case(
            data=KEPT,
            learner=(("optimizer", "still"),),
            merge=(("cost", "l2"), ("method", "sinkhorn"), ("options", (("steps", 2),)), ("start", "fresh")),
        ),
    ],
)
def test_runs_that_once_failed_have_a_result(case):
    assert check(case) is not None


@pytest.mark.parametrize(
    "case",
    [
        Case("no-merge", data=(("n_tasks", 2), ("batch_size", 11)), network=BATCH_NORM),
        Case("rebasin-il", data=(("n_tasks", 2), ("batch_size", 11)), network=BATCH_NORM),
        Case("rebasin-il", data=KEPT, learner=EXPLODING),
        Case("rebasin-il", data=KEPT, network=(("kind", "linear"),)),
        Case(data=KEPT, learner=EXPLODING, trainer=DOUBLE, merge=(("alpha", 0.0), ("combine", "regmean"))),
        Case("agem", data=(("n_tasks", 2),)),
        Case("cumulative", data=(("n_tasks", 2), ("batch_size", 1), ("scenario", "task"))),
    ],
)
def test_runs_that_once_failed_say_why(case):
    assert check(case) is None


def same(one, other):
    """Return whether two runs have come to the same weights, accuracies and notes."""
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    notes = [[{**entry, "seconds": 0} for entry in outcome.history] for outcome in (one, other)]
    return (
        all(torch.equal(ours, theirs) for ours, theirs in pairs)
        and torch.equal(one.matrix.nan_to_num(-1), other.matrix.nan_to_num(-1))
        and notes[0] == notes[1]
    )


def changes_nothing(case):
    """A merge that takes all of the trained network leaves no trace, whatever it computes on the way."""
    plain = check(case)
    assume(plain is not None and case.given.get("optimizer") != "exploding")
    merged = check(
        replace(case, method="rebasin", merge=(("alpha", 0.0), ("method", "identity"), ("statistics", "none")))
    )
    assert same(plain, replace(merged, history=[]))


@quickly(10)
@given(cases(methods=("no-merge",)))
def test_a_merge_without_the_previous_network_changes_nothing(case):
    changes_nothing(case)


@pytest.mark.slow
@quickly(80)
@given(cases(methods=("no-merge",)))
def test_many_merges_without_the_previous_network_change_nothing(case):
    changes_nothing(case)


@pytest.mark.slow
@quickly(60)
@given(cases(methods=METHODS))
def test_a_run_repeats_itself(case):
    first = check(case)
    assume(first is not None and case.given.get("optimizer") != "exploding")
    assert same(first, check(case))
