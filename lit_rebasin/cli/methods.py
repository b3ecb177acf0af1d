"""The methods that the command line knows by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Literal

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.suggestions import did_you_mean


@dataclass(frozen=True)
class Method:
    """What a method is made of.

    Attributes:
        replay: Whether it keeps examples.
        merge: What of the merge differs from the configuration, unless ``per_method`` says otherwise; ``None`` for no merge.
        fits: Whether `fit` knows it.
        baseline: Whether `benchmark` runs it with Avalanche's own strategy.
        unheeded: Keys of the configuration that do not concern it.
        resumes: Whether a run of `benchmark` that was stopped can go on after the last task that it finished.
    """

    replay: bool
    merge: Mapping[str, Any] | None = None
    fits: bool = True
    baseline: bool = False
    unheeded: tuple[str, ...] = ()
    resumes: bool = True


# Of our own training step.
LEARNING = (
    *(f"model.{name}" for name in ("weighting", "lr_decay", "lr_schedule", "distillation", "temperature", "mixup")),
    "data.replay_transform",
)
_ALIGNMENT = ("merge.method", "merge.cost", "merge.init", "merge.options")
_PLAIN = {"cost": None, "init": None, "options": None}
_IDENTITY = {**_PLAIN, "method": "identity"}
_avalanche = partial(Method, baseline=True, unheeded=LEARNING, resumes=False)
METHODS = {
    "finetune": _avalanche(replay=False),
    "ewc": _avalanche(replay=False, fits=False),
    "lwf": _avalanche(replay=False, fits=False),
    "agem": _avalanche(replay=True, fits=False),
    "replay": _avalanche(replay=True),
    "der": _avalanche(replay=True, fits=False),
    "er-ace": _avalanche(replay=True, fits=False),
    "mc-sgd": Method(
        replay=True, fits=False, unheeded=tuple(key for key in LEARNING if not key.startswith("model.lr_"))
    ),
    "clewi": Method(
        replay=True,
        merge={
            **_PLAIN,
            "method": "activations",
            "alpha": 0.5,
            "statistics": "reestimate",
            "examples": "kept",
            "start": "previous",
            "combine": "average",
        },
        fits=False,
    ),
    "rebasin-il": Method(
        replay=True,
        fits=False,
        unheeded=tuple(key for key in LEARNING if key.startswith("model.")),
        resumes=False,
    ),
    "no-merge": Method(
        replay=True,
        merge={**_IDENTITY, "alpha": 0.0, "combine": "average", "statistics": "none"},
        unheeded=(*_ALIGNMENT, "merge.alpha", "merge.combine", "merge.statistics"),
    ),
    # The ablation shows what averaging does, however bad that is.
    "average": Method(replay=True, merge={**_IDENTITY, "margin": inf}, unheeded=(*_ALIGNMENT, "merge.margin")),
    "rebasin": Method(replay=True, merge={}),
    "cumulative": _avalanche(replay=False, fits=False),
    "joint": _avalanche(replay=False, fits=False),
}


def merge_of(name: str, configured: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what of the merge differs from the configuration to make a method.

    A residual that is trained beside the permutations is no part of the alignment: `average` trains it, too, beside the identity.
    """
    method, cost, options = (configured[key] for key in ("method", "cost", "options"))
    options = options or {}
    trains_residual = cost in (None, "incremental") and options.get("residual_learning_rate", 1.0) > 0
    if name == "average" and method == "sinkhorn" and trains_residual:
        return {"init": "identity", "options": {**options, "learning_rate": 0.0}, "margin": inf}
    return METHODS[name].merge or {}


def names_of(command: Literal["fit", "benchmark"]) -> list[str]:
    """Return the methods that a command runs."""
    return [name for name, method in METHODS.items() if method.fits or command == "benchmark"]


def check_methods(names: Sequence[str], replay_per_class: int, command: Literal["fit", "benchmark"]) -> None:
    """Raise a `UsageError` for a method that the command does not know, or that cannot replay."""
    known = names_of(command)
    if not names:
        raise UsageError(f"methods names none; choose from {', '.join(known)}")
    for name in names:
        if name not in METHODS:
            meant = did_you_mean(name, known) or f"; choose from {', '.join(known)}"
            raise UsageError(f"there is no method {name!r}{meant}")
        if name not in known:
            raise UsageError(f"{name!r} is for benchmark; choose from {', '.join(known)}")
        if METHODS[name].replay and replay_per_class == 0:
            raise UsageError(
                f"method {name!r} replays examples, but data.replay_per_class is 0; pass a number above 0, or leave the method out"
            )
