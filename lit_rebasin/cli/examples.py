"""Examples of a user's ``.npz``, in batches as the network takes them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.merging.data import evaluating
from lit_rebasin.merging.npz_file import read_npz

_LARGEST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Examples:
    """Inputs, and labels if there are any, of a file.

    Attributes:
        file: Its path.
        batches: ``(inputs, labels)``, or ``(inputs,)``.
        labelled: Whether there are labels.
    """

    file: str
    batches: list[tuple[Tensor, ...]]
    labelled: bool


def read_examples(file: str, batch_size: int, dtype: torch.dtype, seed: int) -> Examples:
    """Read the arrays ``x`` and, if it is there, ``y``: one example a row, shuffled once.

    Args:
        file: The ``.npz``.
        batch_size: The most examples in a batch; batches are of even size, for BatchNorm cannot estimate from a last one of a single example.
        dtype: What inputs of floating point are brought to; whole numbers become int64, as embeddings take them.
        seed: Of the order.

    Raises:
        UsageError: If the file cannot be read, or an array is missing or does not fit.
    """
    if not Path(file).is_file():
        raise UsageError(f"there is no file {file} for --data")
    try:
        arrays, names = read_npz(file, ("x", "y"))
    except ValueError as error:
        raise UsageError(f"--data {error}") from None
    if "x" not in arrays:
        raise UsageError(f"--data {file} lacks the array x; it holds {', '.join(names) or 'nothing'}")
    for name, array in arrays.items():
        if not np.isfinite(array).all() or (array.dtype.kind == "u" and array.size and array.max() > _LARGEST):
            raise UsageError(f"--data {file}: {name} must hold finite numbers, whole ones up to {_LARGEST}")
    inputs, labels = arrays["x"], arrays.get("y")
    if inputs.ndim == 0 or len(inputs) == 0:
        raise UsageError(f"--data {file}: x holds no examples")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    columns = [torch.from_numpy(inputs).to(dtype if inputs.dtype.kind == "f" else torch.int64)[order]]
    if not columns[0].isfinite().all():
        raise UsageError(f"--data {file}: x holds numbers that {dtype} of the network does not")
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.ndim == 0 or len(labels) != len(inputs) or labels.min() < 0:
            raise UsageError(f"--data {file}: y must hold one class index for each of the {len(inputs)} examples of x")
        columns.append(torch.from_numpy(labels.astype(np.int64))[order])
    count = -(-len(inputs) // batch_size)
    split = [column.tensor_split(count) for column in columns]
    return Examples(file, list(zip(*split, strict=True)), labels is not None)


def check_labels(network: nn.Module, path: str, examples: Examples) -> None:
    """Raise a `UsageError` unless the network's outputs are logits of the classes that the labels name."""
    inputs, labels = (column[:2] for column in examples.batches[0])
    with torch.no_grad(), evaluating(network):
        output = network(inputs)
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[:1] + output.shape[2:] != labels.shape:
        found = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UsageError(
            f"the output of {path} is {found}, which is not logits for y of {examples.file} (shape {tuple(labels.shape)}); "
            "leave y out to align without labels"
        )
    largest = max(int(batch[1].max()) for batch in examples.batches)
    if largest >= output.shape[1]:
        raise UsageError(f"y of {examples.file} names the class {largest}, but {path} has {output.shape[1]} classes")


def loss_and_accuracy(network: nn.Module, examples: Examples) -> tuple[float, float]:
    """Return the mean cross-entropy over all labels, and the share of them that the network gets right."""
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad(), evaluating(network):
        for inputs, labels in examples.batches:
            output = network(inputs)
            loss += float(cross_entropy(output, labels, reduction="sum"))
            correct += int((output.argmax(1) == labels).sum())
            count += labels.numel()
    return loss / count, correct / count
