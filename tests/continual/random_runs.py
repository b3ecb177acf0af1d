"""Runs of any configuration, drawn by hypothesis."""

from hypothesis import strategies as st

from .runs import METHODS, NORMS, OPTIMIZERS, OURS, REPLAYING, Case


def _some(**strategies):
    """Draw some of these arguments, the others being left at their defaults."""
    return st.fixed_dictionaries({}, optional=strategies)


_RARELY = st.sampled_from([False] * 15 + [True])
_ALIGNMENTS = ("identity", "weights", "covariance", "activations", "frank-wolfe", "straight-through", "sinkhorn")
_DATA = _some(
    scenario=st.sampled_from(["domain", "class", "task"]),
    batch_size=st.sampled_from([1, 2, 3, 5, 8, 64]),
    replay_per_class=st.sampled_from([0, 1, 2, 10]),
    shifts=st.just(True),
    recipes=st.sampled_from(["rotated", "permuted", "uneven"]),
    seed=st.integers(0, 99),
)
_NETWORK = _some(
    kind=st.sampled_from(["mlp", "residual", "convolution"]),
    width=st.integers(2, 6),
    norm=st.sampled_from(list(NORMS)),
    dropout=st.sampled_from([0.0, 0.5]),
)
_LEARNER = _some(
    optimizer=st.sampled_from([name for name in OPTIMIZERS if name != "exploding"]),
    features=st.integers(1, 4),
    weighting=st.sampled_from(["examples", "tasks"]),
    lr_decay=st.sampled_from([1.0, 0.5]),
    lr_schedule=st.sampled_from(["constant", "linear"]),
    distillation=st.sampled_from([1.0, 5.0]),
    temperature=st.sampled_from([0.5, 2.0]),
    mixup=st.booleans(),
)
_TRAINER = _some(
    limit_train_batches=st.sampled_from([1, 2, 1.0]),
    accumulate_grad_batches=st.sampled_from([1, 2, 3]),
    gradient_clip_val=st.sampled_from([0.0, 1.0]),
    precision=st.sampled_from(["32-true", "64-true", "bf16-mixed"]),
)
_MERGE = _some(
    alpha=st.sampled_from(["line-search", "fisher", "layer-fisher", 0, 0.0, 0.3, 0.5, 1.0]),
    method=st.sampled_from(_ALIGNMENTS),
    cost=st.sampled_from(["incremental", "midpoint", "random-point", "l2", "l1", "cosine"]),
    init=st.sampled_from(_ALIGNMENTS),
    statistics=st.sampled_from(["reestimate", "repair", "rescale", "data-free", "none"]),
    batches=st.integers(1, 12),
    examples=st.sampled_from(["training", "kept"]),
    start=st.sampled_from(["previous", "fresh", "perturbed"]),
    combine=st.sampled_from(["average", "regmean"]),
    margin=st.sampled_from([0.0, 1.0, float("inf")]),
    seed=st.integers(0, 9),
)
_OPTIONS = {
    "sinkhorn": _some(steps=st.integers(1, 3), residual_learning_rate=st.sampled_from([0.0, 0.5])),
    "straight-through": _some(steps=st.integers(1, 3)),
}


@st.composite
def cases(draw, methods=METHODS):
    """Draw a run; now and then one that cannot be."""
    method = draw(st.sampled_from(methods))
    counts, data = draw(_streams())
    network, learner, trainer = draw(_NETWORK), draw(_LEARNER), draw(_TRAINER) if method in OURS else {}
    merge = draw(_MERGE) if method == "rebasin" else {}
    if merge.get("method") in _OPTIONS:
        merge["options"] = tuple(sorted({"steps": 2, **draw(_OPTIONS[merge["method"]])}.items()))
    if draw(_RARELY):
        network |= draw(st.sampled_from([{"kind": "linear"}, {"width": 1}]))
    if draw(_RARELY):
        learner["optimizer"] = "exploding"
    if draw(_RARELY) and method in OURS:
        trainer |= draw(st.sampled_from([{"tasks_left_out": 1}, {"limit_train_batches": 0.5}]))
    if method in ("rebasin", "no-merge") and not draw(st.integers(0, 3)):
        trainer["fits"] = True
    if "distillation" not in learner:
        learner.pop("mixup", None)
    if method == "rebasin-il":
        for name in ("accumulate_grad_batches", "gradient_clip_val"):
            trainer.pop(name, None)
    if not draw(_RARELY):
        _leave_out_what_is_refused(method, data, network, learner, trainer, merge)
    shape = draw(st.sampled_from([(1, 4, 4), (3, 4, 4), (1, 5, 3), (1, 1, 1)]))
    dtype = draw(st.sampled_from(["float32", "uint8", "float64"]))
    arguments = (tuple(sorted(part.items())) for part in (data, network, learner, trainer, merge))
    return Case(method, counts, shape, dtype, *arguments)


@st.composite
def _streams(draw):
    """Draw how many examples there are of each label, for training and test, and the arguments of a datamodule."""
    n_labels = draw(st.sampled_from([1, 2, 3, 3, 4, 4, 5, 6]))
    known = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 12, 40])
    labels = draw(st.lists(known, min_size=n_labels, max_size=n_labels, unique=True))
    counts = [(label, draw(st.integers(1, 9)), draw(st.sampled_from([1, 1, 2, 5]))) for label in labels]
    data = draw(_DATA)
    most = min(5, n_labels if data.get("scenario") != "domain" else sum(trained for _, trained, _ in counts))
    n_tasks = draw(st.sampled_from([1, 2, 2, 3, 3, 3, 4, 5]))
    data["n_tasks"] = n_tasks if draw(_RARELY) else min(n_tasks, most)
    data["epochs_per_task"] = draw(st.sampled_from([1, 1, 2]))
    if draw(_RARELY):
        counts[0] = (*counts[0][:2], 0)
    if draw(_RARELY):
        data["validation_fraction"] = draw(st.sampled_from([0.2, 0.5, 0.9]))
    return tuple(counts), data


def _leave_out_what_is_refused(method, data, network, learner, trainer, merge):
    """Drop arguments that would end most runs before they begin."""
    if method in REPLAYING or merge.get("examples") == "kept":
        data["replay_per_class"] = data.get("replay_per_class") or 1
    if network.get("norm") not in (None, "none", "layer"):
        data["batch_size"] = max(data.get("batch_size", 64), 5)
    elif merge.get("statistics") == "data-free":
        del merge["statistics"]
    if isinstance(merge.get("alpha"), str):
        merge.pop("combine", None)
    if merge.get("method") not in _OPTIONS:
        merge.pop("cost", None)
        merge.pop("init", None)
    elif merge.get("cost", "incremental") != "incremental":
        merge["options"] = (("steps", 2),)
    if trainer.get("fits"):
        for name in ("lr_decay", "lr_schedule", "distillation", "mixup"):
            learner.pop(name, None)
        merge.pop("examples", None)
