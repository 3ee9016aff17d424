"""The space that is searched: methods, their settings, blocks, schedules, and two methods in turn, as plain stages.

Every candidate leaves one kind of budget open (``auto``), which calibration settles, so that all of them cost the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ablations.search.errors import SearchError
from ablations.trial.free_settings import AUTO, SAMPLERS, StageList
from ablations.trial.labels import ranges
from ablations.trial.stages import plain
from reducers import available
from reducers.candidates import budget_kinds, searchable_settings, takes_schedule, why_no_candidate

SHAPES = ("one", "two")
EACH = 0  # "in every block from the first one on"
COUNTS = (1, 2, 3, 4, 6, EACH)  # blocks in which a method acts, evenly spaced to the last
KEPT = ("auto", 0.95, 0.9, 0.8, 0.7, 0.55)  # what the first of two methods keeps of all patches; auto: as the second
SCHEDULES = ("flat", "late", "later", "early")
_SPELLED: Mapping[str, Any] = {"late": {"late": 1}, "later": {"late": 2}, "early": {"early": 1}}
_SEVERAL = 3  # blocks, before a schedule differs from another


class Chooser(Protocol):
    """Who decides what is tried next: a sampler, or a test."""

    def one_of(self, name: str, options: Sequence[Any]) -> Any:
        """One of the options, plain data each."""

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number of low … high."""


@dataclass(frozen=True)
class Method:
    """A method of the space."""

    name: str
    kinds: tuple[str, ...] = ("ratio",)  # of budget that are tried
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # what it declares searchable
    scheduled: bool = False  # tokens dropped can be shared out over its blocks by a schedule


def methods(fits: Callable[[StageList], object], block: int) -> tuple[Method, ...]:
    """Every registered method that decides on images without training, at a cost that leaves nothing out, and is no
    control; of these, those that the model takes: ``fits`` raises ValueError for the others at ``block``.
    """
    found = []
    for name, kind in available().items():
        kinds = budget_kinds(kind)
        if why_no_candidate(kind) or "ratio" not in kinds:
            continue
        try:
            fits([{"at": [block], "stack": [{"name": name, "budget": {"ratio": 0.5}}]}])
        except ValueError:
            continue
        tried = ("ratio", *(("drop",) if "drop" in kinds else ()), *(("count",) if name in SAMPLERS else ()))
        found.append(Method(name, tried, searchable_settings(kind), takes_schedule(kind)))
    return tuple(found)


@dataclass(frozen=True)
class Space:
    """Everything that may be proposed for a model."""

    methods: tuple[Method, ...]
    free: tuple[int, ...]  # the blocks where a reducer may act
    latest: int | None = None  # the last block at which the first method may begin: later, the cost is spent already

    def __post_init__(self) -> None:
        if not self.methods or not self.free:
            raise SearchError("no method can be searched over here: `sievit list --reducers` says what each needs")

    def draw(self, choose: Chooser) -> StageList:
        """One candidate, as the chooser wants it."""
        two = choose.one_of("shape", SHAPES) == "two"
        if two:
            return self._two(choose)
        return self._one(choose)

    def _method(self, choose: Chooser, place: str) -> Method:
        name = choose.one_of(f"{place} method", [method.name for method in self.methods])
        return next(method for method in self.methods if method.name == name)

    def _blocks(self, choose: Chooser, place: str) -> list[int]:
        latest = self.free[-1] if place != "first" or self.latest is None else self.latest
        begin = [block for block in self.free if block <= latest] or self.free[:1]
        start = choose.whole(f"{place} from", 0, len(begin) - 1)
        count = choose.one_of(f"{place} blocks", COUNTS)
        return spread(self.free[start:], count)

    def _one(self, choose: Chooser) -> StageList:
        method, blocks = self._method(choose, "first"), self._blocks(choose, "first")
        kind = method.kinds[0] if len(method.kinds) == 1 else choose.one_of(f"{method.name} budget", method.kinds)
        reducer = self._reducer(choose, "first", method, budget={kind: AUTO})
        if kind == "drop" and method.scheduled and len(blocks) >= _SEVERAL:
            schedule = choose.one_of("schedule", SCHEDULES)
            if schedule != "flat":
                reducer["schedule"] = _SPELLED[schedule]
        return [{"at": blocks, "stack": [reducer]}]

    def _two(self, choose: Chooser) -> StageList:
        """Two methods: where they share a block, the first acts first."""
        first, second = self._method(choose, "first"), self._method(choose, "second")
        early, late = self._blocks(choose, "first"), self._blocks(choose, "second")
        kept = choose.one_of("first keeps", KEPT)
        budget = {"ratio": AUTO if kept == "auto" else _each(kept, len(early))}
        one = self._reducer(choose, "first", first, budget=budget)
        other = self._reducer(choose, "second", second, budget={"ratio": AUTO})
        acting = {block: [] for block in sorted({*early, *late})}  # type: dict[int, list[dict[str, Any]]]
        for blocks, reducer in ((early, one), (late, other)):
            for block in blocks:
                acting[block].append(reducer)
        return _joined(acting)

    def _reducer(self, choose: Chooser, place: str, method: Method, *, budget: Mapping[str, Any]) -> dict[str, Any]:
        """A reducer as stages write it, defaults left out."""
        reducer: dict[str, Any] = {"name": method.name, "budget": _rounded(method.name, budget)}
        for setting, values in method.settings.items():
            value = plain(choose.one_of(f"{place} {method.name} {setting}", values))
            if value == plain(values[0]):
                continue
            if isinstance(value, dict) and "name" in value:
                value = {"budget": _rounded(value["name"], budget), **value}  # a chooser inside: of as many tokens
            reducer[setting] = value
        return reducer


