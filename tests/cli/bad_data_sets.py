"""Data sets that are half there."""

import numpy as np

from .bad_inputs import (
    BENCHMARK,
    FIT,
    BadInput,
    Planted,
    all_of,
    arrays,
    directory,
    idx,
    nothing,
    packed,
    planted,
    removed,
    text,
    truncated,
)

_RAW = "data/MNIST/raw"
_DRAWS = np.random.default_rng(0)
_IMAGES, _LABELS = _DRAWS.integers(0, 256, (40, 28, 28)), np.arange(40) % 10
_FILES = {
    f"{_RAW}/{part}-{name}.gz": packed(idx(content))
    for part in ("train", "t10k")
    for name, content in (("images-idx3-ubyte", _IMAGES), ("labels-idx1-ubyte", _LABELS))
}
_TRAIN, _TARGETS = f"{_RAW}/train-images-idx3-ubyte.gz", f"{_RAW}/train-labels-idx1-ubyte.gz"
whole_mnist = all_of(*(text(name, content) for name, content in _FILES.items()))
_OF_MNIST = ["--data.benchmark=rotated-mnist", "--model.backbone.input_size=784", "--data_dir=data"]


def _mnist(name, prepare, says, command=FIT):
    return BadInput(f"MNIST with {name}", all_of(whole_mnist, prepare), [*command, *_OF_MNIST], says)


_HUGE = bytes([0, 0, 8, 3]) + np.array([2**30, 2**30, 28], ">i4").tobytes()
MNIST = [
    _mnist("images that are truncated", truncated(_TRAIN), "train-images-idx3-ubyte.gz is damaged"),
    _mnist(
        "images that are truncated, of a benchmark",
        truncated(_TRAIN),
        "train-images-idx3-ubyte.gz is damaged",
        BENCHMARK,
    ),
    _mnist("images that are empty", text(_TRAIN, ""), "train-images-idx3-ubyte.gz is damaged"),
    _mnist("a page of HTML for images", text(_TRAIN, "<html>404</html>"), "train-images-idx3-ubyte.gz is damaged"),
    _mnist(
        "images that are damaged within",
        text(_TRAIN, packed(idx(_IMAGES))[:-9] + bytes(9)),
        "train-images-idx3-ubyte.gz is damaged",
    ),
    _mnist(
        "fewer images than are promised",
        text(_TRAIN, packed(idx(_IMAGES)[:-784])),
        "train-images-idx3-ubyte.gz is damaged",
    ),
    _mnist("more images than memory", text(_TRAIN, packed(_HUGE)), "train-images-idx3-ubyte.gz is damaged"),
    _mnist(
        "images of another type",
        text(_TRAIN, packed(idx(_IMAGES, kind=13))),
        "train-images-idx3-ubyte.gz .*not an IDX file",
    ),
    _mnist(
        "a wrong magic number",
        text(_TRAIN, packed(b"\x93NUM" + idx(_IMAGES)[4:])),
        "train-images-idx3-ubyte.gz .*not an IDX file",
    ),
    _mnist(
        "unpacked images that are truncated",
        text(_TRAIN[:-3], idx(_IMAGES)[:999]),
        "train-images-idx3-ubyte is damaged",
    ),
    _mnist("a folder for images", directory(_TRAIN), "MNIST was not found under data"),
    _mnist("no labels", removed(_TARGETS), "MNIST was not found under data"),
    _mnist("labels that are images", text(_TARGETS, packed(idx(_IMAGES))), "train-labels-idx1-ubyte.gz"),
    _mnist("images that are labels", text(_TRAIN, packed(idx(_LABELS))), "train-images-idx3-ubyte.gz"),
    _mnist("fewer labels than images", text(_TARGETS, packed(idx(_LABELS[:30]))), "30 labels for 40 images"),
    _mnist(
        "labels that are no digit",
        text(_TARGETS, packed(idx(_LABELS + 7))),
        "train-labels-idx1-ubyte.gz holds labels that are no class from 0 to 9",
    ),
    _mnist("images of another size", text(_TRAIN, packed(idx(_IMAGES[:, :20]))), "does not take images of 1 x 20 x 28"),
    _mnist("a pickle with code", planted(_TRAIN[:-3]), "train-images-idx3-ubyte is damaged"),
    BadInput(
        "MNIST that is missing", nothing, [*FIT, *_OF_MNIST], "MNIST was not found under data: put its four files"
    ),
    BadInput(
        "Fashion-MNIST that is missing",
        whole_mnist,
        [*FIT, *_OF_MNIST, "--data.benchmark=rotated-fashion-mnist"],
        "FashionMNIST was not found under data",
    ),
    BadInput("a file for the folder of data", text("data"), [*FIT, *_OF_MNIST], "MNIST was not found under data"),
]

