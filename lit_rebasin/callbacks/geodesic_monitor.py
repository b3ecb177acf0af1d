"""The callback that watches whether a network moves its data along straight lines, to where optimal transport would."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lit_rebasin.callbacks.monitor import Monitor, first_examples
from lit_rebasin.callbacks.step_loss import StepLoss
from lit_rebasin.metrics import (
    line_shape_scores,
    optimal_transport_score,
    recorded,
    same_space,
    track_layers,
    tracks_figure,
    tracks_of,
)

# Samples that are kept for the picture.
_DRAWN = 60


class GeodesicMonitor(Monitor):
    """Log how straight the way of the data through the layers is, and how near it comes to optimal transport (Gai and Zhang, 2102.09235).

    Tags are ``geodesic/line_shape_score``, ``geodesic/optimal_transport_score`` and ``geodesic/matched``, each followed by the first layer of
    the track, and the picture ``geodesic/tracks``; see ``docs/geodesic.md``.

    Args:
        layers: Names of the modules that the track goes through. By default the blocks of each stage of a residual network, or layers of equal
            width; see :func:`~lit_rebasin.metrics.tracks_of`.
        every_n_epochs: How many epochs lie between two measurements; a task ends with one in any case.
        examples: How many examples are kept aside; the optimal plan takes the cube of it.

    Attributes:
        history: One entry a measurement: the epoch, the task and the numbers.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[GeodesicMonitor()])
    """

    def __init__(self, layers: Sequence[str] | None = None, every_n_epochs: int = 1, examples: int = 128) -> None:
        super().__init__(every_n_epochs, examples)
        self.layers = layers
        self._tracks: dict[str, list[Tensor]] = {}

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refuse layers that the module does not have, before anything is trained."""
        super().on_fit_start(trainer, pl_module)
        known = [name for name, _ in pl_module.named_modules() if name]
        if unknown := [name for name in self.layers or () if name not in known]:
            raise MisconfigurationException(
                f"GeodesicMonitor(layers=...) names {', '.join(map(repr, unknown))}, which {type(pl_module).__name__} does not have; it has "
                f"{', '.join(known)}."
            )

    @override
    def _measure(self, trainer: "pl.Trainer", step: StepLoss, batch: Any) -> dict[str, float]:
        with torch.no_grad():
            # All layers are looked at with two examples, for those that a track goes through are few of them.
            with recorded(step.module) as calls:
                step.loss(first_examples(batch, 2))
            tracks_of(calls, self.layers)
            with recorded(step.module, self.layers or track_layers(calls)) as calls:
                step.loss(batch)
        self._tracks = {name: same_space(track) for name, track in tracks_of(calls, self.layers).items()}
        numbers: dict[str, float] = {}
        for name, track in self._tracks.items():
            score, own = optimal_transport_score(track[0], track[-1])
            numbers[f"geodesic/line_shape_score/{name}"] = float(line_shape_scores(track).mean())
            numbers[f"geodesic/optimal_transport_score/{name}"] = score
            numbers[f"geodesic/matched/{name}"] = own
        self._tracks = {name: [points[:_DRAWN].cpu() for points in track] for name, track in self._tracks.items()}
        return numbers

    @override
    def _figures(self) -> Mapping[str, Callable[[], Figure]]:
        return {"geodesic/tracks": partial(tracks_figure, self._tracks)} if self._tracks else {}
