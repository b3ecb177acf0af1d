"""The methods that the command line knows by name."""

from dataclasses import dataclass


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
