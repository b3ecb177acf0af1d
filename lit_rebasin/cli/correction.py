"""What a merge has corrected before it is measured and written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.matching import Setting
from lit_rebasin.merging import LinearPath, has_batch_norm, reestimate_batch_norm, repair, repair_many, reset_batch_norm
from lit_rebasin.merging.data import evaluating
from lit_rebasin.symmetry import use_batch_statistics

NEED_DATA = ("repair", "rescale", "reestimate")
NEED_BATCH_NORM = ("reestimate", "data-free")
NAMES = ("none", *NEED_DATA, "data-free")


@dataclass(frozen=True)
class Correction:
    """A way to give a merge statistics of its own, by name.

    Attributes:
        name: One of `NAMES`.
        setting: What is merged.
    """

    name: str
    setting: Setting

    def along(self, path: LinearPath) -> Callable[[nn.Module, float], object] | None:
        """Return what changes a merge on a path in place, or None."""
        example, batches = self.setting.example, self.setting.inputs
        if self.name in ("repair", "rescale"):
            mean = self.name == "repair"
            return lambda merged, alpha: repair(merged, path, alpha, merged, batches, mean=mean)
        if self.name == "reestimate":
            return lambda merged, alpha: self.reestimate(merged)
        if self.name == "data-free":
            return lambda merged, alpha: reset_batch_norm(
                merged, path, alpha, lambda _: merged(*example.args, **example.kwargs), None
            )
        return None

    def of_many(self, merged: nn.Module, members: Sequence[Mapping[str, Tensor]]) -> None:
        """Change a merge of permuted members in place."""
        if self.name in ("repair", "rescale"):
            repair_many(merged, members, merged, self.setting.inputs, mean=self.name == "repair")
        elif self.name == "reestimate":
            self.reestimate(merged)

    def reestimate(self, merged: nn.Module) -> None:
        """Estimate the running statistics of BatchNorm on the data; all else runs as in evaluation."""
        with evaluating(merged):
            use_batch_statistics(merged)
            reestimate_batch_norm(merged, merged, self.setting.inputs)


def correction(name: str | None, setting: Setting) -> Correction:
    """Return the correction of a name, or what fits the network and the data: repair where there is data.

    Raises:
        UsageError: If it is unknown, or the data, the network or the number of checkpoints does not fit it.
    """
    data, norm, two = setting.examples is not None, has_batch_norm(setting.networks[0]), len(setting.networks) == 2
    name = name or _fitting(data, norm, two)
    if name not in NAMES:
        raise UsageError(f"--statistics must be one of {', '.join(NAMES)}, got {name}")
    if not two and name == "data-free":
        raise UsageError(f"--statistics data-free is for two checkpoints, got {len(setting.networks)}")
    if name in NEED_DATA and not data:
        raise UsageError(f"--statistics {name} needs data: give --data FILE.npz with the array x")
    if name in NEED_BATCH_NORM and not norm:
        raise UsageError(f"--statistics {name} is for BatchNorm, and {setting.path} has none with running statistics")
    return Correction(name, setting)


def _fitting(data: bool, norm: bool, two: bool) -> str:
    if data:
        return "repair"
    return "data-free" if two and norm else "none"
