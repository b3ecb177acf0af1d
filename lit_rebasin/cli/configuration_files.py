"""The configuration files of a command, checked before the parser reads them, for it takes the last of two values and knows no lines."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lit_rebasin.cli.errors import UsageError

_MOST = 100_000  # entries, each as often as it is referred to
_SECTIONS = ("trainer", "model", "data", "merge")
_YAML = "tag:yaml.org,2002:"
_KINDS = {f"{_YAML}{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge")}
_MERGE = f"{_YAML}merge"  # a key that takes in another mapping, and may do so again


def named_files(words: Sequence[str]) -> list[Path]:
    """Return the configuration files that a command names."""
    named = [
        after if word in ("-c", "--config") else word.partition("=")[2]
        for word, after in zip(words, [*words[1:], ""], strict=False)
        if word in ("-c", "--config") or word.startswith("--config=")
    ]
    return [Path(name) for name in named]


def check_file(path: Path) -> None:
    """Refuse a file that is no mapping in YAML, or one that says a thing twice.

    Raises:
        UsageError: With the line, where there is one.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"configuration {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"configuration {path} cannot be read ({error.strerror})") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise _at(path, error.problem_mark, " ".join(filter(None, [error.context, error.problem]))) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"configuration {path} is no YAML: {error}") from None
    if root is None:
        raise UsageError(f"configuration {path} is empty; leave it out, or write keys with values into it")
    if not isinstance(root, MappingNode):
        kind = "a list" if isinstance(root, SequenceNode) else "a text"
        raise UsageError(
            f"configuration {path} holds {kind}, but must be keys with values, such as data: {{n_tasks: 5}}"
        )
    for key, value in root.value:
        if key.value == "config":
            raise _at(
                path, key.start_mark, "config names another file, which is not looked into; give each with --config"
            )
        if key.value in _SECTIONS and not isinstance(value, MappingNode):
            raise _at(
                path, key.start_mark, f"{key.value} must be keys with values, such as {key.value}: {{KEY: VALUE}}"
            )
    if _entries(path, root, {}, set()) > _MOST:
        raise UsageError(f"configuration {path} has more than {_MOST} entries")
    _check_names(path, root, "", set())


def _entries(path: Path, node: Node, known: dict[int, int], above: set[int]) -> int:
    """Return how many entries a node comes to, and refuse what is wrong within."""
    if id(node) in above:
        raise _at(path, node.start_mark, "what an anchor names holds itself")
    if id(node) not in known:
        if node.tag not in _KINDS:
            tag = node.tag.removeprefix(_YAML)
            raise _at(path, node.start_mark, f"the tag {tag} is not for a configuration, and is never run")
        if isinstance(node, MappingNode):
            _check_keys(path, node)
        inner = (_entries(path, one, known, above | {id(node)}) for one in _children(node))
        known[id(node)] = 1 + sum(inner)
    return known[id(node)]


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, SequenceNode):
        yield from node.value


def _check_keys(path: Path, node: MappingNode) -> None:
    seen = set()
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            raise _at(path, key.start_mark, "a key must be a word")
        if key.value in seen and key.tag != _MERGE:
            raise _at(path, key.start_mark, f"{key.value!r} twice in the same place; keep one of them")
        if key.value == "class_path" and (not isinstance(value, ScalarNode) or value.tag != f"{_YAML}str"):
            raise _at(path, key.start_mark, "class_path must be a text, such as torch.optim.SGD")
        seen.add(key.value)


def _check_names(path: Path, node: MappingNode, prefix: str, seen: set[str]) -> None:
    """Refuse a key that is given with dots as well as in its section."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if key.tag == _MERGE:
            continue
        if isinstance(value, MappingNode):
            _check_names(path, value, f"{name}.", seen)
        elif name in seen:
            raise _at(path, key.start_mark, f"{name!r} is given twice, with dots and in a section; keep one of them")
        seen.add(name)


def _at(path: Path, mark: yaml.Mark | None, problem: str) -> UsageError:
    place = "" if mark is None else f", line {mark.line + 1}"
    return UsageError(f"configuration {path}{place}: {problem}")
