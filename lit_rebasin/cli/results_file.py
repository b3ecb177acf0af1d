"""``results.json``, read again and checked."""

import json
from pathlib import Path
from sys import float_info
from typing import Any

from lit_rebasin.cli.errors import UsageError
from lit_rebasin.cli.report import COLUMNS, seeds_of

_KINDS = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number"}


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a ``results.json``.

    Raises:
        UsageError: If it was cut off, or changed by hand so that it is no result of a benchmark.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is no JSON ({error}): it is cut off or was changed; run the benchmark again"
        ) from None
    try:
        json.dumps(results, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no character, and a ValueError
        _check(results)
    except ValueError as error:
        raise UsageError(f"{path} is not as a benchmark writes it: {error}; run the benchmark again") from None
    plain: dict[str, Any] = results
    return plain


def _check(results: Any) -> None:
    if not isinstance(results, dict):
        raise ValueError("it is no mapping")
    _need(results, "benchmark", str)
    n_tasks = _need(results, "n_tasks", int)
    protocol = _need(results, "protocol", dict)
    for name, kind in {"seeds": list, "missing": list, "versions": dict, "command": str}.items():
        _need(protocol, name, kind, "protocol.")
    if not all(isinstance(seed, int) for seed in protocol["seeds"]):
        raise ValueError("protocol.seeds is not a list of whole numbers")
    if not all(isinstance(one, str) for one in protocol["missing"]):
        raise ValueError("protocol.missing is not a list of texts")
    methods = _need(results, "methods", dict)
    if not methods:
        raise ValueError("methods has no method")
    for name, found in methods.items():
        if not isinstance(found, dict):
            raise ValueError(f"methods.{name} is not a mapping")
        _check_method(f"methods.{name}.", found, n_tasks, len(seeds_of(results, name)))


def _check_method(where: str, found: dict[str, Any], n_tasks: int, n_seeds: int) -> None:
    for name in COLUMNS:
        if not all(_is_number(value) for value in _need(found, name, list, where)):
            raise ValueError(f"{where}{name} is not a list of numbers")
    refused = found.get("refused", [[]] * n_seeds)  # which those of an earlier version lack
    if not _is_list(refused, n_seeds) or not all(map(_is_refusals, refused)):
        raise ValueError(f"{where}refused is not a list of refused merges")
    matrices = _need(found, "accuracy_matrix", list, where)
    if not all(_is_matrix(matrix, n_tasks) for matrix in matrices):
        raise ValueError(f"{where}accuracy_matrix is not a list of matrices, {n_tasks} x {n_tasks}")
    for name in (*COLUMNS, "accuracy_matrix"):
        if len(found[name]) != n_seeds:
            raise ValueError(f"{where}{name} has {len(found[name])} entries for {n_seeds} finished seeds")


def _need(mapping: dict[str, Any], name: str, kind: type, where: str = "") -> Any:
    if name not in mapping:
        raise ValueError(f"{where}{name} is missing")
    if not isinstance(mapping[name], kind) or isinstance(mapping[name], bool):
        raise ValueError(f"{where}{name} is not {_KINDS[kind]}")
    return mapping[name]


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number, or null for what was not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return abs(value) <= float_info.max


def _is_matrix(value: Any, size: int) -> bool:
    return _is_list(value, size) and all(_is_list(row, size) and all(map(_is_number, row)) for row in value)


def _is_list(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size > 0


def _is_refusals(value: Any) -> bool:
    kinds = {"task": int, "refused": str, "kept": str}
    return isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())
        for entry in value
    )
