"""Three checkpoints or more merged into one."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_rebasin.cli.checkpoints import SUFFIXES, write_checkpoint
from lit_rebasin.cli.command_line import Words, check_method, method_options
from lit_rebasin.cli.correction import correction
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.examples import loss_and_accuracy
from lit_rebasin.cli.files import check_target
from lit_rebasin.cli.matching import Setting, prepare
from lit_rebasin.cli.path_report import Row, console, letter, merge_rows, number, percent, print_files, print_table
from lit_rebasin.cli.progress import working
from lit_rebasin.merging import has_batch_norm, merge_many
from lit_rebasin.merging.many import METHODS
from lit_rebasin.merging.path import weights_of, write_weights
from lit_rebasin.symmetry import permute


def merge_several(words: Words) -> None:
    """Bring many checkpoints into the frame of the first, and average them."""
    options = words.options
    options.method = options.method or METHODS[0]
    check_method(options, METHODS)
    for name in ("alpha", "cost", "init", "figure"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} is for two checkpoints, got {len(options.checkpoints)}")
    chosen = method_options(merge_many, options.method, words.method)
    check_target("--output", options.output, SUFFIXES, options.overwrite)
    setting = prepare("merge", words)
    corrected = correction(options.statistics, setting)
    with working(f"merging: {options.method}"):
        found = merge_many(setting.networks, setting.traced.spec, method=options.method, seed=options.seed, **chosen)
    merged = copy.deepcopy(setting.networks[0])
    write_weights(merged, found.weights)
    members = [
        permute(weights_of(network), setting.traced.spec, own)
        for network, own in zip(setting.networks, found.permutations, strict=True)
    ]
    aligned = copy.deepcopy(merged)
    corrected.of_many(merged, members)
    columns, networks = ["as they are", "aligned"], [_average(setting.networks), aligned]
    if corrected.name != "none":
        columns, networks = [*columns, f"aligned, {corrected.name}"], [*networks, merged]
    blank = [""] * (len(columns) - 2)
    rows: list[Row] = [("spread of the weights", number(found.history[0]), number(min(found.history)), *blank)]
    if setting.examples is not None and setting.examples.labelled:
        rows += _member_rows(setting, len(columns)) + merge_rows(setting.examples, networks)
    write_checkpoint(Path(options.output), setting.as_written(merged, 0))
    print_files(setting)
    end = "" if found.converged else "; it did not come to its end within its steps"
    console().print(
        f"{found.method}: {len(found.permutations)} checkpoints in the frame of A, in {found.seconds:.2f} s{end}."
    )
    console().print(f"statistics: {corrected.name}")
    if corrected.name == "none" and has_batch_norm(merged):
        console().print("Those of BatchNorm are averages of the members'; with --data, they are estimated anew.")
    print_table("merge", columns, rows)
    console().print(f"The merge: {options.output}")


def _member_rows(setting: Setting, columns: int) -> list[Row]:
    """Return loss and accuracy of each checkpoint, which no permutation changes."""
    rows: list[Row] = []
    for index, network in enumerate(setting.networks):
        assert setting.examples is not None
        loss, share = loss_and_accuracy(network, setting.examples)
        cells = ((f"loss of {letter(index)}", number(loss)), (f"accuracy of {letter(index)} %", percent(share)))
        rows += [(*cell, *[""] * (columns - 1)) for cell in cells]
    return rows


def _average(networks: list[nn.Module]) -> nn.Module:
    """Return the plain average of networks; counters are the first one's."""
    average = copy.deepcopy(networks[0])
    weights = [weights_of(network) for network in networks]
    mean: dict[str, Tensor] = {
        name: torch.stack([one[name] for one in weights]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in weights[0].items()
    }
    write_weights(average, mean)
    return average
