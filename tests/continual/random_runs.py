"""Runs of any configuration, drawn by hypothesis."""

from hypothesis import strategies as st

from .runs import METHODS, NORMS, OPTIMIZERS, OURS, REPLAYING, Case


def _some(**strategies):
    """Draw some of these arguments, the others being left at their defaults."""
    chosen = st.fixed_dictionaries({}, optional=strategies)
    return chosen.map(lambda arguments: tuple(sorted(arguments.items())))


@st.composite
def _streams(draw, replay):
    """Draw how many examples there are of each label, and the arguments of a datamodule; most of them make a stream."""
    labels = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 12, 40]), min_size=1, max_size=6, unique=True))
    test = st.sampled_from([1, 1, 2, 2, 5, 5, 9, 0])
    counts = tuple((label, draw(st.integers(1, 9)), draw(test)) for label in labels)
    chosen = dict(draw(_DATA))
    most = (
        len(labels)
        if chosen.get("scenario") != "domain"
        else min(sum(count[part] for count in counts) for part in (1, 2))
    )
    chosen["n_tasks"] = (
        draw(st.sampled_from([2, 3, 3, 4, 1, 5])) if draw(_RARELY) else draw(st.integers(1, max(1, min(4, most))))
    )
    chosen["epochs_per_task"] = draw(st.sampled_from([1, 1, 2]))
    if replay and not draw(_RARELY):
        chosen["replay_per_class"] = chosen.get("replay_per_class") or 1
    return counts, tuple(sorted(chosen.items()))


_RARELY = st.sampled_from([False] * 19 + [True])
_DATA = _some(
    scenario=st.sampled_from(["domain", "class", "task"]),
    batch_size=st.sampled_from([1, 2, 3, 5, 8, 64]),
    replay_per_class=st.sampled_from([0, 1, 2, 10]),
    shifts=st.just(True),
    recipes=st.sampled_from(["rotated", "permuted", "uneven"]),
    validation_fraction=st.sampled_from([0.0, 0.0, 0.4]),
    seed=st.integers(0, 99),
)
_NETWORK = _some(
    kind=st.sampled_from(["mlp", "residual", "convolution", "linear"]),
    width=st.integers(1, 6),
    norm=st.sampled_from(list(NORMS)),
    dropout=st.sampled_from([0.0, 0.5]),
)
_LEARNER = _some(
    optimizer=st.sampled_from([*OPTIMIZERS, "adamw", "momentum", "adamw", "momentum"]),
    features=st.integers(1, 4),
    weighting=st.sampled_from(["examples", "tasks"]),
    lr_decay=st.sampled_from([1.0, 0.5]),
    lr_schedule=st.sampled_from(["constant", "linear"]),
    distillation=st.sampled_from([1.0, 5.0]),
    temperature=st.sampled_from([0.5, 2.0]),
    mixup=st.booleans(),
).map(lambda arguments: tuple(pair for pair in arguments if pair[0] != "mixup" or "distillation" in dict(arguments)))
_TRAINER = _some(
    tasks_left_out=st.just(1),
    fits=st.just(True),
    limit_train_batches=st.sampled_from([1, 2, 0.5, 1.0]),
    accumulate_grad_batches=st.sampled_from([1, 2, 3]),
    gradient_clip_val=st.sampled_from([0.0, 1.0]),
    precision=st.sampled_from(["32-true", "64-true", "bf16-mixed"]),
)
_OPTIONS = {
    "sinkhorn": _some(steps=st.integers(1, 3), residual_learning_rate=st.sampled_from([0.0, 0.5])),
    "straight-through": _some(steps=st.integers(1, 3)),
}
_ALIGNMENTS = ("identity", "weights", "covariance", "activations", "frank-wolfe", "straight-through", "sinkhorn")


@st.composite
def _merges(draw):
    merge = dict(
        draw(
            _some(
                alpha=st.one_of(
                    st.sampled_from(["line-search", "fisher", "layer-fisher"]), st.sampled_from([0, 0.0, 0.3, 0.5, 1.0])
                ),
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
        )
    )
    trained = merge.get("method") in _OPTIONS
    if trained:
        merge["options"] = draw(_OPTIONS[merge["method"]]) or (("steps", 2),)
    elif draw(st.integers(0, 9)):
        merge.pop("cost", None)
        merge.pop("init", None)  # most of them are refused beside other methods
    return tuple(sorted(merge.items()))


@st.composite
def cases(draw, methods=METHODS):
    """Draw a run."""
    method = draw(st.sampled_from(methods))
    merge = draw(_merges()) if method == "rebasin" else ()
    counts, data = draw(_streams(method in REPLAYING or dict(merge).get("examples") == "kept"))
    shape = draw(st.sampled_from([(1, 4, 4), (3, 4, 4), (1, 5, 3), (1, 1, 1)]))
    dtype = draw(st.sampled_from(["float32", "uint8", "float64"]))
    left_out = {"rebasin-il": ("accumulate_grad_batches", "gradient_clip_val", "fits"), "mc-sgd": ("fits",)}.get(
        method, ()
    )
    trainer = tuple(pair for pair in draw(_TRAINER) if pair[0] not in left_out) if method in OURS else ()
    return Case(method, counts, shape, dtype, data, draw(_NETWORK), draw(_LEARNER), trainer, merge)
