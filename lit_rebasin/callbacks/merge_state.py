"""What a checkpoint holds of the merges so far."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_merge_state(owner: str, state: Mapping[str, Any]) -> None:
    """Refuse the state of a merging callback or plugin whose values are none that it writes.

    Raises:
        ValueError: If the count of tasks, the previous network, a name or an entry of the history is damaged.
    """
    count, previous = state["n_tasks"], state["previous"]
    for key, kind in {"trained": str, "learned": str, "history": Mapping}.items():
        if not all(isinstance(entry, kind) for entry in state.get(key) or ()):
            raise ValueError(f"The state of {owner} is damaged: an entry of {key} is none that it writes.")
    if type(count) is not int or count < 0:
        raise ValueError(f"The state of {owner} is damaged: n_tasks is {count!r}.")
    for name, tensor in previous.items():
        if not isinstance(tensor, Tensor) or not _is_of_numbers(tensor):
            raise ValueError(
                f"The state of {owner} is damaged: {name!r} of the previous network is no tensor of numbers."
            )


def _is_of_numbers(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.layout == torch.strided and not bool(tensor.isnan().any())
