"""What a checkpoint holds of the merges so far."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_merge_state(owner: str, state: Mapping[str, Any]) -> None:
    """Refuse the state of a merging callback or plugin whose values are none that it writes.

    Raises:
        ValueError: If a count of tasks, the previous network, what is known of the tasks, a name or an entry of the history is damaged.
    """
    for key in ("n_tasks", "previous"):
        if key not in state:
            raise ValueError(f"The state of {owner} is damaged: it lacks {key}.")
    count, previous = state["n_tasks"], state["previous"]
    for key, kind in {"trained": str, "learned": str, "history": Mapping}.items():
        if not all(isinstance(entry, kind) for entry in state.get(key) or ()):
            raise ValueError(f"The state of {owner} is damaged: an entry of {key} is none that it writes.")
    for key, number in {"n_tasks": count, "known_tasks": state.get("known_tasks", 0)}.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"The state of {owner} is damaged: {key} is {number!r}.")
    for what, tensors in {"the previous network": previous, "known": state.get("known", {})}.items():
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not _is_of_numbers(tensor):
                raise ValueError(f"The state of {owner} is damaged: {name!r} of {what} is no tensor of numbers.")


def _is_of_numbers(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.layout == torch.strided and not bool(tensor.isnan().any())