def starts(space: Space) -> list[dict[str, Any]]:
    """What is tried first: each method with its defaults at three blocks, as many papers place it, then in every block,
    as those do that merge a few tokens at a time. Who does not come to the cost that way is passed over.
    """
    found = []
    for start, count in ((len(space.free) // 4, 3), (0, EACH)):
        for method in space.methods:
            choices: dict[str, Any] = {
                "shape": "one", "first method": method.name, "first from": start, "first blocks": count,
            }  # fmt: skip
            if len(method.kinds) > 1:
                choices[f"{method.name} budget"] = method.kinds[0]
            choices.update(
                {f"first {method.name} {name}": plain(values[0]) for name, values in method.settings.items()}
            )
            found.append(choices)
    return found


def spread(blocks: Sequence[int], count: int) -> list[int]:
    """``count`` of the blocks, evenly spaced from the first on; ``EACH``: all of them."""
    if count == EACH or count >= len(blocks):
        return list(blocks)
    return [blocks[number * len(blocks) // count] for number in range(count)]


def _each(kept: float, blocks: int) -> float:
    """The keep rate of each block with which so many of all patches are kept, in thousandths."""
    return round(kept ** (1 / blocks), 3)


def _rounded(name: str, budget: Mapping[str, Any]) -> dict[str, Any]:
    """ATS samples as many points as it may keep, to the nearest whole: a share of few tokens would else cost one."""
    return {**budget, "rounding": "nearest"} if name == "ats" and "ratio" in budget else dict(budget)


def _joined(acting: Mapping[int, list[dict[str, Any]]]) -> StageList:
    """Blocks with the same reducers in one stage, in the order of their first blocks."""
    stages: list[dict[str, Any]] = []
    for block, stack in acting.items():
        for stage in stages:
            if stage["stack"] == stack:
                stage["at"].append(block)
                break
        else:
            stages.append({"at": [block], "stack": stack})
    return stages


def describe(stages: StageList) -> str:
    """A candidate in words: ``ToMe 0-5, then ATS 6-11 (score key_norm)``, one method after the other."""
    acting: dict[str, list[int]] = {}
    for stage in stages:
        for reducer in stage["stack"]:
            acting.setdefault(_words(reducer), []).extend(stage["at"])
    return ", then ".join(f"{what.replace('@', ranges(sorted(blocks)))}" for what, blocks in acting.items())


def _words(reducer: Mapping[str, Any]) -> str:
    said = [f"{name} {_value(value)}" for name, value in reducer.items() if name not in ("name", "budget")]
    said += [kind for kind, value in reducer.get("budget", {}).items()
             if value == AUTO and kind != "ratio" and "schedule" not in reducer]  # fmt: skip
    said += [f"keep {value:g}" for kind, value in reducer.get("budget", {}).items() if _fixed(kind, value)]
    named = available()[reducer["name"]].__name__
    return f"{named} @" + (f" ({', '.join(said)})" if said else "")


def _fixed(kind: str, value: Any) -> bool:
    return kind == "ratio" and isinstance(value, int | float)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        if "name" in value:
            return available()[value["name"]].__name__
        return ", ".join(f"{name} {number:g}" if isinstance(number, int | float) else f"{name} {number}"
                         for name, number in value.items())  # fmt: skip
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
