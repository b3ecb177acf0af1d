"""What the commands align and merge share: their networks, and the alignment of two."""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_rebasin.alignment import Alignment, align
from lit_rebasin.cli.checkpoints import load_weights, open_checkpoint
from lit_rebasin.cli.command_line import PICTURES, Words, check_data
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.examples import Examples, check_labels, read_examples
from lit_rebasin.cli.files import check_target
from lit_rebasin.cli.network import Example, Traced, build, example_input, imported, runs, trace
from lit_rebasin.cli.progress import working
from lit_rebasin.symmetry import permute


@dataclass(frozen=True)
class Setting:
    """What is aligned or merged.

    Attributes:
        path: Import path of the architecture.
        files: The checkpoints.
        networks: One a checkpoint, in evaluation mode; in float64 if a checkpoint is, else as they are made.
        dtypes: Of each checkpoint's tensors, by the network's names.
        traced: Their symmetries.
        example: What they were traced on.
        examples: What ``--data`` holds.
    """

    path: str
    files: Sequence[str]
    networks: list[nn.Module]
    dtypes: list[dict[str, torch.dtype]]
    traced: Traced
    example: Example
    examples: Examples | None

    @property
    def inputs(self) -> list[Tensor]:
        """Batches of inputs."""
        return [batch[0] for batch in self.examples.batches] if self.examples is not None else []

    @property
    def labelled(self) -> list[tuple[Tensor, ...]] | None:
        """Batches of inputs and labels, if there are any."""
        return self.examples.batches if self.examples is not None and self.examples.labelled else None

    def as_written(self, network: nn.Module, index: int) -> dict[str, Any]:
        """Return the state dict of a network in the dtypes of a checkpoint.

        Raises:
            ValueError: If a tensor is not finite in it, as those of all checkpoints are.
        """
        dtypes = self.dtypes[index]
        written = {
            name: value.detach().to(dtypes[name]) if isinstance(value, Tensor) else value
            for name, value in network.state_dict().items()
        }
        for name in dict(network.named_parameters()).keys() & written.keys():
            if not written[name].isfinite().all():
                raise ValueError(
                    f"{name!r} comes to NaN or infinity in {written[name].dtype}, so nothing is written; the weights of "
                    f"{', '.join(self.files)} are too large, or too unlike"
                )
        return written


def prepare(command: str, words: Words) -> Setting:
    """Load every checkpoint into the architecture, read the data, and trace the symmetries of the last one."""
    options = words.options
    target = imported(options.model)
    checkpoints = [open_checkpoint(file) for file in options.checkpoints]
    built = build(command, options.model, target, words.model, checkpoints[0].arguments).eval()
    if any(_is_double(value) for checkpoint in checkpoints for value in checkpoint.weights.values()):
        built = built.double()
    networks, held = [], []
    for checkpoint in checkpoints:
        networks.append(copy.deepcopy(built))
        held.append(load_weights(networks[-1], checkpoint))
        _check_finite(networks[-1], checkpoint.file)
    dtype = next((p.dtype for p in built.parameters() if p.is_floating_point()), torch.float32)
    examples = read_examples(options.data, options.batch_size, dtype, options.seed) if options.data else None
    if options.figure is not None and examples is not None and not examples.labelled:
        raise UsageError(f"--figure draws the loss along the path, which needs the labels y in {examples.file}")
    if examples is not None and examples.labelled and len(networks) == 2:
        check_target("--figure", options.picture, PICTURES, options.overwrite)
    example = _example(command, options.input, examples, dtype)
    with working("tracing the network"):
        traced = trace(options.model, networks[-1], example)
    if examples is not None and not runs(networks[-1], _of(examples)):
        raise UsageError(f"{options.model} does not run on {_of(examples).origin}")
    if examples is not None and examples.labelled:
        check_labels(networks[-1], options.model, examples)
    dtypes = [{name: value.dtype for name, value in one.items() if isinstance(value, Tensor)} for one in held]
    return Setting(options.model, options.checkpoints, networks, dtypes, traced, example, examples)


def _is_double(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _check_finite(network: nn.Module, file: str) -> None:
    parameters = dict(network.named_parameters())
    for name, tensor in [*parameters.items(), *network.named_buffers()]:
        if tensor.isnan().any() or (name in parameters and tensor.isinf().any()):
            raise UsageError(f"tensor {name!r} of checkpoint {file} holds a NaN or an infinity")


def _example(command: str, texts: Sequence[str], examples: Examples | None, dtype: torch.dtype) -> Example:
    """Return what the network is traced on: ``--input``, or two examples of the data."""
    if texts:
        example = example_input(command, texts)
        args = tuple(value.to(dtype) if value.is_floating_point() else value for value in example.args)
        kwargs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in example.kwargs.items()}
        return Example(args, kwargs)
    if examples is None:
        raise UsageError(
            f"{command} needs the shape of an example input, such as --input 1,3,224,224, or --data FILE.npz"
        )
    return _of(examples)


def _of(examples: Examples) -> Example:
    """Return two examples of the data, which is enough to tell what can be longer."""
    inputs = examples.batches[0][0]
    return Example((inputs[:2],), {}, f"x of {examples.file}, here {tuple(inputs.shape)} of {inputs.dtype}")


def align_pair(
    setting: Setting, options: argparse.Namespace, chosen: dict[str, Any], alpha: float = 0.5
) -> tuple[Alignment, nn.Module]:
    """Return how the first network is carried towards the second, and the first one moved.

    Args:
        setting: The two networks.
        options: Of the command line.
        chosen: What `pair_options` returned.
        alpha: Weight of the reference in the incremental cost.
    """
    check_data(options, labelled=setting.labelled is not None)
    model, reference = setting.networks
    with working(f"aligning: {options.method}"):
        alignment = align(
            model,
            reference,
            method=options.method,
            spec=setting.traced.spec,
            data=setting.examples.batches if setting.examples else None,
            cost=options.cost,
            init=options.init,
            alpha=alpha,
            seed=options.seed,
            **chosen,
        )
    return alignment, permute(model, setting.traced.spec, alignment.permutations)
