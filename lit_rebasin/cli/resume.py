"""A benchmark that goes on where it was stopped."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lit_rebasin.cli.app import ContinualCLI
from lit_rebasin.cli.build import FILLED, Run
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.report import as_matrices, seeds_of
from lit_rebasin.cli.results import Outcome, Setting
from lit_rebasin.cli.results_file import read_results
from lit_rebasin.cli.resumed_checkpoint import check_checkpoint

# What may differ between a benchmark and the one that goes on with it.
_FREE = (
    *("methods", "seeds", "method", "seed_everything", "output_dir", "overwrite", "resume", "ckpt_path"),
    *("processes", "parallel_tasks"),
)
# What a run fills in, and the command may leave open.
_FILLED = (*(f"trainer.{name}" for name in FILLED), "data.n_tasks", "data.scenario")


def finished_runs(
    folder: Path, cli: ContinualCLI, planned: Sequence[tuple[str, int]]
) -> tuple[dict[tuple[str, int], Outcome], Setting | None]:
    """Return what the runs came to that a folder holds, by method and seed, and what they have in common.

    Raises:
        UsageError: If they are of another configuration, or not among those planned.
    """
    if not (folder / "results.json").exists():
        return {}, None
    results = read_results(folder / "results.json")
    try:
        return _outcomes(folder, results, planned, cli)
    except (KeyError, IndexError, TypeError):  # of what read_results does not need
        raise UsageError(
            f"{folder / 'results.json'} lacks what going on needs, for another version has written it; pass --overwrite to begin anew"
        ) from None


def _outcomes(
    folder: Path, results: dict[str, Any], planned: Sequence[tuple[str, int]], cli: ContinualCLI
) -> tuple[dict[tuple[str, int], Outcome], Setting]:
    now = yaml.safe_load(cli.parser.dump(cli.config, skip_validation=True))
    _check_same(results["protocol"], now, f"output_dir {folder} holds a benchmark")
    found: dict[tuple[str, int], Outcome] = {}
    for method, numbers in results["methods"].items():
        seeds, moved = seeds_of(results, method), numbers.get("moved")
        refused = numbers.get("refused")
        matrices = as_matrices(numbers["accuracy_matrix"])
        for k, (seed, matrix) in enumerate(zip(seeds, matrices, strict=True)):
            if (method, seed) not in planned:
                raise UsageError(
                    f"output_dir {folder} holds {method} with seed {seed}, which --methods and --seeds leave out; name all that it was begun "
                    "with"
                )
            merges = moved[k] if moved else None, refused[k] if refused else []
            outcome = Outcome(matrix, numbers["seconds"][k], numbers["cpu_seconds"][k], *merges)
            found[method, seed] = outcome
    protocol = results["protocol"]
    trainer = {name: protocol["trainer"][name] for name in FILLED}
    return found, Setting(results["benchmark"], protocol["data"]["scenario"], protocol["data"]["n_tasks"], trainer)


def checkpoint_to_resume(cli: ContinualCLI, run: Run, folder: Path) -> Path | None:
    """Return the checkpoint from which a run goes on, if it left one; where it should not go on, remove what is left of it.

    Raises:
        UsageError: If the run was begun with another configuration.
    """
    path = folder / "checkpoints" / "last.ckpt"
    if not cli.config.resume:
        remove_checkpoints(folder)
    if not path.exists():
        return None
    now = yaml.safe_load(cli.parser.dump(run.config, skip_validation=True))
    _check_same(_configuration(folder / "config.yaml"), now, f"{folder} holds a run")
    check_checkpoint(run, path)
    return path


def _configuration(path: Path) -> Mapping[str, Any]:
    """Return what a run was begun with."""
    begun: Any = None
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(begun, Mapping):
        raise UsageError(
            f"{path} is missing or damaged, so that nothing says what the run was begun with; remove the checkpoints beside it to begin anew"
        )
    return begun


def remove_checkpoints(folder: Path) -> None:
    """Remove what a run was to go on from."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def check_settings(cli: ContinualCLI, run: Run, path: Path) -> None:
    """Refuse to go on from a checkpoint with other data, another model or another merge than its run was begun with.

    Raises:
        UsageError: If they differ. A checkpoint that lies elsewhere than its run has put it is not known to be of any.
    """
    record = path.parent.parent / "config.yaml"
    if not record.is_file():
        return
    now = yaml.safe_load(cli.parser.dump(run.config, skip_validation=True))
    for key, before, value in _differences(_configuration(record), now):
        if key.split(".")[0] in ("data", "model", "merge"):
            raise UsageError(
                f"the run of {path} was begun with {key}={before!r}, not {value!r}; go on with what it was begun with"
            )


def _check_same(begun: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    for key, before, value in _differences(begun, now):
        raise UsageError(
            f"{what} with {key}={before!r}, not {value!r}; go on with what it was begun with, choose another --output_dir, or "
            "pass --overwrite to begin anew"
        )


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what may not differ and does: the key, its value before, and now."""
    before = dict(_flat(begun))
    for key, value in _flat(now):
        if key.split(".")[0] not in _FREE and key not in _FILLED and before.get(key) != value:
            yield key, before.get(key), value


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of a configuration by their dotted keys."""
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
