"""What jsonargparse says of a wrong value, in one sentence: it lists every type that the value could have had, over many lines."""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pydoc import ErrorDuringImport, locate

from jsonargparse import ArgumentParser

from lit_rebasin.cli.suggestions import closest, did_you_mean

# Where classes are that a user may name without their module.
_HOMES = ("lit_rebasin", "lightning.pytorch.callbacks", "torch.optim")
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
# Lines that say nothing of what is wrong.
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Expected a path but |Not a valid subclass|Subclass types expect|Given value type:|"
    r"a class path \(str\)|a dict with|Valid subclasses|$"
)


def in_words(error: Exception, parser: ArgumentParser | None = None, beside: Sequence[str] = ()) -> str:
    """Return what is wrong, where, and what was probably meant.

    Args:
        error: Raised by the parser, or by a class that it has made something of.
        parser: Knows the keys that there are.
        beside: Options of the command that its parser does not know.
    """
    said: BaseException = error
    while str(said).startswith("Does not validate") and said.__cause__ is not None:
        said = said.__cause__  # the words of the class, below those of the parser
    text = str(said)
    known = [] if parser is None else [*beside, *_keys(parser)]
    if parser is None and 'Parser key "' not in text:
        return text
    return _of_words(text, known) or _of_value(text, known) or " ".join(text.split())


def _keys(parser: ArgumentParser) -> list[str]:
    return [key.replace(".init_args.", ".") for key in parser.get_defaults().keys()]  # noqa: SIM118 - no mapping


def _of_words(text: str, known: Sequence[str]) -> str:
    """Return what is said of words that the parser does not know."""
    unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", text)
    if unknown:
        return f"there is no option {unknown[1]}{did_you_mean(unknown[1], [f'--{key}' for key in known])}"
    extra = re.search(r"unrecognized arguments: (.+)", text)
    return f"there is no use for {extra[1]!r}: every key begins with two dashes" if extra else ""


def _of_value(text: str, known: Sequence[str]) -> str:
    """Return what is said of a key or its value."""
    key = ".".join(re.findall(r'Parser key "(.+?)":', text))
    lines = list(dict.fromkeys(_lines(text)))
    stated = next(filter(None, (_statement(line, known) for line in lines)), "")
    if stated:
        return stated if not key or stated.startswith("there is no key") else f"{key}: {stated}"
    kinds = _kinds(lines)
    if not kinds:
        return ""
    values = [re.search(r"(?:Given value|Got value|import path string): (.*)$", line) for line in lines]
    value = next((found[1] for found in values if found), "")
    listed = " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
    return f"{key} must be {listed}, got {value}{_of_another_module(value) if 'an import path' in kinds else ''}"


def _lines(text: str) -> Iterator[str]:
    """Yield the lines that say something, each problem of a class joined to its name."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("Problem with given class_path "):
            yield f"{line} {after}"
        elif not _NOISE.match(line):
            yield line


def _statement(line: str, known: Sequence[str]) -> str:
    """Return what a line says that is no list of types."""
    refused = re.search(r"class_path '(.+?)': Option '(.+?)' is not accepted", line)
    if refused:
        return f"{refused[1]} has no argument {refused[2]!r}{did_you_mean(refused[2], _arguments(refused[1]))}"
    absent = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", line)
    if absent:
        return f"{absent[0]}{did_you_mean(absent[2], dir(import_module(absent[1])))}"
    problem = re.search(r"class_path '(.+?)': (.+)", line)
    if problem:
        return f"{problem[2]}, of {problem[1]}" if "required" in problem[2] else problem[2]
    option = re.search(r"Option '(.+?)' is not accepted", line)
    group = re.search(r"Group '(.+?)' does not accept option '(.+?)'", line)
    if option or group:
        name = option[1] if option else f"{group[1]}.{group[2]}"  # type: ignore[index]
        return f"there is no key {name!r}{did_you_mean(name, known)}"
    if line.startswith(("Expected ", "Parser key", "Given value", "Type ")):
        return ""
    return line


def _arguments(path: str) -> Iterable[str]:
    try:
        found = locate(path)
    except ErrorDuringImport:
        return []
    return inspect.signature(found).parameters if callable(found) else []


def _kinds(lines: Iterable[str]) -> list[str]:
    """Return in words the types that a value could have had."""
    kinds: list[str] = []
    for line in lines:
        literal = re.match(r"Expected (?:a )?typing.Literal\[(.+)\]", line)
        plain = re.match(r"Expected (?:an? )?<class '(?:\w+\.)*(\w+)'>", line)
        if literal:
            kinds += [word.strip("'") for word in literal[1].split(", ")]
        elif plain:
            kinds.append(_KINDS.get(plain[1], f"a {plain[1]}"))
        elif line.startswith("Expected a dot import path"):
            kinds.append("an import path")
    return sorted(dict.fromkeys(kinds), key="null".__eq__)


def _of_another_module(name: str) -> str:
    """Return what a class without a module was probably meant to be."""
    paths = {one: f"{home}.{one}" for home in reversed(_HOMES) for one in dir(import_module(home)) if one[:1].isupper()}
    meant = closest(name, paths)
    return "" if meant is None else f"; did you mean {paths[meant]}?"
