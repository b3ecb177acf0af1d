"""Read whole data sets into tensors."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from lit_rebasin.merging.npz_file import read_npz


@dataclass(frozen=True)
class Arrays:
    """Images ``(N, C, H, W)``, in uint8 or float, and labels ``(N,)`` for training and test."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


_LARGEST_CLASS = 10**6 - 1  # a network has an output for each class up to the largest
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load_mnist(name: str, data_dir: str | None, download: bool) -> Arrays:
    """Read MNIST or FashionMNIST from ``data_dir/NAME/raw``, packed (.gz) or not; the folder may be read-only.

    Raises:
        FileNotFoundError: If the files are not there.
        ConnectionError: If they could not be downloaded.
    """
    root = Path(data_dir or "data")
    raw = root / name / "raw"
    paths = [_packed_or_not(raw / file) for file in _FILES]
    if any(path is None for path in paths):
        if not download:
            raise FileNotFoundError(
                f"{name} was not found under {root}: put its four files ({_FILES[0]}.gz, ...) into {raw}, "
                "point data_dir at the folder that holds it, or pass download=True."
            )
        _download(getattr(datasets, name), name, root)
        paths = [_packed_or_not(raw / file) for file in _FILES]
    x_train, y_train, x_test, y_test = (
        _read_idx(path, ndim) for path, ndim in zip(paths, (3, 1, 3, 1), strict=True) if path
    )
    for x, y, path in ((x_train, y_train, paths[1]), (x_test, y_test, paths[3])):
        if len(x) != len(y):
            raise ValueError(
                f"{path} holds {len(y)} labels for {len(x)} images: one of the two files is damaged; get both anew."
            )
        if len(y) == 0 or y.max() > 9:
            raise ValueError(f"{path} holds labels that are no class from 0 to 9: it is damaged; get it anew.")
    return Arrays(x_train.unsqueeze(1), y_train.long(), x_test.unsqueeze(1), y_test.long())


def load_cifar(n_classes: int, data_dir: str | None, download: bool) -> Arrays:
    """Read CIFAR-10 or CIFAR-100 in torchvision's layout from ``data_dir``.

    Raises:
        FileNotFoundError: If the files are not there.
        ConnectionError: If they could not be downloaded.
    """
    name = f"CIFAR{n_classes}"
    root = Path(data_dir or "data")
    kind = getattr(datasets, name)
    if not (root / kind.base_folder).is_dir():
        if not download:
            raise FileNotFoundError(
                f"{name} was not found under {root}: put its folder {kind.base_folder} there, "
                "point data_dir at the folder that holds it, or pass download=True."
            )
        _download(kind, name, root)
    try:
        parts = [kind(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(f"{name} under {root} is incomplete or damaged: {error}") from None
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return Arrays(images[0], labels[0], images[1], labels[1])


def load_npz(path: str | None) -> Arrays:
    """Read a user's ``.npz`` with ``x_train, y_train, x_test, y_test``.

    Images are ``(N, H, W)``, ``(N, H, W, C)`` with 1 or 3 channels, or ``(N, C, H, W)``, in uint8 or floating point.

    Raises:
        ValueError: If ``path`` is missing, a key or a shape is wrong, or a label is not a class index.
        FileNotFoundError: If there is no such file.
    """
    if path is None:
        raise ValueError(
            "The benchmark 'arrays' needs data_dir, the path of an .npz with x_train, y_train, x_test and y_test."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}; data_dir of the benchmark 'arrays' is the path of an .npz.")
    keys = ("x_train", "y_train", "x_test", "y_test")
    found, names = read_npz(path, keys)
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(names) or 'nothing'}.")
    images = {part: _images(found[f"x_{part}"], f"x_{part}", path) for part in ("train", "test")}
    labels = {part: _labels(found[f"y_{part}"], f"y_{part}", path) for part in ("train", "test")}
    for part in ("train", "test"):
        if len(images[part]) != len(labels[part]) or len(labels[part]) == 0:
            raise ValueError(
                f"{path}: x_{part} has {len(images[part])} examples and y_{part} {len(labels[part])}; they must be equal, above 0."
            )
    if images["train"].dtype != images["test"].dtype:
        raise ValueError(
            f"{path}: x_train is {found['x_train'].dtype} and x_test {found['x_test'].dtype}, but uint8 is scaled from 0..255 to 0..1 and "
            "floating point is not; save both alike."
        )
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise ValueError(f"{path}: x_train and x_test hold images of different shapes.")
    if labels["test"].max() > labels["train"].max():
        raise ValueError(
            f"{path}: y_test holds class {int(labels['test'].max())}, beyond the largest of y_train, {int(labels['train'].max())}."
        )
    return Arrays(images["train"], labels["train"], images["test"], labels["test"])


def _images(x: np.ndarray, key: str, path: str) -> Tensor:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or 0 in x.shape[1:] or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        raise ValueError(
            f"{path}: {key} must be images (N, H, W), (N, H, W, C) or (N, C, H, W) in uint8 or floating point, got {x.dtype} {x.shape}."
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: {key} holds NaN or infinity; replace or drop those images.")
    images = torch.from_numpy(np.ascontiguousarray(x))
    return images if x.dtype == np.uint8 else images.float()


def _labels(y: np.ndarray, key: str, path: str) -> Tensor:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or (len(y) > 0 and y.min() < 0):
        raise ValueError(f"{path}: {key} must be class indices (N,), integers from 0, got {y.dtype} {y.shape}.")
    if len(y) > 0 and y.max() > _LARGEST_CLASS:
        raise ValueError(
            f"{path}: {key} names the class {y.max()}; classes are counted from 0, up to {_LARGEST_CLASS}."
        )
    return torch.from_numpy(y.astype(np.int64))


def _packed_or_not(path: Path) -> Path | None:
    candidates = [path, path.with_name(path.name + ".gz")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_idx(path: Path, ndim: int) -> Tensor:
    """Read an IDX file of bytes: two zeros, the type 8, the number of dimensions, their big-endian lengths, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError(
                f"it begins with {content[:4]!r}, and not as one of bytes in {ndim} dimension{'s' * (ndim > 1)}"
            )
        shape = np.frombuffer(content, ">i4", ndim, offset=4)
        data = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
        return torch.from_numpy(data.reshape(shape).copy())
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is damaged or not an IDX file: {error}; get it anew.") from None


def _download(kind: type, name: str, root: Path) -> None:
    try:
        kind(root, train=True, download=True)
        kind(root, train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"{name} could not be downloaded to {root} ({type(error).__name__}): get its files elsewhere and put them there."
        ) from None
