"""The answers in plain sentences, computed from the data: who leads at which cost, and what cannot be told
apart.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis import stats, style
from analysis.comparison import SAME, Finding, Images, comparisons, say, tally
from analysis.frame import Setting
from analysis.matching import at_cost, cost_levels, dense_gmacs, merge_seeds
from analysis.plots.adaptivity import adaptive, clutter_known, correlation
from analysis.plots.placement import placement_levels
from analysis.plots.stacking import base_variant, gains
from analysis.tables import percent, with_bounds


def cheapest_like_dense(rows: pd.DataFrame, images: Images) -> list[Finding]:
    """For each series its cheapest trial that, like every dearer one, cannot be told apart from the dense
    model.
    """
    found = []
    for name, group in rows.groupby("variant", sort=False):
        best, loss = None, None
        for row in group.sort_values("gmacs_mean", ascending=False).to_dict("records"):
            if row["key"] not in images or "dense_correct" not in images[row["key"]]:
                break
            paired = stats.compare_with_dense(images[row["key"]])
            if paired.p_value < stats.ALPHA and paired.difference < 0:
                break
            best, loss = row, paired
        if best is not None and loss is not None:
            share = 100 * best["gmacs_mean"] / dense_gmacs(rows)
            budget = f" ({best['budget']})" if best["budget"] else ""
            found.append(
                Finding(
                    f"{str(name).replace('_', ' ')}: down to {style.cost(best['gmacs_mean'])} GMACs, "
                    f"{share:.0f} % of dense{budget}, {SAME} from the dense model; difference "
                    f"{with_bounds(loss.difference, loss.low, loss.high, sign=True)} points.",
                    keys=(best["key"],),
                )
            )
    return found


def answers(spec: str, trials: pd.DataFrame, images: Images) -> list[Finding]:
    """The findings of one spec, the headline first."""
    rows = merge_seeds(trials[~trials["dense"]])
    if rows.empty:
        return [Finding("Only the dense model was run: there is nothing to compare.")]
    by = "placement" if spec == "stage_placement" and rows["placement"].nunique() > 1 else "variant"
    levels = placement_levels(trials) if by == "placement" else None
    found = comparisons(rows, by=by, images=images, levels=levels)
    dense = dense_gmacs(trials)
    heads = {
        "score_functions": "Best score",
        "stage_placement": "Best placement",
        "class_token": "Class token",
        "evit_stacking": "At equal cost",
        "k_values": "At equal cost",
        "methods": "Leading method",
    }
    head = tally(found, heads.get(spec, "Leader"))
    said = (
        [head] if head else [Finding(f"{rows[by].nunique()} {by}s, none of which meet at a common cost: no ranking.")]
    )
    extra = {"k_values": _k_costs, "class_token": _dropped, "evit_stacking": _stacks}.get(spec)
    said += extra(trials, images) if extra else []
    said += [say(one, dense) for one in found]
    if spec in ("methods", "k_values") or (by == "variant" and rows["variant"].nunique() == 1):
        said += cheapest_like_dense(rows.assign(dense_gmacs=dense), images)
    return said


def _k_costs(trials: pd.DataFrame, images: Images) -> list[Finding]:
    """What a small, a middle and the largest K cost and reach, for each series."""
    rows = merge_seeds(trials[~trials["dense"] & trials["x"].notna()])
    found = []
    for name, group in rows.groupby("variant", sort=False):
        group = group.sort_values("x").reset_index(drop=True)
        chosen = group.loc[sorted({0, len(group) // 3, 2 * len(group) // 3, len(group) - 1})]
        parts = [
            f"K = {row.x:g}: {style.cost(row.gmacs_mean)} GMACs, {percent(row.top1)} %" for row in chosen.itertuples()
        ]
        found.append(Finding(f"{str(name).replace('_', ' ')}: {'; '.join(parts)}.", keys=tuple(chosen["key"])))
    return found


def _dropped(trials: pd.DataFrame, images: Images) -> list[Finding]:
    """How often the class token was lost."""
    rows = trials[~trials["dense"] & trials["class_kept"].notna()]
    found = []
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
        found.append(Finding(f"{str(name).replace('_', ' ')}: {text}.", keys=tuple(group["key"])))
    return found


def _stacks(trials: pd.DataFrame, images: Images) -> list[Finding]:
    """What each stack saves and loses against its base with the same budget, then whether it pays at equal
    cost.
    """
    base = base_variant(trials)
    changes = gains(trials, images)
    found = []
    for name in dict.fromkeys(gain.variant for gain in changes):
        part = [gain for gain in changes if gain.variant == name]
        saved, moved = [g.saved for g in part], [g.difference for g in part]
        tested = [g.paired for g in part if g.paired]
        told = f"; told apart at {sum(p.p_value < stats.ALPHA for p in tested)} of {len(tested)}" if tested else ""
        found.append(
            Finding(
                f"{name} against {base} with the same budget ({len(part)} budgets): saves "
                f"{percent(min(saved))} to {percent(max(saved))} % of its GMACs; top-1 changes by "
                f"{percent(min(moved), sign=True)} to {percent(max(moved), sign=True)} points{told}.",
                keys=tuple(g.key for g in part),
            )
        )
    rows = merge_seeds(trials[~trials["dense"]])
    if base is None:
        return found
    pairs: list[stats.Paired] = []
    for level in cost_levels(rows, by="variant", count=6):
        part = at_cost(rows, level, by="variant")
        alone = part[part["variant"] == base]
        if len(alone) and alone.iloc[0]["key"] in images:
            stacks = [key for key in part.loc[part["variant"] != base, "key"] if key in images]
            pairs += [stats.compare(images[key], images[alone.iloc[0]["key"]]) for key in stacks]
    clear = [p < stats.ALPHA for p in stats.holm([pair.p_value for pair in pairs])]
    better = sum(told and pair.difference > 0 for told, pair in zip(clear, pairs, strict=True))
    worse = sum(clear) - better
    if pairs:
        verdict = "pays" if better > worse else "does not pay" if worse > better else f"is {SAME} from a smaller budget"
        found.insert(
            0,
            Finding(
                f"Against {base} alone at the same cost, stacking {verdict}: of {len(pairs)} comparisons "
                f"{better} clearly better, {worse} clearly worse (Holm), {len(pairs) - better - worse} "
                f"{SAME}."
            ),
        )
    return found


def adaptivity(rows: pd.DataFrame, images: Images) -> list[Finding]:
    """Rank correlation of tokens with clutter, where clutter is known."""
    adapts = adaptive(rows, images)
    if adapts.empty or not clutter_known(adapts, images):
        return []
    found = []
    for row in adapts.to_dict("records"):
        rho = correlation(images[row["key"]])
        if not np.isnan(rho.value):
            verdict = (
                "keeps more tokens where there is more clutter"
                if rho.low > 0
                else (
                    "keeps fewer tokens where there is more clutter"
                    if rho.high < 0
                    else "shows no link between clutter and tokens"
                )
            )
            found.append(
                Finding(
                    f"{row['variant'].replace('_', ' ')} {verdict}: Spearman's rho {rho.value:+.2f} "
                    f"[{rho.low:+.2f}, {rho.high:+.2f}].".replace("-", "−"),
                    keys=(row["key"],),
                )
            )
    return found


def limits(setting: Setting, trials: pd.DataFrame, images: Images) -> list[str]:
    """What this many images can and cannot tell, in plain words."""
    n = setting.images
    known = trials["dense_top1"].dropna()
    accuracy = float(known.iloc[0]) if len(known) else float(trials["top1"].max())
    half = 0.5 * (stats.wilson(accuracy * n, n).high - stats.wilson(accuracy * n, n).low)
    tables = [images[key] for key in trials["key"] if key in images and "dense_correct" in images[key]]
    rates = [stats.compare_with_dense(table).discordance for table in tables]
    said = [f"One accuracy near {percent(accuracy)} % is known to ± {percent(half)} points (95 %)."]
    if rates:
        low, high = np.quantile(rates, [0.1, 0.9])
        small, large = (stats.resolution(n, accuracy=accuracy, discordance=float(rate)) for rate in (low, high))
        said.append(
            f"All comparisons here are on the same {n:,} images. A trial and the dense model disagree about "
            f"{percent(float(low))} to {percent(float(high))} % of them, so a difference must be at least "
            f"{percent(small.paired)} to {percent(large.paired)} points to be found in 80 % of repetitions. "
            f"Two results on different images would have to differ by {percent(small.unpaired)} points."
        )
        said.append(f'Smaller differences are reported as "{SAME}": that does not say that they are zero.')
    said.append(
        "Intervals speak of the choice of images only: one set of weights, no training noise. Best of many "
        "settings means chosen after looking; comparisons with a leader are corrected for their number "
        "(Holm), choices of settings are not."
    )
    return said
