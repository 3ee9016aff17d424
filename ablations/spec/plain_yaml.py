"""Plain data from YAML: read without its traps, with the line of every place for messages that
name it, and ``$name`` replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_NESTING = 24
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z]\w*))")

Place = tuple[str | int, ...]


class SpecError(ValueError):
    """A spec that cannot run; the message names the file, the place in it and the remedy."""


class _Loader(yaml.SafeLoader):
    """YAML without its traps: plain data only, no duplicate keys, no aliases (they can grow without bound)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; repeat the value", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {getattr(key, 'value', '')!r} is no plain name; put it in quotes", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r}; keep one of the two", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# dates stay text, `<<` and `=` are names like any other, and truth is true or false, not on, off, yes or no
_UNWANTED = (":timestamp", ":merge", ":value", ":bool")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_UNWANTED)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


def parse_yaml(text: str, path: Path) -> tuple[yaml.Node | None, Any]:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return node, loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise SpecError(f"{path}{line}: {error.problem or 'not valid YAML':.300}") from error
    except RecursionError as error:
        raise SpecError(f"{path}: nested too deeply; a spec needs about six levels") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        # beyond YAMLError: characters YAML cannot hold, and PyYAML's own slips on values such as `!!int ""`
        raise SpecError(f"{path}: not valid YAML ({type(error).__name__}: {error})") from error


def check_plain(value: Any, place: Place, path: Path, node: yaml.Node | None) -> None:
    """Only text, numbers, booleans, lists and mappings, all finite and none nested too deeply."""
    wrong = _not_plain(value, place)
    if wrong:
        raise SpecError(f"{path}{line_of(node, place)}: {place_text(place)}: {wrong}")
    for part, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        check_plain(item, (*place, part), path, node)


def _not_plain(value: Any, place: Place) -> str:
    """What is wrong with a value itself; "" where nothing is."""
    if len(place) > MAX_NESTING:
        return "nested too deeply; a spec needs about six levels"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number"
    if isinstance(value, int) and abs(value) > 2**53:
        return f"a whole number of {value.bit_length()} bits is too large"
    if value is not None and not isinstance(value, str | int | float | dict | list):
        return f"{kind_of(value)} is no plain value; put it in quotes"
    return ""


def variables(value: Any) -> set[str]:
    """The names after ``$`` anywhere in nested data."""
    if isinstance(value, str):
        return {braced or plain for braced, plain in _VARIABLE.findall(value)}
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return set().union(*map(variables, inner))


def substitute(value: Any, values: Mapping[str, Any]) -> Any:
    """Replace ``$name``: a string that is nothing else becomes the value itself, inside other text its text."""
    if isinstance(value, Mapping):
        return {key: substitute(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, values) for item in value]
    if not isinstance(value, str):
        return value
    whole = _VARIABLE.fullmatch(value)
    if whole:
        return values[whole[1] or whole[2]]
    return _VARIABLE.sub(lambda match: str(values[match[1] or match[2]]), value)


def place_text(place: Place) -> str:
    """``arms[1].stages[0].at``"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".") or "the spec"


def line_of(node: yaml.Node | None, place: Place) -> str:
    """``:12``, the line of a place or of the nearest thing around it."""
    for part in place:
        inner: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            inner = next((value for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            inner = node.value[part]
        if inner is None:
            break
        node = inner
    return "" if node is None else f":{node.start_mark.line + 1}"


def kind_of(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
