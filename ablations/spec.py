"""An ablation as data: a short YAML file, read safely and validated before anything runs.

A spec lists only what differs from its ``base``. Every arm is a curve of the spec's figure; ``vary`` spans the arm's
trials (all combinations), ``cases`` lists values that go together, ``set`` gives constants, and each replaces ``$name``
wherever it stands in the stages or in ``variant``. Every mistake becomes a ``SpecError`` that names the file, the place
and the remedy.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

SPECS = Path(__file__).parent / "specs"
MAX_BYTES = 64 * 1024  # a spec is about 25 lines
MAX_NESTING = 24
NAME = r"[a-z][a-z0-9_]{0,62}"

Place = tuple[str | int, ...]


class SpecError(ValueError):
    """A spec that cannot run; the message names the file, the place in it and the remedy."""


# --- the model --------------------------------------------------------------------------------------------------------

Scalar = bool | int | float | str
Varied = Scalar | list[int]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")]
Line = Annotated[str, StringConstraints(min_length=1, max_length=120, pattern=r"^[^\r\n]*$")]
Text = Annotated[str, StringConstraints(max_length=4000)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Stage(_Strict):
    """Where (``3``, ``[3, 6, 9]``, ``"3-11"``, ``all``) and what: reducers applied one after the other."""

    at: int | str | list[int | str]
    stack: list[dict[str, Any]] = Field(min_length=1, max_length=8)


class Arm(_Strict):
    """One curve. In ``base`` every key is a default for all arms; ``set`` is joined by name, the rest is replaced."""

    variant: Line | None = None
    stages: list[Stage] | None = Field(default=None, max_length=64)
    vary: dict[Variable, Annotated[list[Varied], Field(min_length=1, max_length=1000)]] = Field(default_factory=dict)
    cases: list[dict[Variable, Varied]] = Field(default_factory=list, max_length=1000)
    set: dict[Variable, Varied] = Field(default_factory=dict)
    x: Variable | int | float | None = None
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1, max_length=100)


class AblationSpec(_Strict):
    """A question, and the arms that answer it."""

    name: Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
    title: Line
    question: Text = ""
    caption: Text = ""
    published: Text = ""
    base: Arm = Field(default_factory=Arm)
    arms: list[Arm] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _arms_are_complete(self) -> AblationSpec:
        for index, arm in enumerate(self.arms):
            for needed in ("variant", "stages"):
                if getattr(arm, needed) is None and getattr(self.base, needed) is None:
                    raise ValueError(f"arms[{index}] has no {needed!r} and base gives none; add it to one of them")
        return self

    def merged(self) -> list[Arm]:
        """The arms with the defaults of ``base`` filled in."""
        given = {name: getattr(self.base, name) for name in self.base.model_fields_set}
        return [
            Arm.model_construct(
                **{
                    **given,
                    **{name: getattr(arm, name) for name in arm.model_fields_set},
                    "set": {**self.base.set, **arm.set},
                }
            )
            for arm in self.arms
        ]


@dataclass(frozen=True, eq=False)
class SpecFile:
    """A validated spec and the file it stands in, so that later errors can still name the line."""

    spec: AblationSpec
    path: Path
    node: yaml.Node | None = None

    def error(self, place: Place, message: str) -> SpecError:
        """An error at a place of this file."""
        return SpecError(f"{self.path}{_line(self.node, place)}: {place_text(place)}: {message}")


# --- reading ----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
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


def load_spec(path: Path | str) -> SpecFile:
    """Read and validate one spec file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror or error}); check the name") from error
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{path}: more than {MAX_BYTES} bytes; a spec is about 25 lines, split it into several")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    return parse_spec(text, path)


def parse_spec(text: str, path: Path | str = "spec.yaml") -> SpecFile:
    """Validate the text of a spec; ``path`` names it in errors."""
    path = Path(path)
    node, data = _parse_yaml(text, path)
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a spec is a mapping with name, title and arms; got {_kind(data)}")
    _check_plain(data, (), path, node)
    try:
        spec = AblationSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError(_explain(error, path, node)) from error
    return SpecFile(spec, path, node)


