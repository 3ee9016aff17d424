"""What one spec's question needs beyond a ranking at equal cost, in plain sentences drawn from the data."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pandas as pd

from analysis import stats, style, trained
from analysis.comparison import SAME, Finding, Versus, spoken
from analysis.frame import reducer_names
from analysis.matching import INTERPOLATED, against_dense, dense_cost, merge_seeds, on_curve, paired
from analysis.plots import difference as _difference
from analysis.plots import scaling as _scaling
from analysis.plots.runtime import timed
from analysis.plots.single_multi import SAVED
from analysis.plots.stacking import base_variant, gains
from analysis.tables import percent, with_bounds

LIKE_PRINTED = 0.03  # of the dense cost: up to here a share is near one in print; the two in print lie 0.11 apart
PRINTED_SHARES = {
    "the 63 % in print (2.9 of 4.6 GFLOPs, DeiT-S)": 2.9 / 4.6,
    "the 74 % that a user measured with the release (3.4 of 4.6)": 3.4 / 4.6,
}


def cheapest_like_dense(rows: pd.DataFrame) -> list[Finding]:
    """For each series its cheapest trial that, like every dearer one, cannot be told apart from the dense
    model; the cheapest series first.
    """
    found = []
    for name, group in rows.groupby("variant", sort=False):
        best, loss = None, None
        for row in group.sort_values("gmacs_mean", ascending=False).to_dict("records"):
            paired = against_dense(row)
            if paired is None or (paired.p_value < stats.ALPHA and paired.difference < 0):
                break
            best, loss = row, paired
        if best is not None and loss is not None:
            share = 100 * best["gmacs_mean"] / dense_cost(rows)
            of_dense = "" if math.isnan(share) else f", {share:.0f} % of dense"
            budget = f" ({best['budget']})" if best["budget"] else ""
            change = with_bounds(loss.difference, loss.low, loss.high, sign=True)
            text = (
                f"{spoken(name)}: down to {style.cost(best['gmacs_mean'])} GMACs{of_dense}{budget}, "
                f"{SAME} from the dense model; difference {change} points"
                f"{f', so a loss of up to {percent(-loss.low)} is not excluded' if loss.low < 0 else ''}."
            )
            found.append((best["gmacs_mean"], Finding(text, keys=tuple(best.get("keys", [best["key"]])))))
    return [finding for _, finding in sorted(found, key=lambda entry: entry[0])]


def k_costs(trials: pd.DataFrame) -> list[Finding]:
    """What a small, a middle and the largest K cost and reach, for each series; then the cheapest like the dense
    model.
    """
    rows = merge_seeds(trials[~trials["dense"] & trials["x"].notna()])
    found = []
    for name, group in rows.groupby("variant", sort=False):
        group = group.sort_values("x").reset_index(drop=True)
        chosen = group.loc[sorted({0, len(group) // 3, 2 * len(group) // 3, len(group) - 1})]
        parts = [
            f"K = {row.x:g}: {style.cost(row.gmacs_mean)} GMACs, {percent(row.top1)} %" for row in chosen.itertuples()
        ]
        found.append(Finding(f"{spoken(name)}: {'; '.join(parts)}.", keys=tuple(chosen["key"]), headline=True))
    like_dense = cheapest_like_dense(rows.assign(dense_gmacs=dense_cost(trials)))
    return found + [replace(one, headline=True) for one in like_dense]


def dropped(trials: pd.DataFrame) -> list[Finding]:
    """How often the class token was lost."""
    rows = trials[~trials["dense"] & trials["class_kept"].notna()]
    found = []
    if len(rows) and (rows["class_kept"] == 1).all():
        text = "The class token was lost in no image, at no cost, where it might have been dropped as well."
        found.append(Finding(text, keys=tuple(rows["key"]), headline=True))
    for name, group in rows.groupby("variant", sort=False):
        lost = 1 - group["class_kept"]
        text = (
            "never lost its class token"
            if lost.max() == 0
            else (
                f"lost the class token in {percent(lost.min())} to {percent(lost.max())} % of images, "
                "depending on the cost"
            )
        )
        found.append(Finding(f"{spoken(name)}: {text}.", keys=tuple(group["key"]), headline=bool(lost.max() > 0)))
    return found


def stacks(trials: pd.DataFrame) -> list[Finding]:
    """Whether stacking pays at equal cost, then what each stack saves and loses against its base with the same
    budget.
    """
    base = base_variant(trials)
    if base is None:
        return []
    found = []
    pairs = _difference.find(trials, base)
    better = sum(one.told_apart and one.paired.difference > 0 for one in pairs)
    worse = sum(one.told_apart for one in pairs) - better
    if pairs:
        text = (
            f"Against {base} alone at the same cost, stacking {_pays(better, worse, len(pairs))}: of {len(pairs)} "
            f"comparisons {better} clearly better, {worse} clearly worse (Holm), {len(pairs) - better - worse} {SAME}."
        )
        clear = [one for one in pairs if one.told_apart]
        text += f" Told apart: {'; '.join(map(_told, clear))}." if clear else ""
        if any(one.how == INTERPOLATED for one in clear):
            text += (
                f" {base} is interpolated there, on a straight line between two of its budgets: where its curve bends "
                "above that line, the difference is a little too large."
            )
        keys = tuple(dict.fromkeys(key for one in pairs for key in one.keys))
        found.append(Finding(text, keys=keys, headline=True))
    changes = gains(trials)
    for name in dict.fromkeys(gain.variant for gain in changes):
        part = [gain for gain in changes if gain.variant == name]
        saved, moved = [g.saved for g in part], [g.difference for g in part]
        tested = [g.paired for g in part if g.paired]
        told = f"; told apart at {sum(p.p_value < stats.ALPHA for p in tested)} of {len(tested)}" if tested else ""
        text = (
            f"{name} against {base} with the same budget ({len(part)} budgets): saves {percent(min(saved))} to "
            f"{percent(max(saved))} % of its GMACs; top-1 changes by {percent(min(moved), sign=True)} to "
            f"{percent(max(moved), sign=True)} points{told}."
        )
        found.append(Finding(text, keys=tuple(g.key for g in part)))
    return found


def _pays(better: int, worse: int, count: int) -> str:
    """Whether stacking pays, said no louder than the comparisons allow: more than half of them must agree."""
    if better > count / 2 and not worse:
        return "pays"
    if worse > count / 2 and not better:
        return "does not pay"
    if better and worse:
        return "pays at some costs and not at others"
    if not better and not worse:
        return f"is {SAME} from a smaller budget"
    return f"{'helps' if better else 'harms'} in {better or worse} of {count} cases and is {SAME} in the others"


def _told(one: Versus) -> str:
    difference = with_bounds(one.paired.difference, one.paired.low, one.paired.high, sign=True)
    return f"{spoken(one.name)} at {style.cost(one.gmacs)} GMACs {difference} points"


def samplers(trials: pd.DataFrame) -> list[Finding]:
    """What ATS costs as released, with as many points as patches: in print 2.9 of 4.6, by a user's measure 3.4."""
    found = []
    for row in merge_seeds(trials[~trials["dense"] & trials["target_gmacs"].isna()]).to_dict("records"):
        sampler = _ats_variant(row["reducer"])
        share, counted = (value / dense_cost(trials) for value in (row["gmacs_mean"], row["reference_gmacs_mean"]))
        if sampler is None or pd.isna(counted):  # what was executed is not the published order of work
            continue
        apart = {words: abs(counted - printed) for words, printed in PRINTED_SHARES.items()}
        near = min(apart, key=lambda words: apart[words])
        verdict = f"near {near}" if apart[near] <= LIKE_PRINTED else f"near neither {' nor '.join(PRINTED_SHARES)}"
        budget = f", {row['budget']}" if row["budget"] else ""
        text = (
            f"{spoken(row['variant'])} (sampler {sampler}, {row['placement']}{budget}, not calibrated) costs "
            f"{100 * share:.0f} % of dense, {100 * counted:.0f} % in the published order of work: "
            f"{verdict}."
        )
        found.append(Finding(text, keys=tuple(row["keys"]), headline=sampler == "official"))
    return found


