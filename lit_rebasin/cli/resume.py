"""A benchmark that goes on where it was stopped."""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_rebasin.cli.app import ContinualCLI
from lit_rebasin.cli.build import FILLED, Run, left_open
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.report import as_matrices, seeds_of
from lit_rebasin.cli.results import Outcome, Setting
from lit_rebasin.cli.results_file import read_results
from lit_rebasin.cli.resumed_checkpoint import check_checkpoint, configuration, read_checkpoint

# What may differ between a benchmark and the one that goes on with it.
_FREE = (
    *("methods", "seeds", "method", "seed_everything", "output_dir", "overwrite", "resume", "ckpt_path"),
    *("processes", "parallel_tasks", "data_dir", "data.data_dir"),
)


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
    protocol = results["protocol"]
    before = {key: protocol.get(key) for key in now}
    still_open = set(protocol["left_open"]) & set(left_open(cli))
    _check_same(before, now, f"output_dir {folder} holds a benchmark", still_open)
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
    trainer = {name: protocol["trainer"][name] for name in FILLED}
    return found, Setting(results["benchmark"], protocol["data"]["scenario"], protocol["data"]["n_tasks"], trainer)


def checkpoint_to_resume(cli: ContinualCLI, run: Run, folder: Path) -> Path | None:
    """Return the checkpoint from which a run goes on, if it is to go on and left one.

    Raises:
        UsageError: If the run was begun with another configuration.
    """
    path = folder / "checkpoints" / "last.ckpt"
    if not cli.config.resume or not path.exists():
        return None
    held = read_checkpoint(path)
    _check_same(configuration(run, held, path), run.record.config, f"{folder} holds a run")
    check_checkpoint(run, held, path)
    return path


def remove_checkpoints(folder: Path) -> None:
    """Remove what a run was to go on from."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def check_settings(run: Run, path: Path) -> None:
    """Refuse to go on from a file that is no checkpoint, or one of a run with other data, another model or another merge.

    Raises:
        UsageError: If they differ; see also `check_checkpoint`.
    """
    held = read_checkpoint(path)
    check_checkpoint(run, held, path)
    for key, before, value in _differences(configuration(run, held, path), run.record.config):
        if key.split(".")[0] in ("data", "model", "merge"):
            raise UsageError(
                f"checkpoint {path} is of a run with {key}={before!r}, not {value!r}; go on with what it was begun with, or leave "
                "--ckpt_path out to begin anew"
            )


def _check_same(begun: Mapping[str, Any], now: Mapping[str, Any], what: str, still_open: Collection[str] = ()) -> None:
    for key, before, value in _differences(begun, now):
        if key not in still_open:
            raise UsageError(
                f"{what} with {key}={before!r}, not {value!r}; go on with what it was begun with, choose another --output_dir, or "
                "pass --overwrite to begin anew"
            )


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what may not differ and does: the key, its value before, and now."""
    for name in dict.fromkeys((*begun, *now)):
        key, before, value = f"{prefix}{name}", begun.get(name), now.get(name)
        if key in _FREE:
            continue
        if isinstance(before, Mapping | None) and isinstance(value, Mapping | None):
            yield from _differences(before or {}, value or {}, f"{key}.")
        elif before != value:
            yield key, before, value
