"""The figures: one a file, each a pure function from data frames to a matplotlib ``Figure``; here, which one
a spec gets.

Every spec gets accuracy against GMACs, whatever its name; a few get one made for their question. A new figure
is one file here and one line in ``SPECIAL``, or in ``shared_figures`` where it belongs to no single spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from analysis.frame import reducer_names
from analysis.matching import at_cost, cost_levels, dense_gmacs, merge_seeds
from analysis.plots import adaptivity as _adaptivity
from analysis.plots import class_token as _class_token
from analysis.plots import coverage as _coverage
from analysis.plots import k_effect as _k_effect
from analysis.plots import placement as _placement
from analysis.plots import samples as _samples
from analysis.plots import stacking as _stacking
from analysis.plots import tokens_per_block as _tokens
from analysis.plots import tradeoff as _tradeoff
from analysis.plots.samples import Sample
from analysis.style import Look, cost

OVERVIEW_COST = 0.6  # share of the dense cost at which methods are pictured: deep enough to differ, not yet broken
PICTURED = 3  # methods on the sheet of samples
LINES = 9  # series in a figure of one cost


@dataclass(frozen=True)
class Drawn:
    """A finished figure with what a reader needs beside it."""

    name: str  # of its files
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Scene:
    """What all figures of one setting share."""

    images: Mapping[str, pd.DataFrame]
    looks: Mapping[str, Look]
    subtitle: str
    pictures: Sequence[Sample] = ()


def _k_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> Drawn | None:
    if trials.loc[~trials["dense"], "x"].dropna().nunique() < 2:
        return None
    title = f"{title}: accuracy and cost against K"
    figure = _k_effect.k_effect(trials, looks=scene.looks, title=title, subtitle=scene.subtitle)
    return Drawn(f"{name}_effect", title, _k_effect.CAPTION, figure)


def _placement_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> Drawn | None:
    if trials.loc[~trials["dense"], "placement"].nunique() < 2:
        return None
    title = f"{title}: accuracy by placement at equal cost"
    figure = _placement.placement(trials, title=title, subtitle=scene.subtitle)
    return Drawn(f"{name}_by_block", title, _placement.CAPTION, figure)


def _class_token_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> Drawn | None:
    if trials.loc[~trials["dense"], "class_kept"].dropna().empty:
        return None
    title = f"{title}: accuracy, and how often it was dropped"
    figure = _class_token.class_token(trials, looks=scene.looks, title=title, subtitle=scene.subtitle)
    return Drawn(f"{name}_dropped", title, _class_token.CAPTION, figure)


def _stacking_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> Drawn | None:
    base = _stacking.base_variant(trials)
    if base is None or not _stacking.gains(trials, scene.images):
        return None
    title = f"{title}: what the stack changes"
    figure = _stacking.stacking(trials, scene.images, looks=scene.looks, title=title, subtitle=scene.subtitle)
    return Drawn(f"{name}_gain", title, _stacking.CAPTION.format(base=base), figure)


SPECIAL: Mapping[str, Callable[[str, str, pd.DataFrame, Scene], Drawn | None]] = {
    "k_values": _k_figure,
    "stage_placement": _placement_figure,
    "class_token": _class_token_figure,
    "evit_stacking": _stacking_figure,
}


def spec_figures(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    """Accuracy against GMACs, and the figure made for this spec where there is one and its data are there."""
    heading = f"{title}: accuracy against cost"
    figure = _tradeoff.tradeoff(trials, looks=scene.looks, title=heading, subtitle=scene.subtitle)
    drawn = [Drawn(name, heading, _tradeoff.CAPTION, figure)]
    special = SPECIAL[name](name, title, trials, scene) if name in SPECIAL else None
    return drawn + ([special] if special else [])


def overview(trials: pd.DataFrame) -> pd.DataFrame:
    """One trial a series, all at nearly one cost: of ``methods`` where it was run, else of the spec with most
    series.
    """
    counts = trials[~trials["dense"]].groupby("spec", sort=False)["variant"].nunique()
    if counts.empty:
        return trials.iloc[:0]
    rows = merge_seeds(trials[trials["spec"] == ("methods" if "methods" in counts.index else counts.idxmax())])
    wanted = OVERVIEW_COST * dense_gmacs(rows)
    levels = cost_levels(rows, by="variant", count=8)
    if levels:
        most = max(len(at_cost(rows, level, by="variant")) for level in levels)
        levels = [level for level in levels if len(at_cost(rows, level, by="variant")) >= 0.8 * most]
        chosen = at_cost(rows, min(levels, key=lambda level: abs(level - wanted)), by="variant")
    else:
        nearest = (rows.loc[~rows["dense"], "gmacs_mean"] - wanted).abs().idxmin()
        chosen = rows.loc[[nearest]]
    order = {name: i for i, name in enumerate(dict.fromkeys(rows["variant"]))}
    return chosen.sort_values("variant", key=lambda names: names.map(order)).head(LINES)


def shared_figures(trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    """The figures that belong to no single spec: tokens per block, adaptivity, coverage, and the sheet of
    samples.
    """
    rows = overview(trials)
    if rows.empty:
        return []
    level = f"{cost(rows['gmacs_mean'].median())} GMACs"
    drawn = []
    if any(len(tokens) for tokens in rows["tokens"]):
        title = "Tokens per block"
        figure = _tokens.tokens_per_block(rows, scene.images, looks=scene.looks, title=title, subtitle=scene.subtitle)
        drawn.append(Drawn("tokens_per_block", title, _tokens.CAPTION.format(level=level), figure))
    adaptive = _adaptivity.adaptive(rows, scene.images)
    if len(adaptive):
        known = _adaptivity.clutter_known(adaptive, scene.images)
        title = "Adaptivity: tokens kept, image by image" + (", against clutter" if known else "")
        figure = _adaptivity.adaptivity(adaptive, scene.images, looks=scene.looks, title=title, subtitle=scene.subtitle)
        caption = (_adaptivity.CAPTION_CLUTTER if known else _adaptivity.CAPTION).format(level=level)
        drawn.append(Drawn("adaptivity", title, caption, figure))
    covered = trials[(trials["spec"] == rows["spec"].iloc[0])]
    if covered.loc[~covered["dense"], "coverage"].notna().any():
        title = "Coverage: do the surviving patches lie on the object?"
        figure = _coverage.coverage(covered, scene.images, looks=scene.looks, title=title, subtitle=scene.subtitle)
        drawn.append(Drawn("coverage", title, _coverage.CAPTION, figure))
    pictured = pictured_methods(rows, scene.images)
    if scene.pictures and len(pictured):
        title = "Sample images: surviving patches, stage by stage"
        figure = _samples.samples(pictured, scene.images, scene.pictures, title=title, subtitle=scene.subtitle)
        drawn.append(Drawn("samples", title, _samples.CAPTION, figure))
    return drawn


def pictured_methods(rows: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A few methods for the sheet of samples, each made of other reducers: adaptive ones first, then those
    with more reducing blocks (they have more to show), then by accuracy.
    """
    usable = rows[
        [
            key in images and "kept" in images[key] and len(blocks) > 0
            for key, blocks in zip(rows["key"], rows["blocks"], strict=True)
        ]
    ]
    if usable.empty:
        return usable
    ranked = usable.assign(
        _made=["+".join(sorted(reducer_names(text))) for text in usable["reducer"]],
        _blocks=[len(blocks) for blocks in usable["blocks"]],
        _adapts=usable["key"].isin(_adaptivity.adaptive(usable, images)["key"]),
    ).sort_values(["_adapts", "_blocks", "top1"], ascending=False, kind="stable")
    return ranked.drop_duplicates("_made").drop(columns=["_made", "_blocks", "_adapts"]).head(PICTURED)


__all__ = ["Drawn", "Sample", "Scene", "overview", "shared_figures", "spec_figures"]
