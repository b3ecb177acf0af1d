"""What a benchmark refuses before anything is run."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lit_rebasin.callbacks import ModeConnectivity
from lit_rebasin.cli.app import ContinualCLI
from lit_rebasin.cli.completeness import check_devices, check_trainer, is_all
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.methods import METHODS, check_methods
from lit_rebasin.cli.parallel_tasks import check_parallel
from lit_rebasin.continual.datamodule import LARGEST_SEED
from lit_rebasin.continual.rebasin_il import check_rebasin_il

# What all methods of a benchmark have in common.
PROTOCOL = (
    *(f"data.{name}" for name in ("benchmark", "n_tasks", "scenario", "data_dir", "validation_fraction", "seed")),
    "data_dir",
)


def check_benchmark(cli: ContinualCLI) -> tuple[list[str], list[int], dict[str, ContinualCLI]]:
    """Check everything that can be known of a benchmark before its data are read.

    Returns:
        The methods in their order, the seeds, and the configuration of each method.

    Raises:
        UsageError: If something is wrong.
        ValueError: If an argument of a class is.
    """
    methods, seeds = _methods(cli.config.methods), _seeds(cli.config.seeds)
    for names in (methods, [*methods, *cli.config.per_method]):
        check_methods(names, 1, "benchmark")
    for name in ("parallel_tasks", "processes"):
        if cli.config[name] < 1:
            raise UsageError(f"{name} must be at least 1, got {cli.config[name]}")
    if cli.config.parallel_tasks > 1 and cli.config.processes > 1:
        raise UsageError(
            "--processes runs methods and seeds side by side, --parallel_tasks the tasks of each: choose one"
        )
    if cli.config.parallel_tasks > 1 and all(METHODS[method].merge is None for method in methods):
        raise UsageError(
            f"--parallel_tasks trains tasks apart and merges them, which {', '.join(methods)} cannot; leave it out, or use --processes"
        )
    configured = {method: cli.for_method(method) for method in methods}
    baselines = [method for method in methods if METHODS[method].baseline]
    for method, own in configured.items():
        check_trainer(vars(own.config.trainer), own.config.data.epochs_per_task)
        alone = {f"--{name}": own.config[name] > 1 for name in ("parallel_tasks", "processes")}
        check_devices(vars(own.config.trainer), alone | {f"{method}, which Avalanche runs": METHODS[method].baseline})
        check_methods([method], own.config.data.replay_per_class, "benchmark")
        check_per_method(method, own)
        if method in baselines:
            _check_baselines(vars(own.config.trainer), baselines)
        if own.config.parallel_tasks > 1 and METHODS[method].merge is not None:
            check_parallel(own, method)
    return methods, seeds, configured


def check_per_method(method: str, cli: ContinualCLI) -> None:
    """Raise a `UsageError` for what ``per_method`` cannot say of a method."""
    for key in cli.config.per_method.get(method, {}):
        if key in PROTOCOL or key.startswith("trainer."):
            raise UsageError(
                f"per_method of {method!r}: {key} is the same for all methods of a benchmark; set it outside"
            )
        if key in METHODS[method].unheeded or (key.startswith("merge.") and METHODS[method].merge is None):
            kind = "a method that Avalanche runs" if METHODS[method].baseline else "this method"
            raise UsageError(f"per_method of {method!r}: {key} would not concern {kind}; leave it out")
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


def _check_baselines(options: Mapping[str, Any], baselines: Sequence[str]) -> None:
    """Raise a `UsageError` for arguments of the Trainer that Avalanche's loops would not heed beside ours."""
    unheeded = {
        "limit_train_batches": not is_all(options["limit_train_batches"]),
        "gradient_clip_val": options["gradient_clip_val"] not in (None, 0),
        "accumulate_grad_batches": options["accumulate_grad_batches"] != 1,
        "precision": options["precision"] not in (None, 32, "32", "32-true"),
        "callbacks": bool(options["callbacks"]),
    }
    for name, is_unheeded in unheeded.items():
        if is_unheeded:
            raise UsageError(
                f"trainer.{name} {_shown(options[name])} would not concern {', '.join(baselines)}, which Avalanche runs; leave it out, "
                "or leave them out of --methods"
            )


def _shown(value: Any) -> str:
    """Return a value of the Trainer's in words."""
    kinds = [getattr(one, "class_path", one) for one in value] if isinstance(value, list) else [value]
    return ", ".join(map(str, kinds))


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
