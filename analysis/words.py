"""Findings: sentences drawn from the data, and what several questions say alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis import style
from analysis.facts.choice import standings
from analysis.facts.comparison import Comparison
from analysis.facts.matching import INTERPOLATED, NOT_AIMED
from analysis.tables import percent, with_bounds

SAME = "not distinguishable"


@dataclass(frozen=True)
class Finding:
    """A sentence, what stands behind it, and the trials it was computed from; a ``headline`` opens the report."""

    text: str
    detail: str = ""
    keys: tuple[str, ...] = ()
    headline: bool = False


def spoken(variant: object) -> str:
    """A series as sentences name it."""
    return str(variant).replace("_", " ")


def say(found: Comparison, dense: float) -> Finding:
    """One comparison as a sentence."""
    lead, costs = found.rows.iloc[0], found.rows["gmacs_mean"]
    ends = dict.fromkeys((style.cost(costs.min()), style.cost(costs.max())))
    of_dense = "" if math.isnan(dense) else f" ({100 * found.level / dense:.0f} % of dense)"
    text = (
        f"At {' to '.join(ends)} GMACs{of_dense}: {found.names[0]}, "
        f"{with_bounds(lead['top1'], lead['top1_low'], lead['top1_high'])} %"
    )
    same = [name for name, _ in found.others("same")]
    text += f"; {SAME} from it: {'; '.join(same)}" if same else "; clear of every other" if found.clear else ""
    details = []
    for standing, words in (("worse", "Clearly behind"), ("cheaper", "Behind, but also cheaper")):
        behind = [f"{name} {percent(top1 - lead['top1'], sign=True)}" for name, top1 in found.others(standing)]
        details += [f"{words}, in points: {'; '.join(behind)}."] if behind else []
    between = [name for name, how in zip(found.names, found.rows["how"], strict=True) if how == INTERPOLATED]
    details += [f"Interpolated between its own neighbouring costs: {'; '.join(between)}."] if between else []
    reasons = dict.fromkeys(reason for _, reason in found.left_out if reason != NOT_AIMED)  # these are named once
    left = [
        f"{', '.join(spoken(name) for name, own in found.left_out if own == reason)} ({reason})" for reason in reasons
    ]
    details += [f"Not at this cost: {'; '.join(left)}."] if left else []
    return Finding(f"{text}.", " ".join(details), found.keys)


def tally(found: list[Comparison], noun: str) -> Finding | None:
    """Which ``noun`` is best over all costs compared, who was never clearly beaten, and who always was."""
    if not found:
        return None
    stood = standings(found)
    clear = sum(one.clear for one in found)
    said = [_verdict(noun, list(stood.leads.items()), len(found))]
    # behind and a little cheaper everywhere is not even with anybody
    even = [n for n, standing in stood.met.items() if "worse" not in standing and set(standing) != {"cheaper"}]
    beaten = [name for name, standing in stood.met.items() if set(standing) == {"worse"}]
    said += [f"Never clearly beaten: {_few(even)}"] if even and clear != len(found) else []
    said += [f"Clearly behind wherever compared: {_few(beaten)}"] if beaten else []
    apart = sum(standing != "same" for one in found for standing in one.standing)
    total = sum(len(one.standing) for one in found)
    said += [f"Of {total} comparisons with a leader {apart} are told apart (Holm), {total - apart} are not"]
    keys = tuple(dict.fromkeys(key for one in found for key in one.keys))
    return Finding(". ".join(said) + ".", keys=keys, headline=True)


def natural(found: list[Comparison]) -> Finding | None:
    """Which groups were run at settings of their own and not at a common cost: none of the comparisons holds them."""
    always = [{name for name, reason in one.left_out if reason == NOT_AIMED} for one in found]
    names = [name for name, _ in found[0].left_out if all(name in part for part in always)] if found else []
    if not names:
        return None
    return Finding(f"Run at settings of their own, not at a common cost, and ranked nowhere: {_listed(names)}.")


def _listed(names: list[str]) -> str:
    return "; ".join(map(spoken, names))


def _few(names: list[str], most: int = 6) -> str:
    """Names in a sentence; of very many the first, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most + 1 else ""
    return "; ".join(names[:most] if more else names) + more


def _verdict(noun: str, ranked: list[tuple[str, list[bool]]], costs: int) -> str:
    """Who is best, in one sentence that says how sure that is, for each leader on its own."""
    leaders = [
        f"{name} has the highest top-1 at {len(clear)} of {costs} costs"
        + (f" (clear of every other at {sum(clear)})" if any(clear) else "")
        for name, clear in ranked
    ]
    text = "; ".join(leaders) + ("" if any(any(clear) for _, clear in ranked) else "; at none clear of every other")
    best = len(ranked) == 1 and 2 * sum(ranked[0][1]) >= costs
    return f"Best {noun}: {text}" if best else f"No {noun} is clearly best: {text}"
