"""Several methods over several seeds on one stream."""

from collections.abc import Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from typing_extensions import override

from lit_rebasin.callbacks import ModeConnectivity
from lit_rebasin.callbacks.report import log_accuracies
from lit_rebasin.cli.app import (
    QUIET,
    ContinualCLI,
    Run,
    build_run,
    hush,
    log_outcome,
    prepare_folder,
    set_threads,
    write_record,
)
from lit_rebasin.cli.completeness import check_trainer, complete
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.methods import METHODS, check_methods
from lit_rebasin.cli.parallel_tasks import check_parallel, run_in_parallel
from lit_rebasin.cli.report import results_table, write_pictures, write_results
from lit_rebasin.cli.results import Outcome, make_results
from lit_rebasin.continual import ContinualClassifier
from lit_rebasin.continual.datamodule import LARGEST_SEED
from lit_rebasin.continual.rebasin_il import check_rebasin_il

# What all methods of a benchmark have in common.
PROTOCOL = (
    *(f"data.{name}" for name in ("benchmark", "n_tasks", "scenario", "data_dir", "validation_fraction", "seed")),
    "data_dir",
)
# Of our own training step.
LEARNING = ("model.lr_decay", "model.distillation", "model.temperature", "data.replay_transform")


def run_benchmark(arguments: Sequence[str]) -> None:
    """Run several methods over several seeds."""
    hush()
    benchmark(ContinualCLI("benchmark", arguments))


def benchmark(cli: ContinualCLI) -> dict[str, Any]:
    """Run every method with every seed, and print the table.

    Results are written after each run, so that those of finished runs outlive an interruption or an error in a later one.

    Returns:
        What ``results.json`` holds.
    """
    methods, seeds = _methods(cli.config.methods), _seeds(cli.config.seeds)
    for names in (methods, [*methods, *cli.config.per_method]):
        check_methods(names, 1, "benchmark")
    if cli.config.parallel_tasks < 1:
        raise UsageError(f"parallel_tasks must be at least 1, got {cli.config.parallel_tasks}")
    configured = {method: cli.for_method(method) for method in methods}
    for method, own in configured.items():
        check_trainer(vars(own.config.trainer), own.config.data.epochs_per_task)
        check_methods([method], own.config.data.replay_per_class, "benchmark")
        _check_options(method, own)
        if METHODS[method].baseline:
            _check_baselines(vars(own.config.trainer))
            import lit_rebasin.continual.baselines  # noqa: F401 - slow, and no part of a run's seconds
        if own.config.parallel_tasks > 1 and METHODS[method].merge is not None:
            check_parallel(own, method)
    set_threads(cli.config.threads)
    folder = prepare_folder(cli.config.output_dir)
    if (folder / "results.json").exists() and not cli.config.overwrite:
        raise UsageError(
            f"{folder} holds results already; choose another --output_dir, or pass --overwrite to replace them"
        )
    planned = [(method, seed) for method in methods for seed in seeds]
    outcomes: dict[str, list[Outcome]] = {}
    results: dict[str, Any] = {}
    try:
        with _progress() as progress:
            bar = progress.add_task("starting", total=len(planned))
            for done, (method, seed) in enumerate(planned, start=1):
                place = folder / method / f"seed_{seed}"
                watch = _Watch(progress, bar, f"{method} · seed {seed}")
                started = perf_counter()
                own = configured[method]
                run = build_run(own, method, seed, place, [watch], **QUIET)
                write_record(own, run, place)
                matrix = _matrix(own, run, watch)
                log_outcome(run, matrix)
                outcomes.setdefault(method, []).append(Outcome(matrix, perf_counter() - started))
                missing = [f"{name} seed {number}" for name, number in planned[done:]]
                results = make_results(cli, run, seeds, outcomes, missing)
                write_results(folder, results)
    except BaseException as error:
        if results:
            lacking = ", ".join(results["protocol"]["missing"])
            error.add_note(f"The finished runs are in {folder / 'results.json'}; missing: {lacking}")
        raise
    finally:
        if results:
            write_pictures(folder, results)
    Console().print(results_table(results))
    Console(soft_wrap=True).print(f"Results, pictures and TensorBoard logs: {folder}")
    return results


