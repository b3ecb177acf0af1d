"""Benchmarks by name: streams of tasks as whole tensors.

The tasks are those of Avalanche's classic benchmarks (same class orders, permutations and normalisation for the same seed); what changes is
that a transform is applied once a task to a whole tensor, not once a sample and epoch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import rotate

from lit_rebasin.continual.datasets import Arrays, load_cifar, load_mnist, load_npz

Scenario = Literal["domain", "class", "task"]


@dataclass(frozen=True)
class TaskRecipe:
    """How a task is made of the base data: which examples, which transform of the images, which new labels."""

    train: Tensor | None = None
    test: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Stream:
    """The ordered tasks of a benchmark.

    Attributes:
        name: Name of the benchmark.
        scenario: ``"domain"`` (same classes, other images), ``"class"`` (other classes, one head) or ``"task"`` (a head a task).
        n_classes: Outputs of a head.
        base: Training and test images and labels of the whole benchmark, images ``(N, C, H, W)`` in uint8 or float.
        recipes: One a task.
        mean: Of the pixels in [0, 1], by channel, subtracted after the transform.
        std: By channel.
    """

    name: str
    scenario: Scenario
    n_classes: int
    base: Arrays
    recipes: tuple[TaskRecipe, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape ``(C, H, W)`` of an image."""
        return tuple(self.base.x_train.shape[1:])

    def train(self, task: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the training images ``(N, C, H, W)`` in float32 and labels ``(N,)`` of a task, all or those of the indices ``chosen``."""
        recipe = self.recipes[task]
        return self._make(self.base.x_train, self.base.y_train, _composed(recipe.train, chosen), recipe)

    def test(self, task: int) -> tuple[Tensor, Tensor]:
        """Return the test images and labels of a task."""
        recipe = self.recipes[task]
        return self._make(self.base.x_test, self.base.y_test, recipe.test, recipe)

    def train_labels(self, task: int) -> Tensor:
        """Return the training labels ``(N,)`` of a task, without making its images."""
        recipe = self.recipes[task]
        return self._labels(self.base.y_train, recipe.train, recipe)

    def _make(self, x: Tensor, y: Tensor, chosen: Tensor | None, recipe: TaskRecipe) -> tuple[Tensor, Tensor]:
        part = x if chosen is None else x[chosen]
        images = part.float().div_(255) if x.dtype == torch.uint8 else part.float()
        if recipe.transform is not None:
            images = recipe.transform(images)
        shape = (1, -1, *[1] * (x.ndim - 2))
        images = (images - torch.tensor(self.mean).view(shape)).div_(torch.tensor(self.std).view(shape))
        return images, self._labels(y, chosen, recipe)

    def _labels(self, y: Tensor, chosen: Tensor | None, recipe: TaskRecipe) -> Tensor:
        part = y if chosen is None else y[chosen]
        return part if recipe.labels is None else recipe.labels[part]


def _composed(outer: Tensor | None, inner: Tensor | None) -> Tensor | None:
    """Return the indices of a choice within a choice; ``None`` chooses all."""
    return inner if outer is None else outer if inner is None else outer[inner]


def make_stream(
    benchmark: str, n_tasks: int | None, scenario: Scenario | None, data_dir: str | None, download: bool, seed: int
) -> Stream:
    """Build a benchmark by name.

    Args:
        benchmark: A key of `BENCHMARKS`.
        n_tasks: Number of tasks. ``None``: the benchmark's own.
        scenario: ``None``: the benchmark's own.
        data_dir: Folder of the data set, or the file of ``arrays``.
        download: Fetch a data set that is missing.
        seed: Of class orders, permutations and splits; digits and rotations do not depend on it.

    Raises:
        ValueError: If an argument does not fit the benchmark.
        FileNotFoundError: If the data set is not there.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {benchmark!r}.")
    if n_tasks is not None and n_tasks < 1:
        raise ValueError(f"n_tasks must be at least 1, got {n_tasks}.")
    build, default_tasks, scenarios = BENCHMARKS[benchmark]
    chosen = scenario or scenarios[0]
    if chosen not in scenarios:
        raise ValueError(f"scenario of {benchmark} must be one of {', '.join(scenarios)}, got {chosen!r}.")
    return build(benchmark, n_tasks or default_tasks, chosen, data_dir, download, seed)


def rotation(angle: float, *, smooth: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a transform that rotates every image counter-clockwise by ``angle`` degrees, the corners filled with 0."""
    mode = InterpolationMode.BILINEAR if smooth else InterpolationMode.NEAREST
    return partial(rotate, angle=angle, interpolation=mode)


def pixel_permutation(order: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a transform that reorders the pixels of every image."""
    return partial(_reordered, order=order)


def _reordered(images: Tensor, order: Tensor) -> Tensor:
    return images.flatten(1)[:, order].reshape(images.shape)


def _rotated_digits(
    name: str, n_tasks: int, scenario: Scenario, data_dir: str | None, download: bool, seed: int
) -> Stream:
    """Scikit-learn's 1,797 scans of 8 x 8 pixels, a fixed stratified fifth of them for the test."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    rest, held = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    base = Arrays(images[rest], labels[rest], images[held], labels[held])
    mean, std = float(base.x_train.mean()), float(base.x_train.std())
    # Nearest-pixel rotation would tear 8 x 8 images apart.
    recipes = [TaskRecipe(transform=rotation(angle, smooth=True)) for angle in np.linspace(0, 180, n_tasks).tolist()]
    return Stream(name, scenario, 10, base, tuple(recipes), (mean,), (std,))


def _rotated(name: str, n_tasks: int, scenario: Scenario, data_dir: str | None, download: bool, seed: int) -> Stream:
    base, mean, std = _mnist(name, data_dir, download)
    recipes = [TaskRecipe(transform=rotation(angle)) for angle in np.linspace(0, 180, n_tasks).tolist()]
    return Stream(name, scenario, 10, base, tuple(recipes), mean, std)


def _permuted_mnist(
    name: str, n_tasks: int, scenario: Scenario, data_dir: str | None, download: bool, seed: int
) -> Stream:
    base, mean, std = _mnist(name, data_dir, download)
    draws = np.random.RandomState(seed)
    orders = [torch.from_numpy(draws.permutation(784)) for _ in range(n_tasks)]
    recipes = tuple(TaskRecipe(transform=pixel_permutation(order)) for order in orders)
    return Stream(name, scenario, 10, base, recipes, mean, std)


def _split_mnist(
    name: str, n_tasks: int, scenario: Scenario, data_dir: str | None, download: bool, seed: int
) -> Stream:
    base, mean, std = _mnist(name, data_dir, download)
    return _split(name, n_tasks, scenario, base, mean, std, seed)


def _split_cifar(
    name: str, n_tasks: int, scenario: Scenario, data_dir: str | None, download: bool, seed: int
) -> Stream:
    base = load_cifar(10 if name == "split-cifar10" else 100, data_dir, download)
    mean, std = _CIFAR[name]
    return _split(name, n_tasks, scenario, base, mean, std, seed)


def _arrays(name: str, n_tasks: int, scenario: Scenario, data_dir: str | None, download: bool, seed: int) -> Stream:
    base = load_npz(data_dir)
    scaled = base.x_train.float() / (255 if base.x_train.dtype == torch.uint8 else 1)
    dims = [dim for dim in range(scaled.ndim) if dim != 1]
    mean = tuple(scaled.mean(dims).tolist())
    several = scaled[:, 0].numel() > 1  # a single pixel has no deviation
    std = tuple(scaled.std(dims, correction=int(several)).clamp_min(1e-6).tolist())
    if scenario != "domain":
        return _split(name, n_tasks, scenario, base, mean, std, seed)
    generator = torch.Generator().manual_seed(seed)
    n_classes = int(base.y_train.max()) + 1
    parts = [
        [part.sort().values for part in torch.randperm(len(y), generator=generator).tensor_split(n_tasks)]
        for y in (base.y_train, base.y_test)
    ]
    recipes = tuple(TaskRecipe(train, test) for train, test in zip(*parts, strict=True))
    return Stream(name, scenario, n_classes, base, recipes, mean, std)


def _split(
    name: str,
    n_tasks: int,
    scenario: Scenario,
    base: Arrays,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> Stream:
    """Give each task classes of its own, in Avalanche's order for the seed; a remainder goes to the last tasks.

    Labels that no training example has are of no class.
    """
    present = base.y_train.unique()
    missing = base.y_test[~torch.isin(base.y_test, present)]
    if len(missing):
        raise ValueError(
            f"{name}: y_test holds class {int(missing[0])}, which y_train lacks, so it is of no task: leave its examples out."
        )
    if n_tasks > len(present):
        raise ValueError(
            f"{name} has {len(present)} classes, which cannot be split over n_tasks={n_tasks}: pass {len(present)} or fewer."
        )
    order = present[torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))]
    counts = [len(present) // n_tasks + (task >= n_tasks - len(present) % n_tasks) for task in range(n_tasks)]
    n_outputs = int(present.max()) + 1
    recipes = []
    for classes in order.split(counts):
        labels = None
        if scenario == "task":
            labels = torch.full((n_outputs,), -1)
            labels[classes] = torch.arange(len(classes))
        chosen = [torch.isin(y, classes).nonzero()[:, 0] for y in (base.y_train, base.y_test)]
        recipes.append(TaskRecipe(chosen[0], chosen[1], labels=labels))
    return Stream(name, scenario, max(counts) if scenario == "task" else n_outputs, base, tuple(recipes), mean, std)


def _mnist(name: str, data_dir: str | None, download: bool) -> tuple[Arrays, tuple[float, ...], tuple[float, ...]]:
    if name == "rotated-fashion-mnist":
        return load_mnist("FashionMNIST", data_dir, download), (0.2860,), (0.3530,)
    return load_mnist("MNIST", data_dir, download), (0.1307,), (0.3081,)


_CIFAR = {
    "split-cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "split-cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

_Build = Callable[[str, int, Scenario, str | None, bool, int], Stream]
# Name -> builder, default number of tasks, scenarios with the default first.
BENCHMARKS: dict[str, tuple[_Build, int, tuple[Scenario, ...]]] = {
    "rotated-digits": (_rotated_digits, 5, ("domain",)),
    "rotated-mnist": (_rotated, 20, ("domain",)),
    "permuted-mnist": (_permuted_mnist, 20, ("domain",)),
    "split-mnist": (_split_mnist, 5, ("class", "task")),
    "rotated-fashion-mnist": (_rotated, 20, ("domain",)),
    "split-cifar10": (_split_cifar, 5, ("class", "task")),
    "split-cifar100": (_split_cifar, 20, ("class", "task")),
    "arrays": (_arrays, 5, ("class", "task", "domain")),
}
