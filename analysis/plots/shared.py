"""The figures that belong to no single spec: where the tokens of all methods go, at one cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.facts import clips, tokens
from analysis.facts.clips import ClipGrid
from analysis.facts.overview import Overview, pictured_methods, staged_trial
from analysis.facts.spec import Facts
from analysis.plots import adaptivity as _adaptivity
from analysis.plots import agreement as _agreement
from analysis.plots import clip_motion as _motion
from analysis.plots import clip_steadiness as _steady
from analysis.plots import clip_strip as _strip
from analysis.plots import clutter as _clutter
from analysis.plots import coverage as _coverage
from analysis.plots import extremes as _extremes
from analysis.plots import samples as _samples
from analysis.plots import stages as _stages
from analysis.plots import tokens_per_block as _tokens
from analysis.plots.base import Drawn, Scene
from analysis.plots.panels import pages
from analysis.style import cost


def staged(facts: Facts | Overview, name: str, title: str, scene: Scene) -> list[Drawn]:
    """Histograms by stage, and the plainest and busiest images, of the most reducing adaptive trial."""
    row, images = staged_trial(facts.trials, facts.images), facts.images
    if row is None:
        return []
    table = images[str(row["key"])]
    words = {"name": str(row["variant"]).replace("_", " "), "cost": cost(float(str(row["gmacs_mean"])))}
    heading = f"{title}: tokens at each stage"
    figure = _stages.stages(row, table, title=heading, subtitle=scene.subtitle)
    text = _stages.CAPTION.format(**words, split=_stages.SPLIT if _stages.thirds(table) else "")
    drawn = [Drawn(f"{name}_stages", heading, text, figure)]
    heading = f"{title}: where fewest and most tokens are kept"
    pictures = _extremes.extremes(row, images, scene.pictures, title=heading, subtitle=scene.subtitle)
    if pictures is not None:
        evidence = "histograms above" + (" and in the rank correlations" if tokens.known([table], "clutter") else "")
        text = _extremes.CAPTION.format(**words, count=len(scene.pictures), images=len(table), evidence=evidence)
        drawn.append(Drawn(f"{name}_extremes", heading, text, pictures))
    return drawn


def shared_figures(facts: Overview, scene: Scene) -> list[Drawn]:
    """Tokens per block, adaptivity, agreement, coverage, and the sheet of samples."""
    rows, images = facts.rows, facts.images
    if rows.empty:
        return []
    if scene.clip is not None:
        return _of_clips(facts, scene, scene.clip)
    level = f"{cost(rows['gmacs_mean'].median())} GMACs"
    own: dict[str, Any] = {"looks": scene.looks, "subtitle": scene.subtitle}
    drawn = []
    if any(len(tokens) for tokens in rows["tokens"]):
        title, text = "Token survival against depth", _tokens.caption(rows, images, level)
        count = sum(bool(len(tokens)) for tokens in rows["tokens"])
        for page, (more, name) in enumerate(_pages(title, "tokens_per_block", count)):
            figure = _tokens.tokens_per_block(rows, images, title=more, page=page, **own)
            drawn.append(Drawn(name, more, text, figure))
    if "tokens" not in set(facts.trials["kind"]):  # else its own section has them
        drawn += staged(facts, "adaptive", "Adaptivity", scene)
    drawn += _adaptive_figures(facts, level, own)
    drawn += _agreement_figure(facts, level, scene)
    covered = facts.trials[facts.trials["spec"] == rows["spec"].iloc[0]]
    if covered.loc[~covered["dense"], "coverage"].notna().any():
        title = "Coverage: do the surviving patches lie on the object?"
        for page, (more, name) in enumerate(_pages(title, "coverage", len(_coverage.series(covered)))):
            figure = _coverage.coverage(covered, images, title=more, page=page, **own)
            drawn.append(Drawn(name, more, _coverage.caption(covered), figure))
    pictured = pictured_methods(rows, images)
    if scene.pictures and len(pictured):
        title = "Sample images: surviving patches, stage by stage"
        figure = _samples.samples(pictured, images, scene.pictures, title=title, subtitle=scene.subtitle)
        drawn.append(Drawn("samples", title, _samples.CAPTION, figure))
    return drawn


def _of_clips(facts: Overview, scene: Scene, grid: ClipGrid) -> list[Drawn]:
    """Of clips: tokens per block, tokens against motion and clutter, steadiness, agreement, strips of frames."""
    rows, images = facts.rows, facts.images
    at = f"{cost(rows['gmacs_mean'].median())} GMACs"
    level = f"Trials nearest to {at}"
    own: dict[str, Any] = {"looks": scene.looks, "subtitle": scene.subtitle}
    drawn = []
    if any(len(tokens) for tokens in rows["tokens"]):
        title = "Token survival against depth"
        figure = _tokens.tokens_per_block(rows, images, title=title, **own)
        drawn.append(Drawn("tokens_per_block", title, _tokens.caption(rows, images, at), figure))
    moved = clips.of_motion(rows, images, grid)
    if len(moved) and moved["rho"].notna().any():
        title = "Do frames in which more moves keep more tokens?"
        figure = _motion.clip_motion(moved, title=title, **own)
        drawn.append(Drawn("clip_motion", title, _motion.caption(moved, level), figure, moved))
    found, what = facts.correlations
    if len(found) and found["rho"].notna().any():
        title = _clutter.question(what).replace("images", "clips")
        figure = _clutter.clutter(found, what, title=title, **own)
        drawn.append(Drawn("clutter", title, _clutter.caption(found, what, level), figure, found))
    steady = clips.steadiness(rows, images, grid)
    if len(steady):
        title = "How steady in time are the kept patches?"
        figure = _steady.clip_steadiness(steady, title=title, **own)
        drawn.append(Drawn("clip_steadiness", title, _steady.CAPTION.format(level=level), figure, steady))
    drawn += _agreement_figure(facts, at, scene)
    pictured = pictured_methods(rows, images)
    if scene.pictures and len(pictured):
        title = "Frames with the surviving patches"
        figure = _strip.clip_strip(pictured, images, scene.pictures, grid, title=title, subtitle=scene.subtitle)
        drawn.append(Drawn("clip_strip", title, _strip.caption(grid), figure))
    return scene.worded(drawn)


def _pages(title: str, name: str, count: int) -> list[tuple[str, str]]:
    """Title and name of each figure that so many panels need."""
    total = pages(count)
    more = [(f"{title} ({page + 1} of {total})", f"{name}_appendix{page}") for page in range(1, total)]
    return [(title, name), *more]


def _adaptive_figures(facts: Overview, level: str, own: Mapping[str, Any]) -> list[Drawn]:
    """Tokens image by image, and their rank correlation with clutter."""
    rows, images, drawn = facts.rows, facts.images, []
    adaptive = tokens.adaptive(rows, images)
    if len(adaptive):
        known = tokens.clutter_known(adaptive, images)
        title = "Adaptivity: tokens kept, image by image" + (", against clutter" if known else "")
        figure = _adaptivity.adaptivity(rows, images, title=title, **own)
        caption = _adaptivity.CAPTION_CLUTTER if known else _adaptivity.CAPTION
        caption = caption.format(counted=tokens.counted_in(rows, images).words, level=level)
        drawn.append(Drawn("adaptivity_images", title, caption, figure))
        found, what = facts.correlations
        if len(found) and found["rho"].notna().any():
            title = _clutter.question(what)
            figure = _clutter.clutter(found, what, title=title, **own)
            text = _clutter.caption(found, what, f"Trials nearest to {level}")
            drawn.append(Drawn("clutter", title, text, figure, found))
    return drawn


def _agreement_figure(facts: Overview, level: str, scene: Scene) -> list[Drawn]:
    pairs, left = facts.agreement
    if pairs["first"].nunique() < 2:
        return []
    title = "Agreement: do methods keep the same patches?"
    figure = _agreement.agreement(pairs, title=title, subtitle=scene.subtitle)
    missing = ""
    if left:
        missing = f" Not here, because all or none of their patches survive or they are others: {', '.join(left)}."
    text = _agreement.CAPTION.format(level=f"about {level}", left=missing)
    return [Drawn("agreement", title, text, figure, pairs)]