def _matrix(cli: ContinualCLI, run: Run, watch: "_Watch") -> Tensor:
    """Train a method with a seed, and return its accuracy matrix."""
    if METHODS[run.record.method].baseline:
        return _baseline(run, cli.strategy_options(run.record.method), watch)
    if cli.config.parallel_tasks > 1 and METHODS[run.record.method].merge is not None:
        return run_in_parallel(
            cli,
            run,
            cli.config.parallel_tasks,
            cli.config.threads,
            lambda task, epochs: watch.advance(task, run.n_tasks, epochs, epochs),
        )
    run.trainer.fit(run.model, datamodule=run.data)
    return complete(run.monitor.matrix, run.n_tasks)


def _check_options(method: str, cli: ContinualCLI) -> None:
    """Raise a `UsageError` for what ``per_method`` cannot say of a method."""
    for key in cli.config.per_method.get(method, {}):
        if key in PROTOCOL or key.startswith("trainer."):
            raise UsageError(
                f"per_method of {method!r}: {key} is the same for all methods of a benchmark; set it outside"
            )
        if METHODS[method].baseline and key in LEARNING:
            raise UsageError(
                f"per_method of {method!r}: {key} would not concern a method that Avalanche runs; leave it out"
            )
    options = cli.strategy_options(method)
    check = {"rebasin-il": check_rebasin_il, "mc-sgd": _check_mc_sgd}.get(method)
    if METHODS[method].baseline and options:
        from lit_rebasin.continual.baselines import check_options

        check = partial(check_options, method)
    if check is None and options:
        raise UsageError(
            f"per_method of {method!r}: there is no key {next(iter(options))!r}; name it in full, as in merge.alpha"
        )
    try:
        if check is not None:
            check(options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"per_method of {method!r}: {error}") from None


def _check_mc_sgd(options: dict[str, Any]) -> None:
    ModeConnectivity(**options)


def _check_baselines(options: Mapping[str, Any]) -> None:
    """Raise a `UsageError` for arguments of the Trainer that Avalanche's loops would not heed beside ours."""
    plain = {
        "limit_train_batches": (None, 1.0),
        "gradient_clip_val": (None, 0),
        "accumulate_grad_batches": (1,),
        "precision": (None, 32, "32", "32-true"),
    }
    for name, values in plain.items():
        if options[name] not in values:
            raise UsageError(
                f"trainer.{name} {options[name]} would not concern the methods that Avalanche runs; leave it out, or leave them out of methods"
            )


def _baseline(run: Run, options: dict[str, Any], watch: "_Watch") -> Tensor:
    from lit_rebasin.continual.baselines import run_baseline  # Avalanche is slow to import

    def report(matrix: Tensor, task: int) -> None:
        log_accuracies(run.trainer.loggers, matrix, task)

    assert isinstance(run.model, ContinualClassifier)  # as all baselines train
    return run_baseline(
        run.record.method,
        run.model,
        run.data,
        options=options,
        n_tasks=run.n_tasks,
        device=run.trainer.strategy.root_device,
        on_epoch=lambda task: watch.advance(task, run.n_tasks, run.data.epochs_per_task),
        on_task=report,
    )


def _methods(given: list[str] | str | None) -> list[str]:
    names = given.split(",") if isinstance(given, str) else given or []
    names = list(dict.fromkeys(name.strip() for name in names))
    return sorted(names, key=lambda name: list(METHODS).index(name) if name in METHODS else len(METHODS))


def _seeds(given: list[int] | int | str | None) -> list[int]:
    words = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given or []
    try:
        seeds = [int(word) for word in words]
    except ValueError:
        raise UsageError(f"seeds must be whole numbers such as 0,1,2, got {given!r}") from None
    if not seeds or min(seeds) < 0 or max(seeds) > LARGEST_SEED or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must be different whole numbers from 0 to {LARGEST_SEED}, got {given!r}")
    return seeds


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


class _Watch(pl.Callback):
    """Moves the progress bar on, and says what is running."""

    def __init__(self, progress: Progress, bar: TaskID, title: str) -> None:
        self.progress, self.bar, self.title = progress, bar, title

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._describe(data.task, data.n_tasks)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.progress.advance(self.bar, 1 / (trainer.max_epochs or 1))

    def advance(self, task: int, n_tasks: int, epochs_per_task: int, epochs: int = 1) -> None:
        """Note epochs that Lightning knows nothing of."""
        self._describe(task, n_tasks)
        self.progress.advance(self.bar, epochs / (n_tasks * epochs_per_task))

    def _describe(self, task: int, n_tasks: int) -> None:
        self.progress.update(self.bar, description=f"{self.title} · task {task + 1}/{n_tasks}")
