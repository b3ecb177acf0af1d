"""One method over the stream, with checkpoints."""

import warnings
from collections.abc import Sequence

from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rebasin.cli.app import ContinualCLI, build_run, log_outcome, prepare_folder, set_threads
from lit_rebasin.cli.methods import check_methods
from lit_rebasin.cli.report import print_accuracy


def run_fit(arguments: Sequence[str]) -> None:
    """Train one method over the stream, and print the accuracy matrix."""
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    cli = ContinualCLI("fit", arguments)
    method, seed = cli.config.method, int(cli.config.seed_everything)
    check_methods([method], cli.config.data.replay_per_class)
    set_threads(cli.config.threads)
    folder = prepare_folder(cli.config.output_dir) / "fit" / method / f"seed_{seed}"
    saver = ModelCheckpoint(folder / "checkpoints", filename="{epoch:03d}", save_last=True)
    run = build_run(cli, method, seed, folder, [saver])
    run.trainer.fit(run.model, datamodule=run.data, ckpt_path=cli.config.ckpt_path)
    print_accuracy(method, run.monitor.matrix, folder)
    if len(run.monitor.matrix):
        log_outcome(run, run.monitor.matrix)
