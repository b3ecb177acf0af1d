"""Whole batches cut out of tensors by index, replay mixed in."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler

Examples = tuple[Tensor, Tensor, Tensor]  # images, labels, task indices
Index = tuple[Tensor, Tensor | None, int]  # of new and of replayed examples, and the seed of what is random about them


class MixedExamples(Dataset[Examples]):
    """New and replayed examples as whole tensors; an item is a batch, cut by the indices into either.

    ``transform`` is applied to the replayed images of a batch, all at once.
    """

    def __init__(
        self, new: Examples, replayed: Examples | None, transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.new = new
        self.replayed = replayed
        self.transform = transform

    def __getitem__(self, index: Index) -> Examples:
        """Return the batch ``(x, y, task)`` of new examples, followed by replayed ones."""
        fresh, replay, seed = index
        x, y, task = (tensor[fresh] for tensor in self.new)
        if replay is None or self.replayed is None:
            return x, y, task
        old = [tensor[replay] for tensor in self.replayed]
        if self.transform is not None:
            old[0] = self._transformed(old[0], seed)
        return torch.cat([x, old[0]]), torch.cat([y, old[1]]), torch.cat([task, old[2]])

    def _transformed(self, images: Tensor, seed: int) -> Tensor:
        assert self.transform is not None
        with torch.random.fork_rng(devices=[]):  # transforms draw from the global random state
            torch.manual_seed(seed)
            changed = self.transform(images)
        if changed.shape != images.shape or changed.dtype != images.dtype:
            raise ValueError(
                f"replay_transform must leave shape and type of images as they are, but made {tuple(changed.shape)}, {changed.dtype} of "
                f"{tuple(images.shape)}, {images.dtype}."
            )
        return changed


class MixedBatches(Sampler[Index]):
    """Indices of whole batches: a shuffle of the new examples, and shuffles of the buffer one after another beside it.

    The order depends on the seed and the epoch alone, however often it is iterated.
    """

    def __init__(self, n_new: int, n_replay: int, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.n_new, self.n_replay, self.batch_size, self.seed, self.epoch = n_new, n_replay, batch_size, seed, epoch

    def __len__(self) -> int:
        return -(-self.n_new // self.batch_size)

    def __iter__(self) -> Iterator[Index]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch())
        order = torch.randperm(self.n_new, generator=generator)
        replay: Tensor | None = None
        if self.n_replay:
            rounds = -(-self.n_new // self.n_replay)
            replay = torch.cat([torch.randperm(self.n_replay, generator=generator) for _ in range(rounds)])
        seeds = torch.randint(2**31, (len(self),), generator=generator).tolist()
        for batch, chosen in enumerate(order.split(self.batch_size)):
            start = batch * self.batch_size
            yield chosen, None if replay is None else replay[start : start + len(chosen)], seeds[batch]


class EvaluationBatches(Sampler[Index]):
    """Indices of all examples in their order, in batches of nearly one size whose number is a multiple of the processes'."""

    def __init__(self, n: int, batch_size: int, processes: int) -> None:
        rounds = max(1, -(-n // (batch_size * processes)))
        self.parts = [part for part in torch.arange(n).tensor_split(rounds * processes) if len(part)]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Index]:
        return ((part, None, 0) for part in self.parts)


class RankBatches(DistributedSampler[Any]):
    """What one of several processes has of some batches: every n-th, in their order, so that a step of all sees batches that follow each other.

    Where their number is no multiple of the processes', the first come once more at the end. Lightning's own sampler would shuffle them.
    """

    def __init__(self, batches: MixedBatches | EvaluationBatches, processes: int, rank: int) -> None:
        super().__init__(range(len(batches)), processes, rank, shuffle=False)  # type: ignore[arg-type]
        self.batches = batches

    def __iter__(self) -> Iterator[Index]:
        every = list(self.batches)
        return iter([every[index] for index in super().__iter__()])