def stages(trials: pd.DataFrame) -> list[Finding]:
    """What is lost at the saving that the paper claims, 37 %."""
    rows = merge_seeds(trials[~trials["dense"]])
    found = []
    wanted = (1 - SAVED) * dense_cost(trials)
    for name, part in rows.groupby("variant", sort=False) if not math.isnan(wanted) else ():
        row = part.loc[(part["gmacs_mean"] - wanted).abs().idxmin()].to_dict()
        loss = against_dense(row)
        if loss is not None and abs(row["gmacs_mean"] - wanted) <= 0.06 * dense_cost(trials):
            saved = 1 - row["gmacs_mean"] / dense_cost(trials)
            # The claim in print is ATS's: it says nothing about other reducers.
            ats = reducer_names(row["reducer"]) == ["ats"]
            claim = f" (in print: almost kept at {100 * SAVED:.0f} %, DeiT-S, finetuned)" if ats else ""
            text = (
                f"{spoken(name)} with {percent(saved)} % of GMACs saved: top-1 changes by "
                f"{with_bounds(loss.difference, loss.low, loss.high, sign=True)} points{claim}."
            )
            found.append(Finding(text, keys=tuple(row["keys"]), headline=True))
    return found


def sizes(trials: pd.DataFrame) -> list[Finding]:
    """Each larger model reduced to the cost of the next smaller one left whole."""
    names = _scaling.models(trials)
    rows = merge_seeds(trials[~trials["dense"]])
    found = []
    for small, large in itertools.pairwise(names):
        whole = trials[trials["model"] == small]
        cost, own = dense_cost(whole), rows[rows["model"] == large]
        for name, part in own.groupby("variant", sort=False) if not math.isnan(cost) else ():
            row = on_curve(part, cost) or part.loc[(part["gmacs_mean"] - cost).abs().idxmin()].to_dict()
            test = paired(row, {"answers": whole["dense_answers"].iloc[0] if "dense_answers" in whole else None})
            if test is not None:
                change = with_bounds(test.difference, test.low, test.high, sign=True)
                told = "" if test.p_value < stats.ALPHA else f", {SAME}"
                text = (
                    f"{large} with {spoken(name)} at {style.cost(row['gmacs_mean'])} GMACs against {small} left whole "
                    f"at {style.cost(cost)}: {change} points{told}."
                )
                found.append(Finding(text, keys=tuple(row["keys"]), headline=True))
    for name in names:
        part = rows[rows["model"] == name].assign(dense_gmacs=dense_cost(trials[trials["model"] == name]))
        for one in cheapest_like_dense(part):
            found.append(replace(one, text=f"{name}, {one.text}"))
    return found


