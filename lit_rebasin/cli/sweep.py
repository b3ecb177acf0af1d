"""One method under many settings, measured on training data that is held back."""

import json
import random
import shlex
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lit_rebasin.cli.app import ContinualCLI, hush
from lit_rebasin.cli.checks import check_benchmark
from lit_rebasin.cli.configuration_files import named_files
from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.methods import check_methods
from lit_rebasin.cli.output_folder import output_folder
from lit_rebasin.cli.report import cell, write_text
from lit_rebasin.cli.workers import Commands

_MOST_TRIALS = 10_000  # each is checked before the first is run


@dataclass(frozen=True)
class Trial:
    """One choice of settings, and the folder of its run."""

    settings: Mapping[str, str]
    folder: Path

    @property
    def name(self) -> str:
        """Return the settings as words."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())

    def result(self, method: str) -> dict[str, Any] | None:
        """Return what the run came to, if it is finished."""
        try:
            results = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
            found: dict[str, Any] = results["methods"][method]
            is_finished = not results["protocol"]["missing"] and bool(
                mean(found["accuracy"]) + len(found["forgetting"])
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # cut off, or another file
            return None
        return found if is_finished else None


def run_sweep(arguments: Sequence[str]) -> None:
    """Run a method with every choice of settings that is not finished yet, several at a time, and print the table."""
    hush()
    options, words = _parse(arguments)
    per_method = ContinualCLI("benchmark", words, beside=[*vars(options)]).config.per_method
    _check(_choices(options), options, words, per_method)
    with output_folder(options.output_dir) as folder:
        _sweep(options, words, per_method, folder, arguments)


def _sweep(
    options: Namespace, words: Sequence[str], per_method: Mapping[str, Any], folder: Path, arguments: Sequence[str]
) -> None:
    trials = [Trial(settings, folder / f"trial_{n:03d}") for n, settings in _numbered(options, words, folder)]
    method, failed = options.method, {}
    waiting = [trial for trial in trials if trial.result(method) is None]
    pool = ThreadPoolExecutor(options.processes)
    commands = Commands()
    running = {pool.submit(_run, trial, options, words, per_method, commands): trial for trial in waiting}
    console = Console(stderr=True)
    try:
        for future in track(as_completed(running), "sweep", total=len(running), console=console):
            if future.result():
                failed[running[future].name] = future.result()
    except KeyboardInterrupt as error:
        pool.shutdown(wait=False, cancel_futures=True)
        commands.kill()
        pool.shutdown()
        done = sum(trial.result(method) is not None for trial in trials)
        error.add_note(f"{done} of {len(trials)} trials are finished; the same command goes on with the others")
        raise
    finally:
        rows = _rows(trials, method)
        if rows:
            _write(folder, method, rows, options, arguments)
            Console().print(_table(rows, method))
    if failed:
        name, reason = next(iter(failed.items()))
        raise RuntimeError(f"{len(failed)} of {len(trials)} trials failed; the first, with {name}: {reason}")


def _check(
    choices: Sequence[Mapping[str, str]], options: Namespace, words: Sequence[str], per_method: Mapping[str, Any]
) -> None:
    """Raise a `UsageError` for a choice that its run would refuse, before any is run."""
    for settings in choices:
        trial = Trial(settings, Path(options.output_dir))
        try:
            check_benchmark(ContinualCLI("benchmark", _words(trial, options, words, per_method)))
        except (UsageError, ValueError) as error:
            raise UsageError(f"with {trial.name}: {error}") from None


def _parse(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options of the sweep, and the words that its runs are given."""
    parser = ArgumentParser("lit-rebasin sweep", add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--method", default="rebasin")
    parser.add_argument("--seeds", default="100")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--draw_seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--validation_fraction", type=float, default=0.1)
    parser.add_argument("--output_dir")
    try:
        options, words = parser.parse_known_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(str(error)) from None
    if not options.vary:
        raise UsageError("sweep needs what to vary, such as --vary merge.alpha=0.5,0.7,0.9")
    if not options.output_dir:
        raise UsageError("sweep needs --output_dir, where its trials are kept and looked for")
    if options.processes < 1 or (options.trials is not None and options.trials < 1):
        raise UsageError("--processes and --trials must be at least 1")
    if not 0 < options.validation_fraction < 1:
        raise UsageError(
            f"--validation_fraction must lie between 0 and 1, got {options.validation_fraction}: a sweep never looks at test data"
        )
    check_methods([options.method], 1, "benchmark")
    for word in words:
        if word.split("=")[0] in ("--methods", "--data.validation_fraction"):
            raise UsageError(f"sweep has no option {word.split('=')[0]}; use --method and --validation_fraction")
    return options, words


def _choices(options: Namespace) -> list[dict[str, str]]:
    """Return every combination of the values, or some that are drawn from them."""
    grid: dict[str, list[str]] = {}
    for text in options.vary:
        key, _, values = text.partition("=")
        if not key or not values:
            raise UsageError(f"--vary takes a key and values, as in merge.alpha=0.5,0.7, got {text!r}")
        if key in grid:
            raise UsageError(f"--vary names {key} twice; put all its values into one")
        grid[key] = _listed(text, values) if values.startswith("[") else values.split(",")
        if not grid[key] or "" in grid[key] or len(set(grid[key])) < len(grid[key]):
            raise UsageError(f"--vary {text}: a value is empty, or there twice, or there is none")
    count = prod(map(len, grid.values()))
    if min(count, options.trials or count) > _MOST_TRIALS:
        raise UsageError(f"--vary has {count} combinations; draw at most {_MOST_TRIALS} of them with --trials")
    numbers: Sequence[int] = range(count)
    if options.trials is not None and options.trials < count:
        numbers = random.Random(options.draw_seed).sample(numbers, options.trials)
    return [_combination(grid, number) for number in numbers]


def _combination(grid: Mapping[str, Sequence[str]], number: int) -> dict[str, str]:
    """Return the combination of a number, of which the last key runs fastest."""
    chosen: dict[str, str] = {}
    for key, values in reversed(list(grid.items())):
        number, index = divmod(number, len(values))
        chosen[key] = values[index]
    return {key: chosen[key] for key in grid}


def _listed(text: str, values: str) -> list[str]:
    """Return the members of a list in JSON, whose texts may hold commas."""
    try:
        members = json.loads(values)
    except ValueError as error:
        raise UsageError(
            f"--vary {text}: the values are no list in JSON ({error}); close the bracket, or leave it out"
        ) from None
    return [member if isinstance(member, str) else json.dumps(member) for member in members]


def _numbered(options: Namespace, words: Sequence[str], folder: Path) -> list[tuple[int, dict[str, str]]]:
    """Give every choice of settings a number, that which it has had in the folder before, if any."""
    listed = folder / "trials.json"
    run: dict[str, Any] = {name: getattr(options, name) for name in ("method", "seeds", "validation_fraction")}
    run |= {"words": list(words), "files": _texts(words)}
    kept: dict[str, Any] = {"run": run, "settings": []}
    if listed.exists():
        kept = _listed_before(listed)
    if kept["run"] != run:
        changed = next(name for name in run if kept["run"].get(name) != run[name])
        raise UsageError(f"{folder} holds trials of a sweep with other {changed}; choose another --output_dir")
    wanted = _choices(options)
    known = [*kept["settings"], *(settings for settings in wanted if settings not in kept["settings"])]
    _write_json(listed, {"run": run, "settings": known})
    return [(known.index(settings), settings) for settings in wanted]


def _listed_before(path: Path) -> dict[str, Any]:
    """Return what a sweep has noted of its trials."""
    kept: Any = None
    with suppress(OSError, ValueError, RecursionError):
        kept = json.loads(path.read_text(encoding="utf-8"))
    kinds = {"run": dict, "settings": list}
    if not isinstance(kept, dict) or not all(isinstance(kept.get(name), kind) for name, kind in kinds.items()):
        raise UsageError(
            f"{path} is not as a sweep writes it: it is damaged; choose another --output_dir, or remove it"
        )
    return kept


def _run(
    trial: Trial, options: Namespace, words: Sequence[str], per_method: Mapping[str, Any], commands: Commands
) -> str | None:
    """Run a benchmark of one method in a process of its own; return what went wrong, if anything did."""
    code, said = commands.run(["benchmark", *_words(trial, options, words, per_method)])
    if code == 0 and trial.result(options.method) is not None:
        return None
    lines = said.strip().splitlines() if code else []
    lines = lines or [f"it left no results that are complete, and exit code {code}"]
    return lines[-1].removeprefix("lit-rebasin: error: ")


def _words(trial: Trial, options: Namespace, words: Sequence[str], per_method: Mapping[str, Any]) -> list[str]:
    """Return the words of the benchmark that a trial is."""
    # As settings of the method, which go before all others.
    own = {**per_method.get(options.method, {}), **{key: _value(text) for key, text in trial.settings.items()}}
    return [
        *words,
        *("--methods", options.method, "--seeds", options.seeds, "--output_dir", str(trial.folder), "--overwrite"),
        *("--data.validation_fraction", str(options.validation_fraction)),
        f"--per_method={json.dumps({**per_method, options.method: own})}",
    ]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _rows(trials: Sequence[Trial], method: str) -> list[dict[str, Any]]:
    """Return what the finished trials came to, the most accurate first."""
    rows = []
    for trial in trials:
        found = trial.result(method)
        if found is not None:
            rows.append({"settings": dict(trial.settings), **{key: found[key] for key in ("accuracy", "forgetting")}})
    return sorted(rows, key=lambda row: -mean(row["accuracy"]))


def _table(rows: Sequence[Mapping[str, Any]], method: str) -> Table:
    table = Table(title=f"{method}, on held-back training data")
    for key in rows[0]["settings"] if rows else []:
        table.add_column(key)
    for header in ("avg accuracy %", "forgetting %"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*row["settings"].values(), cell(row["accuracy"], 100), cell(row["forgetting"], 100))
    return table


def _write(
    folder: Path, method: str, rows: Sequence[Mapping[str, Any]], options: Namespace, arguments: Sequence[str]
) -> None:
    command = shlex.join(["lit-rebasin", "sweep", *arguments])
    kept = {
        "method": method,
        "seeds": options.seeds,
        "validation_fraction": options.validation_fraction,
        "command": command,
        "trials": list(rows),
    }
    _write_json(folder / "sweep.json", kept)


def _texts(words: Sequence[str]) -> list[str]:
    """Return what the configuration files say."""
    return [path.read_text(encoding="utf-8") for path in named_files(words)]


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
