"""How trials are named for people: placements, budgets, targets, scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ablations.trial.free_settings import (
    AUTO,
    KINDS,
    StageList,
    free_kinds,
    schedule_label,
    stand_in,
    without_schedules,
    write,
)

if TYPE_CHECKING:
    from reducers import TokenReducer


def blocks_of(stages: StageList) -> list[int]:
    """Every block at which something reduces, ascending."""
    return sorted({block for stage in stages for block in stage["at"]})


def placement_label(blocks: Sequence[int]) -> str:
    """``block 3``, ``blocks 3-11``, ``blocks 3, 6, 9``; runs of three or more are written as a range."""
    return f"block{'s' if len(blocks) > 1 else ''} {ranges(blocks)}" if blocks else "no block"


def ranges(blocks: Sequence[int]) -> str:
    """Ascending blocks: ``3``, ``3-11``, ``3, 6, 9``."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def resolve_count(ratio: float | str, total: int, rounding: str = "nearest") -> int:
    """How many of ``total`` tokens a ratio keeps; halves round up, and ``"48/196"`` is taken exactly."""
    exact = Fraction(ratio if isinstance(ratio, str) else str(ratio)) * total
    if rounding == "floor":
        return math.floor(exact)
    return math.ceil(exact) if rounding == "ceil" else math.floor(exact + Fraction(1, 2))


def budget_number(budget: Mapping[str, Any], patches: int) -> float:
    """The number a reader knows a budget by: patches kept (K), tokens removed (r) or the keep rate."""
    if "ratio" not in budget:
        return float(budget.get("count", budget.get("drop", 0)))
    if budget.get("of", "current") == "initial":
        return float(resolve_count(budget["ratio"], patches, budget.get("rounding", "nearest")))
    return float(Fraction(str(budget["ratio"])))


def budget_label(budget: Mapping[str, Any], patches: int) -> str:
    """``K = 98``, ``r = 13`` or ``keep 0.7``; ``K = auto`` where it is sought."""
    if AUTO in (budget.get(kind) for kind in KINDS):
        return "K = auto" if "count" in budget else "r = auto" if "drop" in budget else "keep auto"
    number = budget_number(budget, patches)
    if "drop" in budget:
        return f"r = {number:g}"
    return f"K = {number:g}" if "count" in budget or budget.get("of") == "initial" else f"keep {number:.3g}"


def with_nested(reducer: TokenReducer) -> Iterable[TokenReducer]:
    """A reducer and those inside it: the choosing half of an EViT, the members of a stack."""
    from reducers import TokenReducer

    yield reducer
    for member in (getattr(reducer, "select", None), *getattr(reducer, "members", ())):
        if isinstance(member, TokenReducer):
            yield from with_nested(member)


def labels_of(stages: StageList, patches: int) -> dict[str, str | None]:
    """The columns ``score`` and ``budget``: what decides and how much stays, several joined in order."""
    from reducers import build  # and with it torch, which names of blocks and budgets can do without

    scores: dict[str, None] = {}
    budgets: dict[str, None] = {}
    drops: list[float] = []  # one an acting block
    counts: dict[str, dict[str, None]] = {}  # of each method, first block to last
    for blocks, spec in ((stage["at"], reducer) for stage in stages for reducer in stage["stack"]):
        inner = list(with_nested(build(_buildable(spec, patches))))
        chooser = inner[-1] if len(inner) > 1 else inner[0]
        score = getattr(chooser, "score", None)
        if isinstance(score, str):
            scores[score] = None
        if isinstance(spec.get("budget"), Mapping):
            label = budget_label(spec["budget"], patches)
            if "schedule" in spec:
                label = f"{label.replace('r', 'R', 1)}, {schedule_label(spec['schedule'])}"
            elif isinstance(spec["budget"].get("drop"), int):
                drops += [float(spec["budget"]["drop"])] * len(blocks)
                label = "drop"
            elif "count" in spec["budget"]:
                counts.setdefault(spec["name"], {})[label] = None
            budgets[label] = None
    budgets = _in_short(budgets, counts)
    if drops:
        mean = f"r = {sum(drops) / len(drops):.3g}" + (" on average" if len(set(drops)) > 1 else "")
        budgets = {mean if label == "drop" else label: None for label in budgets}
    return {"score": " + ".join(scores) or None, "budget": " + ".join(budgets) or None}


def _in_short(budgets: Mapping[str, None], counts: Mapping[str, Mapping[str, None]]) -> dict[str, None]:
    """The labels with ``K = 195 … 24`` for a method whose count is another at more than three blocks, as schedules have
    it.
    """
    short = dict(budgets)
    for own in counts.values():
        if len(own) > 3:
            first, *_, last = own
            said = f"{first} … {last.removeprefix('K = ')}"
            short = dict.fromkeys(said if label in own else label for label in short)
    return short


def target_label(target: float) -> str:
    """``0.50 of dense``"""
    return f"{target:.2f} of dense" if round(target, 2) == target else f"{target:g} of dense"


def _buildable(reducer: Mapping[str, Any], patches: int) -> dict[str, Any]:
    """A reducer that can be built: a setting still to be sought stands at some value, and a schedule is left out."""
    built: dict[str, Any] = without_schedules(reducer)
    for kind in free_kinds(reducer):
        built = write(built, kind, stand_in(kind, built, patches))
    return built
