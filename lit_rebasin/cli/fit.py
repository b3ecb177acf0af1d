"""One method over the stream, with checkpoints."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rebasin.cli.app import ContinualCLI, set_threads
from lit_rebasin.cli.build import Run, build_run, log_outcome
from lit_rebasin.cli.checks import check_per_method
from lit_rebasin.cli.endings import sigterm_left_to_lightning
from lit_rebasin.cli.methods import check_methods
from lit_rebasin.cli.output_folder import output_folder
from lit_rebasin.cli.report import print_accuracy
from lit_rebasin.cli.resume import check_settings
from lit_rebasin.cli.resumed_checkpoint import restoring
from lit_rebasin.cli.run_record import recorded

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
    method, seed = cli.config.method, int(cli.config.seed_everything)
    check_methods([method], 1, "fit")
    check_methods([method, *cli.config.per_method], 1, "benchmark")
    cli = cli.for_method(method)
    check_per_method(method, cli)
    check_methods([method], cli.config.data.replay_per_class, "fit")
    set_threads(cli.config.threads)
    with output_folder(cli.config.output_dir) as output:
        _fit(cli, method, seed, output / "fit" / method / f"seed_{seed}")


def _fit(cli: ContinualCLI, method: str, seed: int, folder: Path) -> None:
    saves = cli.config.trainer.enable_checkpointing is not False
    savers = [ModelCheckpoint(folder / "checkpoints", filename="{epoch:03d}", save_last=True)] if saves else []
    run = build_run(cli, method, seed, folder, savers)
    path = _checkpoint(cli, run)
    with recorded(cli, run, folder), restoring(run, path), sigterm_left_to_lightning():
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=path)
    if run.trainer.is_global_zero and print_accuracy(method, run.monitor.matrix, run.n_tasks, folder):
        log_outcome(run, run.monitor.matrix[: run.n_tasks, : run.n_tasks])


def _checkpoint(cli: ContinualCLI, run: Run) -> str | None:
    """Return the checkpoint from which to go on, if there is one, once it is seen to be of the run."""
    given: str | None = cli.config.ckpt_path
    if given is None:
        return None
    path = _last(run) if given == "last" else Path(given)
    if path is None:
        return given  # Lightning says that there is none, and begins
    check_settings(run, path)
    return str(path)


def _last(run: Run) -> Path | None:
    """Return the latest of the checkpoints that are called last."""
    savers = [one for one in run.trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.dirpath]
    found = [path for one in savers for path in Path(str(one.dirpath)).glob(f"{one.CHECKPOINT_NAME_LAST}*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
