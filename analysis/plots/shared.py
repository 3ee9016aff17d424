"""The figures that belong to no single spec: where the tokens of all methods go, at one cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis import kept
from analysis.frame import reducer_names
from analysis.matching import INTERPOLATED, cost_levels, cut, dense_gmacs, merge_seeds
from analysis.plots import adaptivity as _adaptivity
from analysis.plots import agreement as _agreement
from analysis.plots import clutter as _clutter
from analysis.plots import coverage as _coverage
from analysis.plots import extremes as _extremes
from analysis.plots import samples as _samples
from analysis.plots import stages as _stages
from analysis.plots import tokens_per_block as _tokens
from analysis.plots.base import Drawn, Scene
from analysis.style import cost

OVERVIEW_COST = 0.6  # share of the dense cost at which methods are pictured: deep enough to differ, not yet broken
ASIDE = 0.06  # of the dense cost: how far a method without a trial at that cost may stand from it
PICTURED = 3  # methods on the sheet of samples


def overview(trials: pd.DataFrame) -> pd.DataFrame:
    """One trial a series, all at nearly one cost: of ``methods`` where it was run, else of the spec with most
    series. Real trials only: where a series would be interpolated its nearest trial stands in, if it is near.
    """
    counts = trials[~trials["dense"]].groupby("spec", sort=False)["variant"].nunique()
    if counts.empty:
        return trials.iloc[:0]
    rows = merge_seeds(trials[trials["spec"] == ("methods" if "methods" in counts.index else counts.idxmax())])
    dense = dense_gmacs(rows)
    wanted, levels = OVERVIEW_COST * dense, cost_levels(rows, by="variant", count=8)
    if levels:
        cuts = {level: cut(rows, level, by="variant").rows for level in levels}
        most = max(map(len, cuts.values()))
        level = min((one for one in levels if len(cuts[one]) >= 0.8 * most), key=lambda one: abs(one - wanted))
        chosen = _real(rows, cuts[level], level, dense)
    else:
        chosen = rows.loc[[(rows.loc[~rows["dense"], "gmacs_mean"] - wanted).abs().idxmin()]]
    order = {name: i for i, name in enumerate(dict.fromkeys(rows["variant"]))}
    return chosen.sort_values("variant", key=lambda names: names.map(order))


def _real(rows: pd.DataFrame, chosen: pd.DataFrame, level: float, dense: float) -> pd.DataFrame:
    """The rows with interpolated ones replaced by the nearest trial, or left out."""
    kept_rows = [row for row in chosen.to_dict("records") if row["how"] != INTERPOLATED]
    for name in chosen.loc[chosen["how"] == INTERPOLATED, "variant"]:
        part = rows[rows["variant"] == name]
        away = (part["gmacs_mean"] - level).abs()
        if away.min() <= ASIDE * dense:
            kept_rows.append(part.loc[away.idxmin()].to_dict())
    return pd.DataFrame(kept_rows, columns=chosen.columns)


def spec_adaptivity(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    """Histograms by stage, and the plainest and busiest images, of the most reducing adaptive trial of a spec."""
    row = staged_trial(trials, scene.images)
    return _staged(name, title, row, scene) if row is not None else []


def staged_trial(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> dict[str, object] | None:
    """The adaptive trial with most reducing blocks; of several that nearest to ``OVERVIEW_COST``."""
    rows = _adaptivity.adaptive(trials[~trials["dense"]], images)
    rows = rows[[len(blocks) > 1 for blocks in rows["blocks"]]]
    if rows.empty:
        return None
    most = max(len(blocks) for blocks in rows["blocks"])
    rows = rows[[len(blocks) == most for blocks in rows["blocks"]]]
    return dict(rows.loc[(rows["gmacs_mean"] - OVERVIEW_COST * dense_gmacs(trials)).abs().idxmin()])


def _staged(name: str, title: str, row: Mapping[str, object], scene: Scene) -> list[Drawn]:
    table = scene.images[str(row["key"])]
    words = {"name": str(row["variant"]).replace("_", " "), "cost": cost(float(str(row["gmacs_mean"])))}
    heading = f"{title}: tokens at each stage"
    figure = _stages.stages(row, table, title=heading, subtitle=scene.subtitle)
    text = _stages.CAPTION.format(**words, split=_stages.SPLIT if _stages.thirds(table) else "")
    drawn = [Drawn(f"{name}_stages", heading, text, figure)]
    heading = f"{title}: where fewest and most tokens are kept"
    pictures = _extremes.extremes(row, scene.images, scene.pictures, title=heading, subtitle=scene.subtitle)
    if pictures is not None:
        evidence = "histograms above" + (" and in the rank correlations" if _clutter.known([table], "clutter") else "")
        text = _extremes.CAPTION.format(**words, count=len(scene.pictures), images=len(table), evidence=evidence)
        drawn.append(Drawn(f"{name}_extremes", heading, text, pictures))
    return drawn


def shared_figures(trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    """Tokens per block, adaptivity, agreement, coverage, and the sheet of samples."""
    rows = overview(trials)
    if rows.empty:
        return []
    level = f"{cost(rows['gmacs_mean'].median())} GMACs"
    drawn = []
    if any(len(tokens) for tokens in rows["tokens"]):
        title = "Token survival against depth"
        figure = _tokens.tokens_per_block(rows, scene.images, looks=scene.looks, title=title, subtitle=scene.subtitle)
        drawn.append(Drawn("tokens_per_block", title, _tokens.caption(rows, scene.images, level), figure))
    if "adaptivity" not in set(trials["spec"]):  # else its own section has them
        row = staged_trial(trials, scene.images)
        drawn += _staged("adaptivity", "Adaptivity", row, scene) if row is not None else []
    drawn += _adaptive_figures(trials, rows, level, scene)
    drawn += _agreement_figure(trials, rows, level, scene)
    covered = trials[trials["spec"] == rows["spec"].iloc[0]]
    if covered.loc[~covered["dense"], "coverage"].notna().any():
        title = "Coverage: do the surviving patches lie on the object?"
        figure = _coverage.coverage(covered, scene.images, looks=scene.looks, title=title, subtitle=scene.subtitle)
        drawn.append(Drawn("coverage", title, _coverage.caption(covered), figure))
    pictured = pictured_methods(rows, scene.images)
    if scene.pictures and len(pictured):
        title = "Sample images: surviving patches, stage by stage"
        figure = _samples.samples(pictured, scene.images, scene.pictures, title=title, subtitle=scene.subtitle)
        drawn.append(Drawn("samples", title, _samples.CAPTION, figure))
    return drawn


def _adaptive_figures(trials: pd.DataFrame, rows: pd.DataFrame, level: str, scene: Scene) -> list[Drawn]:
    """Tokens image by image, and their rank correlation with clutter."""
    drawn = []
    adaptive = _adaptivity.adaptive(rows, scene.images)
    if len(adaptive):
        known = _adaptivity.clutter_known(adaptive, scene.images)
        title = "Adaptivity: tokens kept, image by image" + (", against clutter" if known else "")
        figure = _adaptivity.adaptivity(rows, scene.images, looks=scene.looks, title=title, subtitle=scene.subtitle)
        counted = _adaptivity.counted_in(rows, scene.images)
        caption = _adaptivity.CAPTION_CLUTTER if known else _adaptivity.CAPTION
        caption = caption.format(counted=counted.words, level=level)
        drawn.append(Drawn("adaptivity_images", title, caption, figure))
        found, what = _clutter.correlations(rows, scene.images, _clutter.hardness(trials, scene.images))
        if len(found) and found["rho"].notna().any():
            title = _clutter.question(what)
            figure = _clutter.clutter(found, what, looks=scene.looks, title=title, subtitle=scene.subtitle)
            text = _clutter.caption(found, what, f"Trials nearest to {level}")
            drawn.append(Drawn("clutter", title, text, figure, found))
    return drawn


def _agreement_figure(trials: pd.DataFrame, rows: pd.DataFrame, level: str, scene: Scene) -> list[Drawn]:
    rows = rows if "methods" in set(trials["spec"]) else _agreement.across_specs(trials, rows)
    pairs, left = _agreement.matrix(rows, scene.images)
    if pairs["first"].nunique() < 2:
        return []
    title = "Agreement: do methods keep the same patches?"
    figure = _agreement.agreement(pairs, title=title, subtitle=scene.subtitle)
    missing = ""
    if left:
        missing = f" Not here, because all or none of their patches survive or they are others: {', '.join(left)}."
    text = _agreement.CAPTION.format(level=f"about {level}", left=missing)
    return [Drawn("agreement", title, text, figure, pairs)]


def pictured_methods(rows: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A few methods for the sheet of samples, each made of other reducers: adaptive ones first, then those
    with more reducing blocks (they have more to show), then by accuracy.
    """
    usable = rows[[len(blocks) > 0 for blocks in rows["blocks"]]]
    if usable.empty:
        return usable
    ranked = usable.assign(
        _made=["+".join(sorted(reducer_names(text))) for text in usable["reducer"]],
        _blocks=[len(blocks) for blocks in usable["blocks"]],
        _adapts=usable["key"].isin(_adaptivity.adaptive(usable, images)["key"]),
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
