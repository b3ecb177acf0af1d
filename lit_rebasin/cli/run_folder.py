"""The folder of a benchmark, of a fit or of anybody's Trainer, read for its report."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.event_files import PATTERN, RunLog, event_folders, read_log
from lit_rebasin.cli.report import COLUMNS, as_matrices, seeds_of, stream_name
from lit_rebasin.cli.results_file import read_results
from lit_rebasin.metrics import average_accuracy, backward_transfer, forgetting

# Of the protocol in results.json, what is no configuration.
_BESIDE = ("seeds", "missing", "versions", "commit", "threads", "processors", "command")


@dataclass
class Learned:
    """What is known of one method.

    Attributes:
        numbers: The columns of its row in the table, a number a seed.
        matrices: Accuracy matrices, one a seed.
        logs: What the seeds with event files have logged.
        unlogged: The runs without event files.
    """

    numbers: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    matrices: list[Tensor] = field(default_factory=list)
    logs: list[RunLog] = field(default_factory=list)
    unlogged: list[str] = field(default_factory=list)


@dataclass
class RunFolder:
    """What a report is made of.

    Attributes:
        title: What was run.
        about: How often.
        methods: By name.
        missing: Runs that are not finished.
        damages: What of the event files cannot be read, a sentence a file.
        commands: What made the runs, in the words of a shell.
        versions: Of the packages, by name.
        configurations: Files of settings by what they are of.
    """

    title: str
    about: str
    methods: dict[str, Learned] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    configurations: dict[str, str] = field(default_factory=dict)


def read_folder(path: str) -> RunFolder:
    """Return what a folder holds.

    Raises:
        UsageError: If it is no run, or its results are damaged.
    """
    folder = Path(path)
    if folder.is_file():
        raise UsageError(f"report takes a folder, and {path} is a file{_hint(folder)}")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {path}; name the output folder of a benchmark or a fit")
    if (folder / "results.json").exists():
        return _benchmark(folder, read_results(folder / "results.json"))
    places = event_folders(folder)
    if not places:
        raise UsageError(
            f"{path} is no run: it has neither results.json nor TensorBoard event files; name the output folder of a benchmark or a fit"
        )
    return _logged_runs(folder, places)


def _hint(file: Path) -> str:
    """Return which folder is meant, if a file is in one that a report can be made of."""
    parents = list(file.resolve().parents)
    benchmarks = [parent for parent in parents if (parent / "results.json").is_file()]
    run = _run_of(parents[0])
    places = (
        PATTERN,
        f"version_*/{PATTERN}",
        f"tensorboard/version_*/{PATTERN}",
        f"lightning_logs/version_*/{PATTERN}",
    )
    runs = [run] if any(True for place in places for _ in run.glob(place)) else []
    folder = next(iter(benchmarks + runs), None)
    if folder is None:
        return ""
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    return f": try report {shlex.quote(_printable(str(shown)))}"


def _benchmark(folder: Path, results: Mapping[str, Any]) -> RunFolder:
    protocol = results["protocol"]
    seeds = ", ".join(map(str, protocol["seeds"]))
    config = {key: value for key, value in protocol.items() if key not in _BESIDE}
    about = {key: protocol[key] for key in ("commit", "threads", "processors") if protocol.get(key) is not None}
    found = RunFolder(
        stream_name(results),
        f"seed{'s' * (len(protocol['seeds']) > 1)} {seeds}",
        missing=protocol["missing"],
        commands=[protocol["command"]],
        versions={name: str(number) for name, number in (protocol["versions"] | about).items()},
        configurations={"all runs": yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)},
    )
    for name, numbers in results["methods"].items():
        learned = Learned({key: numbers[key] for key in COLUMNS}, as_matrices(numbers["accuracy_matrix"]))
        for seed in seeds_of(dict(results), name):
            log = _read(folder, event_folders(folder / name / f"seed_{seed}"), f"seed {seed}", found)
            if log.is_empty:
                learned.unlogged.append(f"{name} seed {seed}")
            else:
                learned.logs.append(log)
        found.methods[name] = learned
    return found


def _read(folder: Path, versions: Sequence[Path], name: str, found: RunFolder) -> RunLog:
    """Return what a run has logged, and note in ``found`` which of its event files are damaged."""
    log = read_log(versions)
    log.name = name
    for file, damage in log.damages.items():
        found.damages.append(f"The event file {_printable(str(file.relative_to(folder)))} {damage}.")
    return log


def _logged_runs(folder: Path, places: Sequence[Path]) -> RunFolder:
    """Return the runs of a folder that have event files, seeds of one method together."""
    runs: dict[Path, list[Path]] = {}
    for place in places:
        runs.setdefault(_run_of(place.resolve()), []).append(place)
    found = RunFolder(_title(folder.resolve()), "")
    for run, versions in runs.items():
        method, seed = _named(run, folder.resolve())
        log = _read(folder, versions, "" if seed is None else f"seed {seed}", found)
        if log.is_empty:
            continue
        _add_run(found.methods.setdefault(method, Learned()), log)
        _add_record(found, run, versions[-1], method if seed is None else f"{method} seed {seed}")
    if not found.methods:
        damages = "".join(f". {damage.removesuffix('.')}" for damage in found.damages)
        raise UsageError(
            f"{folder} has event files, but nothing in them that RebasinMerge, ContinualMonitor or another monitor has logged{damages}"
        )
    n_runs = sum(len(learned.logs) for learned in found.methods.values())
    found.about = f"{n_runs} runs, read from their event files" if n_runs > 1 else "one run, read from its event files"
    return found


def _run_of(place: Path) -> Path:
    """Return the folder of the run whose event files lie in ``place``."""
    if re.fullmatch(r"version_\d+", place.name):
        place = place.parent
    return place.parent if place.name in ("tensorboard", "lightning_logs") else place


def _named(run: Path, folder: Path) -> tuple[str, str | None]:
    """Return the method and the seed of a run, as `fit` names folders; else the name of its own folder and no seed."""
    seed = re.fullmatch(r"seed_(\d+)", run.name)
    place = run.parent if seed else run
    inside = place.relative_to(folder).parts if place.is_relative_to(folder) else ()
    names = inside[1:] if inside[:1] == ("fit",) else inside
    return _printable("/".join(names) or place.name), seed[1] if seed else None


def _printable(name: str) -> str:
    """Return the name of a file with a question mark for every byte that is no text."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _title(folder: Path) -> str:
    """Return the name of a folder, after those that tell it from others of its name."""
    names = [folder.name]
    while re.fullmatch(r"seed_\d+|version_\d+|tensorboard|lightning_logs", folder.name) and folder != folder.parent:
        folder = folder.parent
        names.append(folder.name)
    return _printable("/".join(reversed(names)))


def _add_run(learned: Learned, log: RunLog) -> None:
    learned.logs.append(log)
    matrix = log.matrix
    if matrix is None:
        return
    learned.matrices.append(matrix)
    for name, measure in (
        ("accuracy", average_accuracy),
        ("forgetting", forgetting),
        ("backward_transfer", backward_transfer),
    ):
        value = measure(matrix)
        learned.numbers[name].append(None if isnan(value) else value)


def _add_record(found: RunFolder, run: Path, version: Path, name: str) -> None:
    """Take in what a run says of how it was made: what `fit` has written, else the logger's hyper-parameters."""
    for file in (run / "config.yaml", version / "hparams.yaml"):
        if file.is_file():
            found.configurations[name] = _text(file)
            break
    if (run / "command.txt").is_file():
        found.commands.append(_text(run / "command.txt").strip())
    if (run / "versions.yaml").is_file():
        found.versions |= dict(re.findall(r"^([\w.-]+): *(\S+)$", _text(run / "versions.yaml"), re.MULTILINE))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
