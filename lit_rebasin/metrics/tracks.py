"""The ways of samples through the layers of a network."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Fewer points than these make no track: two are always on a straight line.
_POINTS = 3
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Layers over sequences, which give out their weights or their state beside the features, and by default have samples in dimension 1.
SEQUENTIAL = (nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True, eq=False)
class Call:
    """The first call of a module: what went in and what came out, one sample a row; and which call gave that out first."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor
    origin: str

    @property
    def passes_on(self) -> bool:
        """Whether another module had given out the very same tensor before."""
        return self.origin != self.name

    @property
    def size(self) -> int:
        """Numbers a sample."""
        return self.output[0].numel()


@contextmanager
def recorded(
    root: nn.Module, wanted: Collection[str] | None = None, gradients: dict[str, Tensor] | None = None
) -> Iterator[list[Call]]:
    """Collect the first call of every module that gives out one tensor with samples in dimension 0, in the order of their ends.

    Of recurrent layers and of attention, which give out more, it is the features.

    Args:
        root: Its parts are listened to.
        wanted: Names of the modules to listen to. Default: all but parts that are frozen, such as the copy of a network that another is
            distilled from.
        gradients: Filled with the gradients of the outputs by the name of the module, by any backward pass through what was recorded.
    """
    calls: list[Call] = []
    met: set[str] = set()
    # With how often they had been written to, for a later layer may work in place.
    outputs: list[tuple[str, Tensor, int]] = []
    inputs: dict[str, Tensor] = {}

    def keep_input(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Before the call, which may work in place.
            if name not in met and args and isinstance(args[0], Tensor) and args[0].ndim > 1:
                inputs[name] = args[0].detach().clone()

        return hook

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, SEQUENTIAL):
                output = output[0]
            if name in met or not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
                return
            met.add(name)
            earlier = (of for of, known, version in outputs if output is known and output._version == version)
            origin = next(earlier, name)
            outputs.append((name, output, output._version))
            turn = _samples_first(module)
            given = turn(inputs[name]) if name in inputs else None
            calls.append(Call(name, module, given, turn(output.detach()).clone(), origin))
            if gradients is not None and output.requires_grad:
                output.register_hook(lambda gradient: gradients.update({name: turn(gradient.detach())}))

        return hook

    known = trained_modules(root) if wanted is None else root.named_modules()
    parts = {name: module for name, module in known if wanted is None or name in wanted}
    handles = [module.register_forward_pre_hook(keep_input(name)) for name, module in parts.items()]
    handles += [module.register_forward_hook(note(name)) for name, module in parts.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def tracks_of(calls: Sequence[Call], layers: Sequence[str] | None = None) -> dict[str, list[Tensor]]:
    """Return the ways of the samples through layers, by the name of each track's first layer.

    By default a track goes through modules of one class whose outputs have one size, such as the blocks of a stage of a ResNet, from what goes
    into the first of them on; through activation functions or the like where no such blocks follow each other; and through all linear layers
    and convolutions, from the input on, where nothing of one size does. A track has at least three points.

    Args:
        calls: What :func:`recorded` has collected.
        layers: Names of the modules to go through, in place of the choice above.

    Returns:
        By name the points ``(B, width)``, of one or of several widths.

    Raises:
        ValueError: If a layer was not called, or there are not three points.
    """
    if layers is not None:
        return {layers[0]: _through(calls, layers)}
    return {series.calls[0].name: series.points() for series in _chosen(calls)}


def track_layers(calls: Sequence[Call]) -> dict[str, list[str]]:
    """Return the names of the modules that each track goes through by default, by the name of the first.

    Raises:
        ValueError: If there are not three points.
    """
    return {series.calls[0].name: [call.name for call in series.calls] for series in _chosen(calls)}


def same_space(track: Sequence[Tensor]) -> list[Tensor]:
    """Return a track in one space: as it is where all widths are equal, else up to rigid motions of every cloud.

    Clouds of different widths have no common coordinates. Each is centred and turned onto the one before it by the orthogonal map that leaves
    the least squared distance between them (Procrustes), missing coordinates being 0: the steps that are left are those that no rigid motion
    explains.

    Args:
        track: ``(B, width)`` each.

    Returns:
        ``(B, width)`` each, of one width.
    """
    if len({points.shape[1] for points in track}) == 1:
        return list(track)
    # B points lie in B dimensions at most, in which they are written without loss.
    clouds = [_reduced(points - points.mean(0)) for points in track]
    width = max(points.shape[1] for points in clouds)
    clouds = [nn.functional.pad(points, (0, width - points.shape[1])) for points in clouds]
    joined = clouds[:1]
    for points in clouds[1:]:
        left, _, right = torch.linalg.svd(points.T @ joined[-1])
        joined.append(points @ left @ right)
    return joined


def _samples_first(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what brings samples to dimension 0, where a layer over sequences has them in dimension 1."""
    turned = isinstance(module, SEQUENTIAL) and not module.batch_first
    return lambda points: points.transpose(0, 1) if turned and points.ndim == 3 else points


def trained_modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by name but for those of frozen parts; the root itself is none of its layers."""
    for name, child in root.named_children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            continue
        yield prefix + name, child
        yield from trained_modules(child, f"{prefix}{name}.")


def _through(calls: Sequence[Call], layers: Sequence[str]) -> list[Tensor]:
    known = {call.name: call.output for call in calls}
    for name in layers:
        if name not in known:
            raise ValueError(f"layers names {name!r}, which was not called; these were: {', '.join(known)}.")
    if len(layers) < _POINTS:
        raise ValueError(
            f"layers must name at least {_POINTS} modules, for two points lie on a line; got {list(layers)}."
        )
    return [_flat(known[name]) for name in layers]


@dataclass(frozen=True)
class _Series:
    """The calls that a track goes through, and whether it begins with what goes into the first."""

    calls: list[Call]
    from_input: bool

    def __len__(self) -> int:
        return len(self.calls) + self.from_input

    def points(self) -> list[Tensor]:
        given = self.calls[0].input
        before = [given] if self.from_input and given is not None else []
        return [_flat(point) for point in (*before, *(call.output for call in self.calls))]


def _chosen(calls: Sequence[Call]) -> list[_Series]:
    # The output of a block may be that of its last part, which is no track of its own then.
    blocks = [call for call in calls if any(True for _ in call.module.children())]
    single = [call for call in calls if call not in blocks and not call.passes_on]
    weighted = [call for call in single if isinstance(call.module, WEIGHTED)]
    others = [call for call in single if call not in weighted]
    found = _of_one_class(blocks, from_input=True) or _of_one_class(others) or _of_one_class(weighted)
    if not found and weighted:
        found = [series for series in [_Series(weighted, _takes_samples(weighted[0]))] if len(series) >= _POINTS]
    if not found:
        raise ValueError(
            "The network has no three layers that a track could go through; if it calls three modules, name them in layers=."
        )
    return found


def _of_one_class(calls: Sequence[Call], *, from_input: bool = False) -> list[_Series]:
    """Return the tracks through the class of modules that has the most points, one for each size; of two such classes the later one."""
    best: list[_Series] = []
    for kind in {type(call.module): None for call in calls}:
        # Of modules that give out the same, such as one Sequential at the end of another, the first is the point.
        first: dict[str, Call] = {}
        for call in calls:
            if type(call.module) is kind:
                first.setdefault(call.origin, call)
        sizes: dict[int, list[Call]] = {}
        for call in first.values():
            sizes.setdefault(call.size, []).append(call)
        found = [_Series(series, from_input and _takes_samples(series[0], size=size)) for size, series in sizes.items()]
        found = [series for series in found if len(series) >= _POINTS]
        if found and sum(map(len, found)) >= sum(map(len, best)):
            best = found
    return best


def _takes_samples(call: Call, size: int | None = None) -> bool:
    """Return whether what goes into a module is of the same samples, and of a size if one is asked for."""
    if call.input is None or len(call.input) != len(call.output):
        return False
    return size is None or call.input[0].numel() == size


def _flat(points: Tensor) -> Tensor:
    return points.flatten(1).float()


def _reduced(points: Tensor) -> Tensor:
    """Return points in no more coordinates than there are points, at the same distances."""
    if points.shape[1] <= len(points):
        return points
    found: Tensor = torch.linalg.qr(points.T, mode="r").R.T
    return found
