"""The methods that the command line knows by name."""

from collections.abc import Sequence
from dataclasses import dataclass

from lit_rebasin.cli.errors import UsageError


@dataclass(frozen=True)
class Method:
    """What a method adds to fine-tuning: replayed examples, and a merge after every task."""

    replay: bool
    merge: bool
    align: bool = True


METHODS = {
    "finetune": Method(replay=False, merge=False),
    "replay": Method(replay=True, merge=False),
    "average": Method(replay=True, merge=True, align=False),
    "rebasin": Method(replay=True, merge=True),
}


def check_methods(names: Sequence[str], replay_per_class: int) -> None:
    """Raise a `UsageError` for a method that does not exist, or that cannot replay."""
    if not names:
        raise UsageError(f"methods names none; choose from {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise UsageError(f"there is no method {name!r}; choose from {', '.join(METHODS)}")
        if METHODS[name].replay and replay_per_class == 0:
            raise UsageError(
                f"method {name!r} replays examples, but data.replay_per_class is 0; pass a number above 0, or leave the method out"
            )
