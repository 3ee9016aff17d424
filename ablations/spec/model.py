"""An ablation as data: a short YAML file, read safely and validated before anything runs.

A spec lists only what differs from its ``base``. Every arm is a curve of the spec's figure; ``vary`` spans the arm's
trials (all combinations), ``cases`` lists values that go together, ``set`` gives constants, and each replaces ``$name``
wherever it stands in the stages or in ``variant``. Every mistake becomes a ``SpecError`` that names the file, the place
and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ablations.records.files import user_path
from ablations.records.kinds import Answer
from ablations.spec.arms import SPECS, merged
from ablations.spec.plain_yaml import (
    Place,
    SpecError,
    check_plain,
    kind_of,
    line_of,
    parse_yaml,
    place_text,
)
from ablations.words import did_you_mean

MAX_BYTES = 64 * 1024  # a spec is about 25 lines
NAME = r"[a-z][a-z0-9_]{0,62}"

# --- the model --------------------------------------------------------------------------------------------------------

Scalar = bool | int | float | str
Portion = dict[Literal["last", "thirds", "from"], Scalar]  # of the blocks where reducers may act
Varied = Scalar | list[int] | Portion
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")]
Line = Annotated[str, StringConstraints(min_length=1, max_length=120, pattern=r"^[^\r\n]*$")]
Text = Annotated[str, StringConstraints(max_length=4000)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(
            f"a target of {value:g} cannot be reached: it is a share of the dense model's multiply-adds, "
            "above 0 and at most 1 (0.5 is half)"
        )
    return value


Share = Annotated[float, AfterValidator(_share)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Stage(_Strict):
    """Where (``3``, ``[3, 6, 9]``, ``"3-11"``, ``all``, ``every 2 from 1``, ``{last: 0.75}``, ``{thirds: true}``,
    ``{from: 3}``: block 3, or the first that takes a reducer) and what: reducers applied one after the other.
    """

    at: int | str | list[int | str] | Portion
    stack: list[dict[str, Any]] = Field(min_length=1, max_length=8)


class Arm(_Strict):
    """One curve. In ``base`` every key is a default for all arms; ``set`` is joined by name, the rest is replaced.

    ``only``: models it is for, by their names in a run; for others it is no arm. ``target``: shares of the dense
    model's multiply-adds, one trial each; what is ``auto`` in the budgets is sought. ``training``: how the weights are
    finetuned first, as ``finetune`` reads it. ``host``: how the model is driven, where it lets one choose
    (``{fill: zero}`` of a CvT: ``reduce_tokens``). ``measure: speed``: timed alone, in batches of ``batch`` images.
    ``restore``: by which rules tokens are put back in their places, for the task dense. The lists vary like those of
    ``vary``: as ``$target``, ``$batch``, ``$restore``, or ``x: target``.
    """

    variant: Line | None = None
    only: list[Line] | None = Field(default=None, min_length=1, max_length=100)
    stages: list[Stage] | None = Field(default=None, max_length=64)
    vary: dict[Variable, Annotated[list[Varied], Field(min_length=1, max_length=1000)]] = Field(default_factory=dict)
    cases: list[dict[Variable, Varied]] = Field(default_factory=list, max_length=1000)
    set: dict[Variable, Varied] = Field(default_factory=dict)
    target: list[Share] | None = Field(default=None, min_length=1, max_length=1000)
    training: dict[str, Any] | None = None
    host: dict[Variable, Line] | None = None
    measure: Literal["speed"] | None = None
    batch: list[Annotated[int, Field(ge=1, le=65536)]] | None = Field(default=None, min_length=1, max_length=100)
    restore: list[Literal["last", "owner", "zero"]] | None = Field(default=None, min_length=1, max_length=3)
    x: Variable | int | float | None = None
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1, max_length=100)

    def said(self) -> dict[str, Any]:
        """What was written, without the defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class AblationSpec(_Strict):
    """A question, the kind of its answer (which the report is made by, and no number), and the arms that answer it."""

    name: Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
    title: Line
    answers: Answer = "ranking"
    question: Text = ""
    caption: Text = ""
    published: Text = ""
    models: Literal["first", "all"] = "first"  # of the models of a run: the first, or every one
    default: bool | Literal["clips"] = True  # run where no spec is named: on images, or on clips
    recommended: dict[str, Any] | None = None  # of a placement file (reducers.load): what was found; no trial asks
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
        return [Arm.model_construct(**merged(self.base.said(), arm.said())) for arm in self.arms]


@dataclass(frozen=True, eq=False)
class SpecFile:
    """A validated spec and the file it stands in, so that later errors can still name the line."""

    spec: AblationSpec
    path: Path
    node: yaml.Node | None = None

    @property
    def shipped(self) -> bool:
        """Whether it is one of the specs that come with the package."""
        return self.path.parent == SPECS

    def error(self, place: Place, message: str) -> SpecError:
        """An error at a place of this file."""
        return SpecError(f"{self.path}{line_of(self.node, place)}: {place_text(place)}: {message}")


# --- reading ----------------------------------------------------------------------------------------------------------


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
    node, data = parse_yaml(text, path)
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a spec is a mapping with name, title and arms; got {kind_of(data)}")
    check_plain(data, (), path, node)
    try:
        spec = AblationSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError(_explain(error, path, node)) from error
    return SpecFile(spec, path, node)


def find_specs(
    names: Sequence[str] | None = None, folder: Path = SPECS, *, only_default: bool = True, clips: bool = False
) -> list[SpecFile]:
    """The named specs, shipped ones by name and others by path.

    Where none is named: all shipped ones that ``runs_by_default``, and the others as well if not ``only_default``.
    ``clips``: that is what the workload shows.
    """
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    chosen: list[Path] = []
    for name in names or shipped:
        if name in shipped:
            chosen.append(shipped[name])
        elif name.endswith((".yaml", ".yml")) or "/" in name:
            chosen.append(user_path(name))
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
    if names or not only_default:
        return files
    return [file for file in files if runs_by_default(file.spec, clips=clips)]


def runs_by_default(spec: AblationSpec, *, clips: bool) -> bool:
    """Whether a spec is run where none is named: ``default: clips`` is for workloads of clips, ``true`` for others."""
    return spec.default == "clips" if clips else spec.default is True


# --- saying what is wrong ---------------------------------------------------------------------------------------------


_EXPLAINED = 100  # mistakes looked at, of which some say the same: a place is found in time that grows with the file


def _explain(error: ValidationError, path: Path, node: yaml.Node | None) -> str:
    """The first mistakes, one a line, each with its place, and how many more there are."""
    lines: dict[str, None] = {}
    found = error.errors(include_url=False)
    for item in found[:_EXPLAINED]:
        place = _known_place(item["loc"], node)
        lines[f"{path}{line_of(node, place)}: {place_text(place)}: {_message(item['type'], item, place)}"] = None
    shown = list(lines)[:5]
    more = len(lines) - len(shown) + len(found[_EXPLAINED:])
    return "\n".join(shown + ([f"... and {more} more"] if more else []))


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
