"""Series side by side at one cost: who leads, and who cannot be told apart from the leader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from analysis import stats, style
from analysis.matching import at_cost, cost_levels, dense_gmacs
from analysis.tables import percent, with_bounds

Images = Mapping[str, pd.DataFrame]
SAME = "not distinguishable"
SAME_COST = 0.01  # a leader that spends more than this share of the dense cost above another has not beaten it


@dataclass(frozen=True)
class Finding:
    """A sentence, what stands behind it, and the trials it was computed from."""

    text: str
    detail: str = ""
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The trials of several groups at one cost, best first, and how each stands to the leader.

    ``standing``, one a row after the leader: "same" (not told apart), "worse" (told apart at no lower cost),
    "cheaper" (told apart, but the leader also spent more: a lower accuracy says nothing).
    """

    level: float
    rows: pd.DataFrame
    by: str
    standing: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [name.replace("_", " ") for name in self.rows[self.by]]

    def others(self, standing: str) -> list[tuple[str, float]]:
        """(name, top-1) of those after the leader that stand so to it."""
        rest = zip(self.names[1:], self.rows["top1"].iloc[1:], self.standing, strict=True)
        return [(name, float(top1)) for name, top1, how in rest if how == standing]

    @property
    def clear(self) -> bool:
        """Whether every other is worse."""
        return set(self.standing) == {"worse"}


def compare_at(rows: pd.DataFrame, level: float, *, by: str, images: Images) -> Comparison:
    """Rank the groups at a cost. Told apart: McNemar's exact test, Holm over the leader's comparisons, at 5
    %; by intervals that do not overlap where the per-image tables are missing.
    """
    part = at_cost(rows, level, by=by).sort_values("top1", ascending=False, kind="stable").reset_index(drop=True)
    lead, others = part.iloc[0], part.iloc[1:]
    if all(key in images for key in part["key"]):
        tests = [stats.compare(images[lead["key"]], images[key]).p_value for key in others["key"]]
        apart = [p < stats.ALPHA for p in stats.holm(tests)]
    else:
        apart = [bool(high < lead["top1_low"]) for high in others["top1_high"]]
    spared = lead["gmacs_mean"] - others["gmacs_mean"] > SAME_COST * dense_gmacs(rows)
    standing = tuple(
        ("cheaper" if less else "worse") if told else "same" for told, less in zip(apart, spared, strict=True)
    )
    return Comparison(level, part, by, standing)


def comparisons(rows: pd.DataFrame, *, by: str, images: Images, levels: list[float] | None = None) -> list[Comparison]:
    levels = cost_levels(rows, by=by, count=6) if levels is None else levels
    return [compare_at(rows, level, by=by, images=images) for level in levels]


def say(found: Comparison, dense: float) -> Finding:
    """One comparison as a sentence."""
    lead, costs = found.rows.iloc[0], found.rows["gmacs_mean"]
    ends = dict.fromkeys((style.cost(costs.min()), style.cost(costs.max())))
    text = (
        f"At {' to '.join(ends)} GMACs ({100 * found.level / dense:.0f} % of dense): {found.names[0]}, "
        f"{with_bounds(lead['top1'], lead['top1_low'], lead['top1_high'])} %"
    )
    same = [name for name, _ in found.others("same")]
    text += f"; {SAME} from it: {'; '.join(same)}" if same else "; clear of every other" if found.clear else ""
    details = []
    for standing, words in (("worse", "Clearly behind"), ("cheaper", "Behind, but also cheaper")):
        behind = [f"{name} {percent(top1 - lead['top1'], sign=True)}" for name, top1 in found.others(standing)]
        details += [f"{words}, in points: {'; '.join(behind)}."] if behind else []
    return Finding(f"{text}.", " ".join(details), tuple(found.rows["key"]))


def tally(found: list[Comparison], what: str) -> Finding | None:
    """Who leads how often over all costs compared, who was never clearly beaten, and who always was."""
    if not found:
        return None
    leads: dict[str, int] = {}
    met: dict[str, list[str]] = {}  # how each group stood wherever it was compared
    for one in found:
        leads[one.names[0]] = leads.get(one.names[0], 0) + 1
        for name, standing in zip(one.names, ("lead", *one.standing), strict=True):
            met.setdefault(name, []).append(standing)
    ranked = sorted(leads.items(), key=lambda item: -item[1])
    clear = sum(one.clear for one in found)
    said = [
        f"{what}: {'; '.join(f'{name} leads at {n} of {len(found)} costs' for name, n in ranked)}",
        f"The leader is clear of every other at {clear}" if clear else "At no cost is the leader clear of every other",
    ]
    even = [name for name, standing in met.items() if "worse" not in standing]
    beaten = [name for name, standing in met.items() if set(standing) == {"worse"}]
    said += [f"Never clearly beaten: {'; '.join(even)}"] if even and clear != len(found) else []
    said += [f"Clearly behind wherever compared: {'; '.join(beaten)}"] if beaten else []
    return Finding(". ".join(said) + ".")