def speed(trials: pd.DataFrame) -> list[Finding]:
    """Measured speed-up as a share of what the count promises."""
    rows = timed(trials)
    found = []
    for name, part in rows.groupby("variant", sort=False):
        faster, ratio = part["faster"], part["ratio"]
        batches = sorted({f"{size:g}" for size in part["at_batch"].dropna()}, key=float)
        text = (
            f"{spoken(name)}: {_range(f'{faster.min():.2f}', f'{faster.max():.2f}')} times as fast as dense at "
            f"{_range(f'{ratio.min():.2f}', f'{ratio.max():.2f}')} times fewer GMACs: "
            f"{_range(percent((faster / ratio).min()), percent((faster / ratio).max()))} % of the ratio "
            f"(batch {', '.join(batches)})."
        )
        found.append(Finding(text, keys=tuple(part["key"]), headline=True))
    return found


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def tokens(trials: pd.DataFrame) -> list[Finding]:
    """How many tokens are left after the first and the last stage."""
    found = []
    for row in merge_seeds(trials[~trials["dense"]]).to_dict("records"):
        blocks, counts, spread = row["blocks"], row["tokens"], row["tokens_std"]
        if len(blocks) > 1 and len(counts) > max(blocks) + 1 and len(spread) == len(counts):
            first, last = int(blocks[0]) + 1, int(blocks[-1]) + 1
            text = (
                f"{spoken(row['variant'])} at {style.cost(row['gmacs_mean'])} GMACs: {counts[first]:.0f} ± "
                f"{spread[first]:.0f} tokens after block {blocks[0]}, {counts[last]:.0f} ± {spread[last]:.0f} after "
                f"block {blocks[-1]} (mean and standard deviation over images, prefix included)."
            )
            found.append(Finding(text, keys=tuple(row["keys"]), headline=True))
    return found


def _ats_variant(reducer: str) -> str | None:
    """The sampler of a single ATS stage: "paper", "official", ...; None for anything else."""
    try:
        stages = json.loads(reducer)
        parts = [part for stage in stages for part in stage["stack"]]
    except (TypeError, ValueError, KeyError):
        return None
    if len(parts) != 1 or not isinstance(parts[0], Mapping) or parts[0].get("name") != "ats":
        return None
    return str(parts[0].get("variant", "paper"))


SPECIAL: Mapping[str, Callable[[pd.DataFrame], list[Finding]]] = {
    "k_values": k_costs,
    "class_token": dropped,
    "evit_stacking": stacks,
    "sampling_method": samplers,
    "single_multi_stage": stages,
    "model_scaling": sizes,
    "runtime": speed,
    "adaptivity": tokens,
    "finetuning": trained.finetuned,
    "budget_transfer": trained.transferred,
    "trained_methods": trained.against_random,
}
OPENING = ("adaptivity", "evit_stacking", "class_token", "trained_methods")  # their own answer comes before who leads
WITHOUT_RANKING = ("model_scaling", "runtime", "budget_transfer")  # their question is not who leads
