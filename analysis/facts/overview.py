"""All specs of a setting together: where the tokens of all methods go, at one cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.facts import agreement, kept
from analysis.facts.matching import INTERPOLATED, cost_levels, cut, dense_gmacs, merge_seeds
from analysis.facts.tokens import adaptive, correlations, hardness
from analysis.frame import choosable, choosing, records_of, reducer_names, row_nearest

OVERVIEW_COST = 0.6  # share of the dense cost at which methods are pictured: deep enough to differ, not yet broken
ASIDE = 0.06  # of the dense cost: how far a method without a trial at that cost may stand from it
MANY = ("front", "clips")  # kinds of specs that set many methods beside each other
PICTURED = 3  # methods on the sheet of samples


@dataclass(frozen=True, eq=False)
class Overview:
    """Trials of all specs of one setting (with answers), and what is said of them together."""

    trials: pd.DataFrame
    images: Mapping[str, pd.DataFrame]  # per-image tables by trial key

    @cached_property
    def rows(self) -> pd.DataFrame:
        """One trial a series, all at nearly one cost."""
        return overview(self.trials)

    @cached_property
    def correlations(self) -> tuple[pd.DataFrame, str]:
        """Of the tokens that images keep, with what is to be seen in them; and with what that is."""
        return correlations(self.rows, self.images, hardness(self.trials, self.images))

    @cached_property
    def agreement(self) -> tuple[pd.DataFrame, list[str]]:
        """How far each pair of methods keeps the same patches, and the methods without patches to compare."""
        many = self.trials["kind"].isin(MANY).any()
        return agreement.matrix(self.rows if many else agreement.across_specs(self.trials, self.rows), self.images)


def overview(trials: pd.DataFrame) -> pd.DataFrame:
    """One trial a series, all at nearly one cost: of a spec of many methods where one was run, else of the spec with
    most series. Real trials only: where a series would be interpolated its nearest trial stands in, if it is near.
    """
    counts = trials[~trials["dense"]].groupby("spec", sort=False)["variant"].nunique()
    if counts.empty:
        return trials.iloc[:0]
    many = counts[counts.index.isin(trials.loc[trials["kind"].isin(MANY), "spec"])]
    rows = merge_seeds(trials[trials["spec"] == (many if len(many) else counts).idxmax()])
    dense = dense_gmacs(rows)
    wanted, levels = OVERVIEW_COST * dense, cost_levels(rows, by="variant", count=8)
    if levels:
        cuts = {level: _real(rows, cut(rows, level, by="variant").rows, level, dense) for level in levels}
        most = max(map(len, cuts.values()))
        level = min((one for one in levels if len(cuts[one]) >= 0.8 * most), key=lambda one: abs(one - wanted))
        chosen = cuts[level]
    else:
        chosen = rows.loc[[(rows.loc[~rows["dense"], "gmacs_mean"] - wanted).abs().idxmin()]]
    order = {name: i for i, name in enumerate(dict.fromkeys(rows["variant"]))}
    return chosen.sort_values("variant", key=lambda names: names.map(order))


def _real(rows: pd.DataFrame, chosen: pd.DataFrame, level: float, dense: float) -> pd.DataFrame:
    """The rows with interpolated ones replaced by the nearest trial, or left out."""
    kept_rows = [row for row in records_of(chosen) if row["how"] != INTERPOLATED]
    for name in chosen.loc[chosen["how"] == INTERPOLATED, "variant"]:
        part = rows[rows["variant"] == name]
        away = (part["gmacs_mean"] - level).abs()
        if away.min() <= ASIDE * dense:
            kept_rows.append(part.loc[away.idxmin()].to_dict())
    return pd.DataFrame(kept_rows, columns=chosen.columns)


def staged_trial(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> dict[str, object] | None:
    """The adaptive trial with most reducing blocks; of several that nearest to ``OVERVIEW_COST``."""
    rows = adaptive(trials[~trials["dense"]], images)
    rows = rows[[len(blocks) > 1 for blocks in rows["blocks"]]]
    if rows.empty:
        return None
    most = max(len(blocks) for blocks in rows["blocks"])
    rows = rows[[len(blocks) == most for blocks in rows["blocks"]]]
    return dict[str, object](row_nearest(rows, "gmacs_mean", OVERVIEW_COST * dense_gmacs(trials)))


def pictured_methods(rows: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A few methods for the sheet of samples, each made of other reducers: adaptive ones first, then those
    with more reducing blocks (they have more to show), then by accuracy.
    """
    usable = choosing(choosable(rows[[len(blocks) > 0 for blocks in rows["blocks"]]]))
    if usable.empty:
        return usable
    ranked = usable.assign(
        _made=["+".join(sorted(reducer_names(text))) for text in usable["reducer"]],
        _blocks=[len(blocks) for blocks in usable["blocks"]],
        _adapts=usable["key"].isin(adaptive(usable, images)["key"]),
    ).sort_values(["_adapts", "_blocks"], ascending=False, kind="stable")
    # Of several made of the same reducers the one that a spec names first; among these the more accurate first.
    ranked = ranked.drop_duplicates("_made").sort_values(["_adapts", "_blocks", "top1"], ascending=False, kind="stable")
    several = ranked.drop(columns=["_made", "_blocks", "_adapts"])
    shown: list[Any] = []
    for at, key in zip(several.index, several["key"], strict=True):  # bits are read for those that are shown only
        bits = kept.packed(images, key) if len(shown) < PICTURED else None
        if bits is not None and np.any(bits):
            shown.append(at)
    return several.loc[shown]
