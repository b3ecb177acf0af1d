"""Which examples of a task are kept for replay."""

import torch
from torch import Tensor


def choose_replay(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Pick examples of each class with Avalanche's class-balanced storage policy (reservoir sampling in each class).

    Args:
        labels: ``(N,)`` of one task.
        per_class: Examples to keep of each class; all of a class that has fewer.
        seed: Of the draw; the global random state is left as it was.

    Returns:
        Indices into ``labels``, sorted.
    """
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.storage_policy import ClassBalancedBuffer
    from torch.utils.data import TensorDataset

    # The policy stores examples; its examples here are their own indices.
    dataset = TensorDataset(torch.arange(len(labels)), labels)
    dataset.targets = labels.tolist()  # type: ignore[attr-defined]
    n_classes = len(set(dataset.targets))  # type: ignore[attr-defined]
    policy = ClassBalancedBuffer(per_class * n_classes, adaptive_size=False, total_num_classes=n_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy.update_from_dataset(as_classification_dataset(dataset))
        kept = [int(item[0]) for item in policy.buffer]
    return torch.tensor(sorted(kept), dtype=torch.long)
