"""Which trials may be set beside each other: seeds of one computation, and trials of the same cost.

A cost at which series meet is a *target* that trials were calibrated to, or, in results without targets, a cost at
which trials happen to lie close together. A row that could not be set to the target is interpolated between its own
neighbours or left out, and says so in ``how``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ablations.records.columns import OPTIONS
from analysis import stats
from analysis.frame import NUMBERS, records_of, reducer_names

MATCH = 0.03  # without targets, trials within this share of the dense cost count as "the same cost"
NEAR = 0.01  # as good as calibrated to it; further away a curve is interpolated
MAX_GAP = 0.25  # no interpolation between neighbours further apart than this share of the dense cost
NOT_AIMED = "not calibrated to a cost"
CALIBRATED, NEARBY, INTERPOLATED = "calibrated", "nearest", "interpolated"

Record = dict[str, Any]


@dataclass(frozen=True)
class Cut:
    """The groups of a spec at one cost: a row each, and why others have none."""

    level: float
    target: bool  # trials were calibrated to this cost
    rows: pd.DataFrame  # with ``how``: "calibrated", "nearest" or "interpolated"
    left_out: tuple[tuple[str, str], ...]  # (group, reason)


def merge_seeds(trials: pd.DataFrame) -> pd.DataFrame:
    """One row for all seeds of the same computation: means, with ``keys`` (a list), ``weights`` ((key, share)
    pairs), ``seeds`` (their number), ``seed_top1`` (each seed's accuracy) and ``top1_sd`` (their standard deviation).

    Images and seeds are two sources of spread and stay apart: the interval of the mean is over images, of each image's
    mean over the seeds run; ``top1_sd`` is over seeds.
    """
    groups: dict[tuple[object, ...], list[Record]] = {}
    for row in records_of(trials):
        groups.setdefault(_same(row), []).append(row)
    merged = [_merge(group) for group in groups.values()]
    if not merged:  # with its columns' types
        return trials.iloc[:0].assign(keys=[], weights=[], seeds=[], seed_top1=[], top1_sd=[])
    columns = [*trials.columns, "keys", "weights", "seeds", "seed_top1", "top1_sd"]
    return pd.DataFrame(merged, columns=list(dict.fromkeys(columns)))


def answers_of(row: Mapping[str, Any]) -> np.ndarray | None:
    """Right or wrong for each image (a mean over seeds: in between), or None where it is not known."""
    answers = row.get("answers")
    return answers if isinstance(answers, np.ndarray) else None


def paired(first: Mapping[str, Any], second: Mapping[str, Any], *, level: float = stats.LEVEL) -> stats.Paired | None:
    """Two rows compared on the same images; None where the answers of one are not known."""
    a, b = answers_of(first), answers_of(second)
    return stats.paired(a, b, level=level) if a is not None and b is not None and len(a) == len(b) else None


def against_dense(row: Mapping[str, Any]) -> stats.Paired | None:
    """A row compared with the plain model on the same images."""
    return paired(row, {"answers": row.get("dense_answers")})


def targets(trials: pd.DataFrame) -> list[float]:
    """The costs that trials were calibrated to, cheapest first; [] in results without any."""
    rows = trials[~trials["dense"]] if "dense" in trials else trials
    found: list[float] = []
    for value in sorted(rows["target_gmacs"].dropna()):
        if not found or value - found[-1] > 0.002 * dense_gmacs(trials):
            found.append(float(value))
    return found


def cost_levels(trials: pd.DataFrame, *, by: str, count: int = 4) -> list[float]:
    """GMACs at which as many groups as possible have a trial, at least two, cheapest first; [] with a single
    group. Targets where there are any; of more than ``count`` those that most groups meet, spread over the range.
    """
    rows = trials[~trials["dense"]]
    if rows[by].nunique() < 2:
        return []
    known = targets(trials)
    if known:
        groups, dense = _groups(rows, by), dense_gmacs(trials)
        met = {level: sum(_find(group, level, dense, True) is not None for group in groups.values()) for level in known}
        shared = [level for level in known if met[level] >= 2]
        most = max(met.values())
        full = [level for level in shared if met[level] >= 0.6 * most]
        chosen = full if len(full) >= min(count, len(shared)) else shared
        places = np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int).tolist()
        return [chosen[i] for i in dict.fromkeys(places)]
    return _meeting_costs(rows, dense_gmacs(trials), by=by, count=count)


def cut(trials: pd.DataFrame, level: float, *, by: str) -> Cut:
    """Each group at a cost. ``trials``: rows of ``merge_seeds``, or single trials."""
    rows, dense = trials[~trials["dense"]], dense_gmacs(trials)
    target = any(abs(level - one) <= 0.002 * dense for one in targets(trials))
    chosen, left_out = [], []
    for name, group in _groups(rows, by).items():
        row = _choose(group, level, dense, target)
        if row is None:
            left_out.append((name, _reach(group, target)))
        else:
            chosen.append(row)
    frame = pd.DataFrame(chosen, columns=[*dict.fromkeys([*rows.columns, "how"])])
    return Cut(level, target, frame, tuple(left_out))


def on_curve(trials: pd.DataFrame, level: float) -> Record | None:
    """One series at any cost: its own trial where one lies within ``NEAR``, else between its two neighbours."""
    group, dense = records_of(trials), dense_gmacs(trials)
    nearest = min(group, key=lambda row: abs(row["gmacs_mean"] - level), default=None)
    if nearest is not None and abs(nearest["gmacs_mean"] - level) <= NEAR * dense:
        return {**nearest, "how": NEARBY}
    neighbours = _neighbours(group, level, dense)
    return _between(*neighbours, level) if neighbours is not None else None


def at_cost(trials: pd.DataFrame, level: float, *, by: str) -> pd.DataFrame:
    """The rows of ``cut``."""
    return cut(trials, level, by=by).rows


def dense_gmacs(trials: pd.DataFrame) -> float:
    """A yardstick for distances between costs: that of the plain model; of the dearest trial where no row says it."""
    known = dense_cost(trials)
    return float(trials["gmacs_mean"].max()) if math.isnan(known) else known


def dense_cost(trials: pd.DataFrame) -> float:
    """Cost of the plain model; nan where no row says it: what is a share of it, or stands at it, is not known then."""
    known = trials["dense_gmacs"].dropna()
    return float(known.iloc[0]) if len(known) else math.nan


def without_seed(text: str) -> str:
    """The JSON of stages or of a training without its seeds."""

    def strip(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: strip(part) for key, part in value.items() if key != "seed"}
        return [strip(part) for part in value] if isinstance(value, list) else value

    try:
        return json.dumps(strip(json.loads(text)), sort_keys=True)
    except (TypeError, ValueError):
        return text


def _same(row: Record) -> tuple[object, ...]:
    """What two trials must share to be seeds of one computation. A calibrated setting may differ a little from
    seed to seed: its target stands for it.
    """
    target = row.get("target_gmacs")
    aimed = target is not None and not pd.isna(target)
    made = "+".join(reducer_names(row["reducer"])) if aimed else without_seed(row["reducer"])
    names = ["spec", "model", "variant", "placement", "score", "finetuned", "measured_batch", "batch"]
    names += OPTIONS
    names += ["x", "target_gmacs"] if aimed else ["x", "budget"]
    values = [None if pd.isna(row.get(name)) else row.get(name) for name in names]
    return (*values, made, without_seed(str(row.get("training") or "")))


def _merge(group: list[Record]) -> Record:
    """Seeds of one computation as one row. The seed nearest to the mean stands for all where one table is needed."""
    accuracies = np.array([row["top1"] for row in group], dtype=float)
    mean = float(accuracies.mean())
    row = dict(group[int(np.argmin(np.nan_to_num(np.abs(accuracies - mean))))])
    if len(group) > 1:
        row |= _average(group, [1 / len(group)] * len(group))
    row["keys"] = [one["key"] for one in group]
    row["weights"] = [(one["key"], 1 / len(group)) for one in group]
    row["seeds"], row["seed_top1"] = len(group), accuracies.tolist()
    row["top1_sd"] = float(accuracies.std(ddof=1)) if len(group) > 1 else np.nan
    return row


def _average(group: Sequence[Record], weights: Sequence[float]) -> Record:
    """Weighted means of everything that is a number, the interval taken anew over images where answers are known
    (else the mean of the bounds, which is a little wide).
    """
    means: Record = {}
    for name in NUMBERS:
        values = [one.get(name, np.nan) for one in group]
        means[name] = sum(w * v for w, v in zip(weights, values, strict=True)) if not pd.isna(values).any() else np.nan
    for name in ("tokens", "tokens_std"):
        lists = [one[name] for one in group]
        alike = len({len(values) for values in lists}) == 1 and len(lists[0]) > 0
        means[name] = list(np.average(np.array(lists, dtype=float), axis=0, weights=weights)) if alike else []
    answers = [answers_of(one) for one in group]
    known = [one for one in answers if one is not None]
    if len(known) == len(group) and len({len(one) for one in known}) == 1:
        means["answers"] = np.average(np.array(known, dtype=np.float64), axis=0, weights=weights)
        interval = stats.accuracy(means["answers"])
        means |= {"top1": interval.value, "top1_low": interval.low, "top1_high": interval.high}
    else:
        means["answers"] = None
    return means


def _groups(rows: pd.DataFrame, by: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in records_of(rows):
        found.setdefault(str(row[by]), []).append(row)
    return found


def _reach(group: Sequence[Record], target: bool) -> str:
    """Why a group has no row at a cost."""
    if target and all(pd.isna(row["target_gmacs"]) for row in group):
        return NOT_AIMED
    costs = [row["gmacs_mean"] for row in group]
    reach = f"{min(costs):.3g} to {max(costs):.3g}" if len(costs) > 1 else f"{costs[0]:.3g}"
    return f"has trials at {reach} GMACs only"


def _find(group: list[Record], level: float, dense: float, target: bool) -> tuple[str, Record, Record] | None:
    """How a group comes to a cost, and the trial (twice) or the two neighbours it takes; None where it cannot."""
    nearest = min(group, key=lambda row: abs(row["gmacs_mean"] - level))
    apart = abs(nearest["gmacs_mean"] - level)
    if target:
        aimed = [
            r for r in group if abs(r["target_gmacs"] - level) <= 0.002 * dense and r["target_reached"] is not False
        ]
        if aimed:
            best = min(aimed, key=lambda row: abs(row["gmacs_mean"] - level))
            return CALIBRATED, best, best
    if apart <= NEAR * dense:
        return NEARBY, nearest, nearest
    neighbours = _neighbours(group, level, dense)
    if neighbours is not None:
        return INTERPOLATED, *neighbours
    # A few percent of the dense cost are a tenth of a cheap trial's: at a cost that others were calibrated to, that is
    # no equal cost. Without targets nothing meets more closely.
    return (NEARBY, nearest, nearest) if not target and apart <= MATCH * dense else None


def _choose(group: list[Record], level: float, dense: float, target: bool) -> Record | None:
    """One group's row at a cost; None where it has none."""
    found = _find(group, level, dense, target)
    if found is None:
        return None
    how, low, high = found
    return _between(low, high, level) if how == INTERPOLATED else {**low, "how": how}


def _neighbours(group: list[Record], level: float, dense: float) -> tuple[Record, Record] | None:
    """The trials of a group's own curve on either side of a cost; None where it has no curve there: several
    placements, or neighbours too far apart.
    """
    if len({row["placement"] for row in group}) > 1 or len({tuple(reducer_names(row["reducer"])) for row in group}) > 1:
        return None
    below = [row for row in group if row["gmacs_mean"] <= level]
    above = [row for row in group if row["gmacs_mean"] > level]
    if not below or not above:
        return None
    low, high = max(below, key=lambda row: row["gmacs_mean"]), min(above, key=lambda row: row["gmacs_mean"])
    return (low, high) if high["gmacs_mean"] - low["gmacs_mean"] <= MAX_GAP * dense else None


def _between(low: Record, high: Record, level: float) -> Record:
    """A row at a cost, linear between two trials. A concave curve lies above: the row is a little too low."""
    share = (level - low["gmacs_mean"]) / (high["gmacs_mean"] - low["gmacs_mean"])
    near = low if share < 0.5 else high
    row = {**near, **_average([low, high], [1 - share, share]), "how": INTERPOLATED}
    row["seeds"] = min(low.get("seeds", 1), high.get("seeds", 1))
    row["keys"] = [*low.get("keys", [low["key"]]), *high.get("keys", [high["key"]])]
    row["weights"] = [(key, (1 - share) * w) for key, w in low.get("weights", [(low["key"], 1.0)])]
    row["weights"] += [(key, share * w) for key, w in high.get("weights", [(high["key"], 1.0)])]
    return row


def _meeting_costs(rows: pd.DataFrame, dense: float, *, by: str, count: int) -> list[float]:
    """Costs that trials of several groups happen to share, in results that were not calibrated."""
    width = MATCH * dense
    costs = np.sort(rows["gmacs_mean"].to_numpy())
    groups = [np.asarray(group["gmacs_mean"]) for _, group in rows.groupby(by, sort=False)]
    away = np.array([[np.abs(group - cost).min() for group in groups] for cost in costs])  # (costs, groups)
    near = away <= width
    rank = sorted(range(len(costs)), key=lambda i: (-near[i].sum(), np.minimum(away[i], width).sum()))
    levels: list[float] = []
    for i in rank:
        if near[i].sum() >= 2 and all(abs(costs[i] - level) > 1.5 * width for level in levels):
            levels.append(float(costs[i]))
    return sorted(levels[:count])
