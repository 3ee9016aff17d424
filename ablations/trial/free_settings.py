"""The free setting of a calibrated trial: ``budget: {count: auto}``, ``{ratio: auto}`` or ``{drop: auto}``.

Stages as data with one number left open, the ladder of settings it can take, and the stages with a setting written in:
plain data again, that anyone can rerun. Which rung meets a cost is found in ``calibrate``.

A free drop with a schedule (``budget: {drop: auto}, schedule: {late: 2}``) is a total over the blocks of its stage;
what it comes to at each is written in by ``placement_from``, which knows the schedules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

StageList = Sequence[Mapping[str, Any]]  # as of ``Stages``, or as it is written in a spec
Setting = int | Fraction

AUTO = "auto"
KINDS = ("count", "ratio", "drop")
_ANY: Mapping[str, Setting] = dict.fromkeys(KINDS, 1)
_WRITTEN = re.compile(r"\d+(?:\.\d+|/(\d+))?")
_LONGEST = 64  # characters of a number
_RATIO_STEPS = 1000  # a keep rate is sought in thousandths …
SAMPLERS = {"ats"}  # reducers whose count is of sample points, not of tokens
_POINT_STEP, _POINT_RUNGS = 1.05, 86  # 1.05 ** 85 is about 64
_DROP_STEPS = 100  # … and the tokens dropped at a block, on average over the blocks, in hundredths
_TOTALS_BY_ONE, _TOTAL_STEP, _MOST_TOTAL = 8, 1.005, 64  # totals: times the patches; a step; times patches and blocks


def budgets_in(stages: Any) -> list[Mapping[str, Any]]:
    """Every budget in nested data, those of selectors inside a reducer included."""
    if isinstance(stages, Mapping):
        own = [stages["budget"]] if isinstance(stages.get("budget"), Mapping) else []
        return own + [b for key, part in stages.items() if key != "budget" for b in budgets_in(part)]
    return [b for part in stages for b in budgets_in(part)] if isinstance(stages, list | tuple) else []


def free_kinds(stages: Any) -> set[str]:
    """Which kinds of budget are written ``auto``."""
    return {kind for budget in budgets_in(stages) for kind in KINDS if budget.get(kind) == AUTO}


def stand_in(kind: str, stages: Any, patches: int) -> Setting:
    """A setting well inside the possible that no budget of these stages names, so that it can be told apart."""
    named = {_number(budget[kind]) for budget in budgets_in(stages) if kind in budget}
    if kind == "ratio":
        return next(r for n in range(500, 2000) if (r := Fraction(n, 1000 + n)) not in named)
    first = max(1, patches // 2) if kind == "count" else 1
    return next(n for n in range(first, first + len(named) + 1) if n not in named)


def write(stages: Any, kind: str, setting: Setting) -> Any:
    """The same data with every free budget of a kind set to one value."""
    return _with_budgets(stages, lambda b: {**b, kind: _plain(setting)} if b.get(kind) == AUTO else b)


def filled(stages: Any, settings: Mapping[str, Setting] = _ANY) -> Any:
    """The same data with a number wherever a budget is free, by kind, and no schedules: for what does not depend on
    which, or on how many tokens go where.
    """
    stages = without_schedules(stages)
    for kind in sorted(free_kinds(stages)):
        stages = write(stages, kind, settings[kind])
    return stages


def without_schedules(data: Any) -> Any:
    """The same data as if every reducer with a schedule had its budget at each block; a list alone is its sum."""
    if isinstance(data, Mapping):
        kept = {key: without_schedules(part) for key, part in data.items() if key != "schedule" or "name" not in data}
        listed = data.get("schedule") if "name" in data else None
        if isinstance(listed, list | tuple) and "budget" not in data:
            kept["budget"] = {"drop": sum(number for number in listed if isinstance(number, int))}
        return kept
    return [without_schedules(part) for part in data] if isinstance(data, list | tuple) else data


def sought_schedules(stages: Any) -> list[tuple[int, Any]]:
    """Every schedule whose total is free: over how many blocks, and the schedule as it is written."""
    return [
        (len(stage["at"]), reducer["schedule"])
        for stage in stages
        for reducer in stage["stack"]
        if isinstance(reducer, Mapping) and "schedule" in reducer and free_kinds(reducer)
    ]


def free(stages: Any, kind: str, setting: Setting) -> Any:
    """The inverse of ``write``: budgets of this very value become free."""
    return _with_budgets(stages, lambda b: {**b, kind: AUTO} if kind in b and _number(b[kind]) == setting else b)


def ladder(stages: StageList, kind: str, patches: int) -> list[Setting]:
    """Every setting worth trying, from the cheapest to the dearest.

    count: 1 … all patches, and where all free counts are numbers of sample points (ATS), which several may fall on one
    token, on to 64 times as many in steps of 5 %. ratio: thousandths. drop: tokens removed at a block on average
    over the blocks, in hundredths, of which only those that give different whole numbers somewhere are listed; with a
    schedule the total over its blocks, of which likewise, and beyond eight times the patches, where most of it is cut
    to half of what is left at a block, in steps of half a percent.
    """
    if kind == "count":
        counts: list[Setting] = list(range(1, patches + 1))
        if _free_names(stages) <= SAMPLERS:
            counts += sorted({round(patches * _POINT_STEP**n) for n in range(1, _POINT_RUNGS)} - set(counts))
        return counts
    if kind == "ratio":
        return [Fraction(n, _RATIO_STEPS) for n in range(1, _RATIO_STEPS + 1)]
    sought = sought_schedules(stages)
    if sought:
        return _totals(sought, patches)
    blocks = len(_free_blocks(stages))
    rungs: dict[tuple[int, ...], Setting] = {}
    for step in range(_DROP_STEPS * max(1, patches // 2), 0, -1):
        rate = Fraction(step, _DROP_STEPS)
        drops = tuple(drop_schedule(rate, blocks, patches))
        if any(drops):
            rungs.setdefault(drops, rate)
    return list(rungs.values())


def _totals(sought: Sequence[tuple[int, Any]], patches: int) -> list[Setting]:
    """The totals that leave different numbers somewhere, the largest first; of those that leave the same the least."""
    blocks = max(count for count, _ in sought)
    totals = list(range(1, _TOTALS_BY_ONE * patches + 1))
    while totals[-1] < _MOST_TOTAL * patches * blocks:
        totals.append(int(totals[-1] * _TOTAL_STEP) + 1)
    rungs: dict[tuple[tuple[int, ...], ...], Setting] = {}
    for total in totals:
        drops = realised_drops(sought, total, patches)
        if any(map(any, drops)):
            rungs.setdefault(drops, total)
    return list(rungs.values())[::-1]


def realised_drops(sought: Sequence[tuple[int, Any]], total: int, patches: int) -> tuple[tuple[int, ...], ...]:
    """What each schedule of ``sought_schedules`` removes at its blocks: of a total that is too large at some, less."""
    from reducers.schedule import clipped, parse_schedule  # and with it torch, which other settings can do without

    return tuple(tuple(clipped(parse_schedule(each).drops(total, blocks), patches)) for blocks, each in sought)


def drop_schedule(rate: Fraction, blocks: int, patches: int) -> list[int]:
    """Whole tokens to drop at each of ``blocks`` blocks, ``rate`` on average: floor((i + 1) rate) - floor(i rate).

    Never more than half of the tokens that are left: what one round of pairwise merging can remove.
    """
    left, drops = patches, []
    for before, after in pairwise(i * rate.numerator // rate.denominator for i in range(blocks + 1)):
        drops.append(min(after - before, left // 2))
        left -= drops[-1]
    return drops


def settle(stages: StageList, kind: str, setting: Setting, patches: int) -> list[dict[str, Any]]:
    """The stages with the setting written in, every block spelled out; a drop of none leaves the reducer out. What has
    a schedule keeps it, with the total as its budget.
    """
    if kind != "drop" or sought_schedules(stages):
        settled: list[dict[str, Any]] = write(stages, kind, setting)
        return settled
    blocks = _free_blocks(stages)
    drops = dict(zip(blocks, drop_schedule(Fraction(setting), len(blocks), patches), strict=True))
    spelled: list[dict[str, Any]] = []
    for stage in stages:
        for block in stage["at"]:
            spare = drops.get(block) == 0
            stack = [r for r in stage["stack"] if not (spare and free_kinds(r))]
            if stack:
                spelled.append({"at": [block], "stack": write(stack, kind, drops.get(block, 0))})
    return spelled


def setting_label(kind: str, setting: Setting, stages: StageList = (), patches: int = 0) -> str:
    """``K = 57``, ``keep 0.613``, ``r = 5.37``, or with a schedule in the ``stages``, of so many ``patches``,
    ``R = 192, late 2 (173 go)``.
    """
    sought = sought_schedules(stages)
    if sought:
        went = [sum(drops) for drops in realised_drops(sought, int(setting), patches)]
        told = [f"{schedule_label(each)} ({gone} go)" for (_, each), gone in zip(sought, went, strict=True)]
        return ", ".join([f"R = {setting}", *dict.fromkeys(told)])
    if kind == "count":
        return f"K = {setting}"
    return f"keep {float(setting):g}" if kind == "ratio" else f"r = {float(setting):g}"


def schedule_label(written: Any) -> str:
    """``late 2``, ``flat``, ``linear 4 to 12``, or ``listed``."""
    if not isinstance(written, Mapping):
        return written if isinstance(written, str) else "listed"
    ((name, value),) = written.items()
    return f"{name} {' to '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _free_names(stages: StageList) -> set[str]:
    """The reducers whose own budget is free."""
    reducers = [reducer for stage in stages for reducer in stage["stack"]]
    nested = [reducer["select"] for reducer in reducers if isinstance(reducer.get("select"), Mapping)]
    return {str(r.get("name")) for r in [*reducers, *nested] if AUTO in dict(r.get("budget") or {}).values()}


def _free_blocks(stages: StageList) -> list[int]:
    """The blocks whose drop is sought, ascending."""
    return sorted({block for stage in stages if free_kinds(stage["stack"]) for block in stage["at"]})


def _with_budgets(data: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if isinstance(data, Mapping):
        return {
            key: change(dict(part)) if key == "budget" and isinstance(part, Mapping) else _with_budgets(part, change)
            for key, part in data.items()
        }
    return [_with_budgets(part, change) for part in data] if isinstance(data, list | tuple) else data


def _number(value: Any) -> Fraction | None:
    """A number as written in a budget, exactly; None for anything else."""
    text = str(value)
    written = _WRITTEN.fullmatch(text) if len(text) <= _LONGEST else None  # beyond, its digits alone would take long
    return Fraction(text) if written and int(written[1] or 1) else None


def _plain(setting: Setting) -> int | float | str:
    """A fraction as the decimal that is exactly it, else as its text."""
    if isinstance(setting, int):
        return setting
    return float(setting) if Fraction(str(float(setting))) == setting else str(setting)


__all__ = [
    "AUTO", "KINDS", "Setting", "StageList", "budgets_in", "drop_schedule", "filled", "free", "free_kinds", "ladder",
    "realised_drops", "schedule_label", "setting_label", "settle", "sought_schedules", "stand_in",
    "without_schedules", "write",
]  # fmt: skip