def find_specs(names: Sequence[str] | None = None, folder: Path = SPECS) -> list[SpecFile]:
    """The named specs, shipped ones by name and others by path; all shipped ones where none is named."""
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    chosen: list[Path] = []
    for name in names or shipped:
        if name in shipped:
            chosen.append(shipped[name])
        elif name.endswith((".yaml", ".yml")) or "/" in name:
            chosen.append(Path(name))
        else:
            raise SpecError(
                f"no spec {name!r}{did_you_mean(name, shipped)}; there are {', '.join(shipped)}, "
                "or give the path of a .yaml file"
            )
    files = [load_spec(path) for path in dict.fromkeys(chosen)]
    owners: dict[str, Path] = {}
    for file in files:
        if file.spec.name in owners:
            raise file.error(("name",), f"{owners[file.spec.name]} is named {file.spec.name!r} too; rename one")
        owners[file.spec.name] = file.path
        if file.path.parent == folder and file.path.stem != file.spec.name:
            raise file.error(("name",), f"a shipped spec is named like its file: {file.path.stem!r}")
    return files


def _parse_yaml(text: str, path: Path) -> tuple[yaml.Node | None, Any]:
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
        raise SpecError(f"{path}{line}: {error.problem or 'not valid YAML'}") from error
    except RecursionError as error:
        raise SpecError(f"{path}: nested too deeply; a spec needs about six levels") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        # beyond YAMLError: characters YAML cannot hold, and PyYAML's own slips on values such as `!!int ""`
        raise SpecError(f"{path}: not valid YAML ({type(error).__name__}: {error})") from error


def _check_plain(value: Any, place: Place, path: Path, node: yaml.Node | None) -> None:
    """Only text, numbers, booleans, lists and mappings, all finite and none nested too deeply."""
    where = f"{path}{_line(node, place)}: {place_text(place)}"
    if len(place) > MAX_NESTING:
        raise SpecError(f"{where}: nested too deeply; a spec needs about six levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, (*place, key), path, node)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, (*place, index), path, node)
    elif isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{where}: {value} is no finite number")
    elif isinstance(value, int) and abs(value) > 2**53:
        raise SpecError(f"{where}: {value} is too large")
    elif value is not None and not isinstance(value, str | int | float):
        raise SpecError(f"{where}: {_kind(value)} is no plain value; put it in quotes")


# --- saying what is wrong ---------------------------------------------------------------------------------------------


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``; did you mean 'budget'?`` or nothing."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def place_text(place: Place) -> str:
    """``arms[1].stages[0].at``"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".") or "the spec"


def _line(node: yaml.Node | None, place: Place) -> str:
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


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _explain(error: ValidationError, path: Path, node: yaml.Node | None) -> str:
    """The first mistakes, one a line, each with its place."""
    lines: dict[str, None] = {}
    for item in error.errors(include_url=False):
        place = _known_place(item["loc"], node)
        lines[f"{path}{_line(node, place)}: {place_text(place)}: {_message(item['type'], item, place)}"] = None
    shown = list(lines)[:5]
    return "\n".join(shown + ([f"... and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []))


def _known_place(loc: Place, node: yaml.Node | None) -> Place:
    """A pydantic location without the parts that name alternatives of a union (``int``, ``list[int]``)."""
    kept: list[str | int] = []
    for part in loc:
        if isinstance(node, yaml.SequenceNode):
            if not isinstance(part, int):
                continue
            node = node.value[part] if part < len(node.value) else None
        elif isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == part), None)
        else:
            break
        kept.append(part)
    return tuple(kept)


def _message(kind: str, item: Any, place: Place) -> str:
    if kind == "extra_forbidden":
        inside = Stage if "stages" in place else Arm if place[0] in ("arms", "base") else AblationSpec
        known = list(inside.model_fields)
        return f"unknown key {place[-1]!r}{did_you_mean(place[-1], known)}; known here: {', '.join(known)}"
    if kind == "missing":
        return f"the key {item['loc'][-1]!r} is missing; add it"
    if kind == "string_pattern_mismatch" and place == ("name",):
        return "a name is lower-case letters, digits and underscores, e.g. 'k_values'"
    message = re.sub(r"^Value error, ", "", str(item["msg"]))
    return f"{message[:1].lower()}{message[1:]} (got {item['input']!r:.80})" if kind != "value_error" else message