_BATCH = "data/cifar-10-batches-py/data_batch_1"
_OF_CIFAR = ["--data.benchmark=split-cifar10", "--model.backbone.input_size=3072", "--data_dir=data"]
CIFAR = [
    BadInput(f"CIFAR-10 {name}", prepare, [*FIT, *_OF_CIFAR], says)
    for name, prepare, says in [
        ("that is missing", nothing, "CIFAR10 was not found under data: put its folder cifar-10-batches-py there"),
        ("with an empty folder", directory("data/cifar-10-batches-py"), "CIFAR10 under data is incomplete or damaged"),
        ("with one batch of five", text(_BATCH), "CIFAR10 under data is incomplete or damaged"),
        ("with code", planted(_BATCH), "CIFAR10 under data is incomplete or damaged"),
        ("with its archive alone", text("data/cifar-10-python.tar.gz"), "CIFAR10 was not found under data"),
    ]
]

_X, _Y = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 10
_WHOLE = {"x_train": _X, "y_train": _Y, "x_test": _X, "y_test": _Y}
ARRAYS = [
    BadInput(
        f"arrays {name}",
        all_of(arrays("d.npz", **_WHOLE), prepare),
        [*FIT, "--data.benchmark=arrays", "--data_dir=d.npz"],
        says,
    )
    for name, prepare, says in [
        ("that are truncated", truncated("d.npz"), "d.npz is not a readable .npz"),
        ("that are cut off by a byte", truncated("d.npz", 0.999), "d.npz is not a readable .npz"),
        ("that are empty", text("d.npz", ""), "d.npz is not a readable .npz"),
        ("that are missing", removed("d.npz"), "There is no file d.npz"),
        ("in a folder", directory("d.npz"), "There is no file d.npz"),
        (
            "without labels",
            arrays("d.npz", x_train=_X, x_test=_X),
            "d.npz lacks y_train, y_test; it holds x_train, x_test",
        ),
        (
            "of objects with code",
            arrays("d.npz", **{**_WHOLE, "x_train": np.array([Planted()], dtype=object)}),
            "x_train is an array of Python objects",
        ),
        ("that are a pickle with code", planted("d.npz"), "d.npz is not a readable .npz"),
        (
            "with fewer labels",
            arrays("d.npz", **{**_WHOLE, "y_train": _Y[:9]}),
            "x_train has 20 examples and y_train 9",
        ),
        ("with labels of fractions", arrays("d.npz", **{**_WHOLE, "y_train": _Y / 2}), "y_train must be class indices"),
        ("with labels below 0", arrays("d.npz", **{**_WHOLE, "y_train": _Y - 1}), "y_train must be class indices"),
        (
            "with NaN",
            arrays("d.npz", **{**_WHOLE, "x_train": np.full((20, 8, 8), np.nan)}),
            "x_train holds NaN or infinity",
        ),
        ("of words", arrays("d.npz", **{**_WHOLE, "x_train": np.array(["a"] * 20)}), "x_train must hold numbers"),
        (
            "of nothing",
            arrays("d.npz", **{name: value[:0] for name, value in _WHOLE.items()}),
            "x_train has 0 examples",
        ),
        (
            "of images without pixels",
            arrays("d.npz", **{**_WHOLE, "x_train": _X[:, :0], "x_test": _X[:, :0]}),
            r"x_train must be images .* got uint8 \(20, 1, 0, 8\)",
        ),
        (
            "with a label of a million million",
            arrays("d.npz", **{**_WHOLE, "y_train": np.where(_Y == 3, 10**12, _Y)}),
            "y_train names the class 1000000000000; classes are counted",
        ),
    ]
]

ROWS = [*MNIST, *CIFAR, *ARRAYS]
