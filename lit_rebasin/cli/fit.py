"""One method over the stream, with checkpoints."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rebasin.cli.app import ContinualCLI, prepare_folder, set_threads
from lit_rebasin.cli.build import Run, build_run, log_outcome, write_record
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.methods import check_methods
from lit_rebasin.cli.report import print_accuracy

# Warnings of others about what is as it should be here.
HUSHED = (
    ".*LightningCLI's args parameter.*",
    ".*does not have many workers.*",
    "no QP solver found.*",  # qpsolvers, which Avalanche imports
    ".*LeafSpec.*is deprecated.*",  # Lightning's own use of torch
)


def run_fit(arguments: Sequence[str]) -> None:
    """Train one method over the stream, and print what is remembered of each task."""
    for message in HUSHED:
        warnings.filterwarnings("ignore", message=message)
    cli = ContinualCLI("fit", arguments)
    method, seed, path = cli.config.method, int(cli.config.seed_everything), cli.config.ckpt_path
    check_methods([method], 1, "fit")
    cli = cli.for_method(method)
    check_methods([method], cli.config.data.replay_per_class, "fit")
    set_threads(cli.config.threads)
    folder = prepare_folder(cli.config.output_dir) / "fit" / method / f"seed_{seed}"
    saves = cli.config.trainer.enable_checkpointing is not False
    savers = [ModelCheckpoint(folder / "checkpoints", filename="{epoch:03d}", save_last=True)] if saves else []
    run = build_run(cli, method, seed, folder, savers)
    if path not in (None, "last"):  # Lightning finds the last one only when it fits
        _check_checkpoint(run, path)
    write_record(cli, run, folder)
    run.trainer.fit(run.model, datamodule=run.data, ckpt_path=path)
    if print_accuracy(method, run.monitor.matrix, run.n_tasks, folder):
        log_outcome(run, run.monitor.matrix[: run.n_tasks, : run.n_tasks])


def _check_checkpoint(run: Run, path: str) -> None:
    """Refuse a file that is no checkpoint, or one of another run, before anything is written."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        states = checkpoint["callbacks"][run.record.state_key], checkpoint[type(run.data).__qualname__]
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except Exception:  # what torch raises for a file of another kind depends on the file
        raise UsageError(f"ckpt_path {path} is not a checkpoint of `lit-rebasin fit`, or it is damaged") from None
    run.record.load_state_dict(states[0])
    run.data.load_state_dict(states[1])
