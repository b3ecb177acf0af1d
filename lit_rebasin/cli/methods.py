"""The methods that the command line knows by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_rebasin.cli.errors import UsageError


@dataclass(frozen=True)
class Method:
    """What a method is made of.

    Attributes:
        replay: Whether it keeps examples.
        merge: What of the merge differs from the configuration, unless ``per_method`` says otherwise; ``None`` for no merge.
        fits: Whether `fit` knows it.
        baseline: Whether `benchmark` runs it with Avalanche's own strategy.
    """

    replay: bool
    merge: Mapping[str, Any] | None = None
    fits: bool = True
    baseline: bool = False


_PLAIN = {"cost": None, "init": None, "options": None}
METHODS = {
    "finetune": Method(replay=False, baseline=True),
    "ewc": Method(replay=False, fits=False, baseline=True),
    "lwf": Method(replay=False, fits=False, baseline=True),
    "agem": Method(replay=True, fits=False, baseline=True),
    "replay": Method(replay=True, baseline=True),
    "der": Method(replay=True, fits=False, baseline=True),
    "er-ace": Method(replay=True, fits=False, baseline=True),
    "mc-sgd": Method(replay=True, fits=False),
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
    "rebasin-il": Method(replay=True, fits=False),
    "average": Method(replay=True, merge={**_PLAIN, "method": "identity"}),
    "rebasin": Method(replay=True, merge={}),
    "cumulative": Method(replay=False, fits=False, baseline=True),
    "joint": Method(replay=False, fits=False, baseline=True),
}


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
            raise UsageError(f"there is no method {name!r}; choose from {', '.join(known)}")
        if name not in known:
            raise UsageError(f"{name!r} is for benchmark; choose from {', '.join(known)}")
        if METHODS[name].replay and replay_per_class == 0:
            raise UsageError(
                f"method {name!r} replays examples, but data.replay_per_class is 0; pass a number above 0, or leave the method out"
            )
