"""Whole batches cut out of tensors by index, replay mixed in."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Examples = tuple[Tensor, Tensor, Tensor]  # images, labels, task indices


class MixedExamples(Dataset):
    """New and replayed examples as whole tensors; an item is a batch, cut by the indices into either."""

    def __init__(self, new: Examples, replayed: Examples | None) -> None:
        self.new = new
        self.replayed = replayed

    def __getitem__(self, index: tuple[Tensor, Tensor | None]) -> Examples:
        """Return the batch ``(x, y, task)`` of new examples, followed by replayed ones."""
        fresh, replay = index
        x, y, task = (tensor[fresh] for tensor in self.new)
        if replay is None or self.replayed is None:
            return x, y, task
        old = [tensor[replay] for tensor in self.replayed]
        return torch.cat([x, old[0]]), torch.cat([y, old[1]]), torch.cat([task, old[2]])


class MixedBatches(Sampler):
    """Indices of whole batches: a shuffle of the new examples, and shuffles of the buffer one after another beside it.

    The order depends on the seed and the epoch alone, however often it is iterated.
    """

    def __init__(self, n_new: int, n_replay: int, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.n_new, self.n_replay, self.batch_size, self.seed, self.epoch = n_new, n_replay, batch_size, seed, epoch

    def __len__(self) -> int:
        return -(-self.n_new // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch())
        order = torch.randperm(self.n_new, generator=generator)
        replay: Tensor | None = None
        if self.n_replay:
            rounds = -(-self.n_new // self.n_replay)
            replay = torch.cat([torch.randperm(self.n_replay, generator=generator) for _ in range(rounds)])
        for start in range(0, self.n_new, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield chosen, None if replay is None else replay[start : start + len(chosen)]
