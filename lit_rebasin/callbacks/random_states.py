"""The callback that lets a resumed fit draw what it would have drawn."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class RandomStates(Callback):
    """Keep the random states of Python, NumPy and torch in every checkpoint, which Lightning leaves out.

    A fit that is resumed where an epoch ended then goes on as if it had never stopped, dropout and all. In the middle of an epoch Lightning
    begins the loader anew. Every process goes on with its own states, or with those of the first where there were fewer of them. With
    ``precision="64-true"`` weights are restored as they were, which Lightning would round to 32 bits.

    Example::

        trainer = Trainer(callbacks=[ModelCheckpoint(save_last=True), RandomStates()])
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Any] | None = None  # of a checkpoint, until they are put back

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Make the module one of 64 bits before a checkpoint is written into it; Lightning does so after."""
        if trainer.precision == "64-true":
            pl_module.double()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the present states, as tensors and plain types."""
        numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002 - that of others, not our own draws
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": random.getstate(),
            "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
        }

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Add the states of the other processes, for the first one writes for all."""
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, self.state_dict())
            checkpoint["callbacks"][self.state_key] = {**gathered[0], "others": gathered[1:]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what a checkpoint holds until the fit goes on, for much is drawn in between.

        Raises:
            ValueError: If it is damaged.
        """
        try:
            for states in (state_dict, *state_dict.get("others", [])):
                torch.Generator().set_state(states["torch"])
                random.Random().setstate(states["python"])
                np.random.RandomState().set_state(_of_numpy(states))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"The state of RandomStates is damaged: {error}.") from None
        self._kept = state_dict

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Put the states back where a new epoch begins."""
        if self._kept is None:
            return
        self._put_back(trainer)
        loop = trainer.fit_loop
        # The iterators of an epoch draw a seed each. In a fit that was not stopped they are made once when the loader is reloaded, which has
        # been before now, and once more when the epoch begins, which a loop that goes on leaves out.
        every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        reloaded = bool(every) and trainer.current_epoch % every == 0
        left_out = loop.is_resuming or loop.epoch_loop.restarting
        for _ in range(reloaded + left_out):
            iter(loop._data_fetcher)  # type: ignore[arg-type]

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Put the states back where a fit goes on in the middle of an epoch."""
        if self._kept is not None:
            self._put_back(trainer)

    def _put_back(self, trainer: "pl.Trainer") -> None:
        kept, self._kept = self._kept or {}, None
        of_ranks = [kept, *kept.get("others", [])]
        states = of_ranks[trainer.global_rank] if trainer.global_rank < len(of_ranks) else kept
        torch.set_rng_state(states["torch"])
        if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])
        random.setstate(states["python"])
        np.random.set_state(_of_numpy(states))  # noqa: NPY002


def _of_numpy(states: dict[str, Any]) -> dict[str, Any]:
    """Return NumPy's part with the key as the array that it takes."""
    numpy = states["numpy"]
    return {**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], dtype=np.uint32)}}
