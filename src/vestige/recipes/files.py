"""Recipes as text: YAML that is read strictly, and how layers of it are merged."""

import copy
import difflib
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from vestige.errors import RecipeError
from vestige.recipes.catalog import shipped

LARGEST, DEEPEST = 1_000_000, 20
# What a small file may stand for through aliases, and the digits of a number.
MOST_VALUES, MOST_DIGITS = 100_000, 100
# PyYAML lets the ValueError of an empty number through.
_NOT_YAML = (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError)
_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


def read_yaml(name_or_path: str | Path) -> dict[str, Any]:
    """The mapping in a shipped recipe or a file.

    Raises:
        RecipeError: there is no such file, or it is not strict YAML, see `parse`.
    """
    known = shipped()
    path = known.get(str(name_or_path), Path(name_or_path))
    # Not Path.is_file, which raises for a name that is too long for the file system.
    if not os.path.isfile(path):
        raise RecipeError(
            f"got recipe {short(str(name_or_path))}, expected a file or one of {', '.join(known)}"
            f"{near(str(name_or_path), list(known), listed=False)}"
        )
    if path.stat().st_size > LARGEST:
        raise RecipeError(f"{path} has {path.stat().st_size} bytes; a recipe has at most {LARGEST}")
    try:
        text = path.read_text(encoding="utf8")
        # What is read is changed by those who read it.
        raw = copy.deepcopy(_parsed(text))
    except _NOT_YAML as error:
        if isinstance(error, RecipeError):
            raise RecipeError(f"{path}, {error}") from None
        hint = "; indent by spaces, not by tabs" if "'\\t'" in str(error) else ""
        raise RecipeError(f"{path} is not YAML: {error}{hint}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds {type(raw).__name__}, expected a mapping with 'method' …")
    return raw


def parse(text: str) -> Any:
    """What YAML says, without the ways in which it says something else than it seems to.

    Raises:
        RecipeError: a key stands twice in a mapping or is no text, a value is no plain one, or all
            of it is nested or repeated too much; the line is named.
        yaml.YAMLError: the text is no YAML; a ValueError or a RecursionError may say so, too.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """The same for files: a recipe is read for each of its presets and arms, 20 ms at a time."""
    return parse(text)


@dataclass(frozen=True)
class _Size:
    values: int
    depth: int


def _measure(node: yaml.Node, known: dict[int, _Size | None]) -> _Size:
    """How much a node stands for with its aliases written out; refuses what is not plain."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise _refuse(node, "got a value that holds itself", "write it out")
        return size
    known[id(node)] = None
    if node.tag not in _PLAIN:
        kind = node.tag.removeprefix(_TAG)
        raise _refuse(
            node, f"got a value of kind {short(kind)}", "put text in quotes; only plain values work"
        )
    parts: Sequence[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif node.tag == f"{_TAG}int" and len(node.value) > MOST_DIGITS:
        raise _refuse(node, f"got a number of {len(node.value)} digits", "write a smaller one")
    sizes = [_measure(part, known) for part in parts]
    size = _Size(
        1 + sum(one.values for one in sizes), 1 + max((one.depth for one in sizes), default=0)
    )
    if size.depth > DEEPEST:
        raise _refuse(node, f"got more than {DEEPEST} levels", "nest less deeply")
    if size.values > MOST_VALUES:
        raise _refuse(node, f"got more than {MOST_VALUES} values by aliases", "repeat less")
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
            shown = short(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise _refuse(
                key, f"got the key {shown} of kind {key.tag.removeprefix(_TAG)}", "put it in quotes"
            )
        if key.value in seen:
            raise _refuse(
                key,
                f"got the key {short(key.value)} a second time, after line {seen[key.value]}",
                "of which YAML would keep only the last; leave one of them",
            )
        seen[key.value] = key.start_mark.line + 1


def _refuse(node: yaml.Node, got: str, do: str) -> RecipeError:
    return RecipeError(f"line {node.start_mark.line + 1}: {got}; {do}")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged, everything else is replaced.

    A key with the value "!drop" is taken away.
    """
    merged = dict(base)
    for key, value in over.items():
        if value == "!drop":
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """Read "a.b=value" as a nested mapping; the value is YAML."""
    key, sign, value = text.partition("=")
    names = key.strip().split(".")
    if not sign or not all(names):
        raise RecipeError(
            f"got --set {short(text)}, expected key=value, for example config.rounds=10"
        )
    if len(names) > DEEPEST:
        raise RecipeError(f"got --set with a key of {len(names)} parts, expected at most {DEEPEST}")
    try:
        parsed = parse(value)
    except _NOT_YAML as error:
        what = str(error) if isinstance(error, RecipeError) else f"its value is not YAML: {error}"
        raise RecipeError(f"got --set {short(text)}; {what}") from error
    if isinstance(parsed, str) and _is_number(parsed):
        # YAML 1.1 reads 1e-3 as text; nobody means that.
        parsed = float(parsed)
    for name in reversed(names):
        parsed = {name: parsed}
    return dict(parsed)


def near(name: str, valid: Sequence[str], *, listed: bool = True) -> str:
    """The end of a message: the nearest valid name, else all of them."""
    close = difflib.get_close_matches(name[:100], valid, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(valid)}" if valid and listed else ""


def short(value: Any) -> str:
    """A value as it is shown in a message, bounded in depth and breadth."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
