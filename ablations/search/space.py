"""The space that is searched: methods, their settings, blocks, schedules, and two methods in turn, as plain stages.

Every candidate leaves one kind of budget open (``auto``), which calibration settles, so that all of them cost the same.
Where trained weights are given, each training is a part of the space as well: its own placement with the budget left
open, or as it was trained, alone or before another method. Only what was trained stands there as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ablations.search.errors import SearchError
from ablations.trial.free_settings import AUTO, KINDS, SAMPLERS, StageList, budgets_in, free_kinds
from ablations.trial.given import short_name
from ablations.trial.labels import ranges
from ablations.trial.stages import OFF_THE_SHELF, Training, plain
from reducers import available
from reducers.candidates import budget_kinds, searchable_settings, takes_schedule, why_no_candidate

SHAPES = ("one", "two")
TRAINED = "trained"  # a further shape, where trained weights are given
ALONE = "nothing"  # behind what was trained
AS_TRAINED = "as trained"
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


@dataclass(frozen=True)
class Drawn:
    """A candidate: its stages, and the training whose weights it has."""

    stages: StageList
    training: Training = OFF_THE_SHELF


@dataclass(frozen=True)
class Trained:
    """A training whose weights are given, and the placements that may be tried with them."""

    training: Training
    placements: Mapping[str, StageList]  # by the kind of budget that they leave open, or ``AS_TRAINED``

    @property
    def name(self) -> str:
        return short_name(self.training)


def trained(training: Training, fits: Callable[[StageList], object]) -> Trained:
    """What may be tried with the weights of a training: where it has reducers, with one kind of budget open that all
    of them have or take (``fits`` raises ValueError where not), and as it is.
    """
    stages = training.stages.plain()
    found: dict[str, StageList] = {}
    written = {kind for budget in budgets_in(stages) for kind in KINDS if kind in budget}
    for kind in (*sorted(written), *(("ratio",) if written and "ratio" not in written else ())):
        opened = _opened(stages, kind, replace=kind not in written)
        try:
            fits(opened)
        except ValueError:
            continue
        found[kind] = opened
    return Trained(training, {**found, AS_TRAINED: stages})


def _opened(data: Any, kind: str, *, replace: bool) -> Any:
    """The same stages with every budget of a kind open; ``replace``: in place of budgets of other kinds."""
    if isinstance(data, Mapping):
        made = {name: _opened(part, kind, replace=replace) for name, part in data.items() if name != "budget"}
        budget = data.get("budget")
        if not isinstance(budget, Mapping):
            return {**made, **({} if budget is None else {"budget": budget})}
        if replace:
            return {**made, "budget": {kind: AUTO}}
        return {**made, "budget": {**budget, kind: AUTO} if kind in budget else dict(budget)}
    return [_opened(part, kind, replace=replace) for part in data] if isinstance(data, list | tuple) else data


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
    given: tuple[Trained, ...] = ()  # whose weights are given

    def __post_init__(self) -> None:
        if not self.methods or not self.free:
            raise SearchError("no method can be searched over here: `sievit list --reducers` says what each needs")

    def draw(self, choose: Chooser) -> Drawn:
        """One candidate, as the chooser wants it."""
        shape = choose.one_of("shape", (*SHAPES, TRAINED) if self.given else SHAPES)
        if shape == TRAINED:
            return self._trained(choose)
        return Drawn(self._two(choose) if shape == "two" else self._one(choose))

    def _trained(self, choose: Chooser) -> Drawn:
        """Trained weights with the placement they were trained with, and perhaps a method behind it: in blocks of its
        own, since what was trained together stays together.
        """
        name = choose.one_of("training", [one.name for one in self.given])
        one = next(one for one in self.given if one.name == name)
        opened = choose.one_of(f"{name} budget", list(one.placements))
        stages = list(one.placements[opened])
        taken = {block for stage in stages for block in stage["at"]}
        later = [block for block in self.free if block > min(taken) and block not in taken]
        behind = choose.one_of("behind trained", [ALONE, *(method.name for method in self.methods)])
        if behind != ALONE and later and free_kinds(stages) <= {"ratio"}:
            method = next(method for method in self.methods if method.name == behind)
            start, count = choose.whole("behind from", 0, len(self.free) - 1), choose.one_of("behind blocks", COUNTS)
            blocks = spread(later[min(start, len(later) - 1) :], count)
            stages.append({"at": blocks, "stack": [self._reducer(choose, "behind", method, budget={"ratio": AUTO})]})
        return Drawn(stages, one.training)

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
    as those do that merge a few tokens at a time. Before them what was trained, alone. Who does not come to the cost
    that way is passed over.
    """
    found: list[dict[str, Any]] = [
        {"shape": TRAINED, "training": one.name, f"{one.name} budget": opened, "behind trained": ALONE}
        for one in space.given
        for opened in one.placements
    ]
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


def names_of(stages: StageList) -> Iterator[str]:
    """The methods in stages; a chooser inside another method is a part of that one."""
    for stage in stages:
        for reducer in stage["stack"]:
            yield str(reducer["name"])


def describe(stages: StageList, training: Training = OFF_THE_SHELF) -> str:
    """A candidate in words: ``ToMe 0-5, then ATS 6-11 (score key_norm)``, one method after the other; with trained
    weights ``DynamicViT 3, 6, 9 (trained 3f9c1b)``, by what they are and not by where they came from.
    """
    acting: dict[str, list[int]] = {}
    for stage in stages:
        for reducer in stage["stack"]:
            acting.setdefault(_words(reducer), []).extend(stage["at"])
    words = ", then ".join(f"{what.replace('@', ranges(sorted(blocks)))}" for what, blocks in acting.items())
    return f"{words} (trained {short_name(training)})" if training else words


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
