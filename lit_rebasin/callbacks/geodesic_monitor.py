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

from lit_rebasin.callbacks.kept_examples import first_examples
from lit_rebasin.callbacks.monitor import Monitor
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
        tracks: By the first layer of each track, the names of all that it goes through, as of the last measurement.

    Raises:
        TypeError: If ``layers`` is one string.
        ValueError: If ``layers`` names fewer than three, or one twice.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[GeodesicMonitor()])
    """

    def __init__(self, layers: Sequence[str] | None = None, every_n_epochs: int = 1, examples: int = 128) -> None:
        super().__init__(every_n_epochs, examples)
        self.layers = None if layers is None else _checked(layers)
        self.tracks: dict[str, list[str]] = {}
        self._points: dict[str, list[Tensor]] = {}

    @property
    @override
    def state_key(self) -> str:
        """Tell monitors of several tracks apart, of which a Trainer may have more than one."""
        return self._generate_state_key(layers=self.layers)

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
        self._points = {}
        with torch.no_grad():
            # All layers are looked at with two examples, for those that a track goes through are few of them.
            with recorded(step.module, self.layers) as calls:
                step.loss(first_examples(batch, 2))
            tracks_of(calls, self.layers)
            self.tracks = track_layers(calls) if self.layers is None else {self.layers[0]: self.layers}
            with recorded(step.module, [name for names in self.tracks.values() for name in names]) as calls:
                step.loss(batch)
        found = tracks_of(calls, self.layers)
        tracks = {name: same_space(track) for name, track in found.items()}
        numbers: dict[str, float] = {}
        for name, track in tracks.items():
            score, own = optimal_transport_score(*same_space([found[name][0], found[name][-1]]))
            numbers[f"geodesic/line_shape_score/{name}"] = float(line_shape_scores(track).mean())
            numbers[f"geodesic/optimal_transport_score/{name}"] = score
            numbers[f"geodesic/matched/{name}"] = own
        self._points = {name: [points[:_DRAWN].cpu() for points in track] for name, track in tracks.items()}
        return numbers

    @override
    def _figures(self) -> Mapping[str, Callable[[], Figure]]:
        ends = {name: layers[-1] for name, layers in self.tracks.items()}
        return {"geodesic/tracks": partial(tracks_figure, self._points, ends)} if self._points else {}


def _checked(layers: Sequence[str]) -> list[str]:
    if not isinstance(layers, list | tuple):
        raise TypeError(f"layers must be a list of names of modules, got {layers!r}.")
    if len(layers) < 3:
        raise ValueError(f"layers must name at least 3 modules, for two points lie on a line; got {list(layers)}.")
    if twice := [name for index, name in enumerate(layers) if name in layers[:index]]:
        raise ValueError(
            f"layers names {twice[0]!r} twice; of a module that is called more than once, the first call counts."
        )
    return list(layers)
