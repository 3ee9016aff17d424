"""How tokens are drawn from their scores (Table A.3 of the ATS paper, and the readings of its sampler): inverse
transform, top-K, and what the released code and re-implementations do instead.
"""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from analysis import published, style
from analysis.facts.spec import Facts
from analysis.plots import labels
from analysis.plots.base import Plot, Scene
from analysis.plots.tradeoff import draw_curves, has_seeds, legend

CAPTION = (
    "Top-1 accuracy against multiply-adds as executed, with 95 % intervals over images, off the shelf and, where it "
    "was run, finetuned. The lines mark the two costs in print for the same sampler on DeiT-S: {paper} of {dense} "
    "GFLOPs (the paper) and {release} (its released code, measured by a user), as shares of the dense model's."
)
KINDS = ((False, "off the shelf"), (True, "finetuned"))
OWN = "settings of their own"


@style.themed
def sampling(facts: Facts, scene: Scene, title: str) -> Figure:
    """Accuracy against GMACs; a panel off the shelf, and one finetuned where there are such trials."""
    trials, looks = facts.trials, scene.looks
    printed = {f"{own} of {dense} ({who})": own / dense for who, (own, dense) in published.ats_costs().items()}
    groups = _groups(trials)
    figure = style.new_figure(height=4.9)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    names: list[str] = []
    for axes, (words, part) in zip(panels, groups, strict=True):
        names += [name for name in draw_curves(axes, Facts(part), looks=looks) if name not in names]
        for share, dashes in zip(printed.values(), (":", "-."), strict=True):
            axes.axvline(share * facts.dense, color="#777777", linestyle=dashes, linewidth=1, gid="printed")
        if len(groups) > 1:
            axes.set_title(words)
        if words.endswith(OWN):  # the dense model's cost would press them together: its line is enough
            ends = [*part["gmacs_mean"], *(share * facts.dense for share in printed.values())]
            ends = [end for end in ends if not math.isnan(end)]
            axes.set_xlim(min(ends) - 0.06 * (max(ends) - min(ends)), max(ends) + 0.06 * (max(ends) - min(ends)))
    for axes in panels[1:]:
        axes.set_ylabel("")
    style.put_title(figure, title, scene.subtitle)
    rules = [style.rule_handle(label, dashes) for label, dashes in zip(printed, (":", "-."), strict=True)]
    style.put_legend(figure, [*legend(names, looks, facts), *rules])
    return style.finish(figure)


def _groups(trials: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What has a panel of its own. Natural settings lie close together: beside curves that fall to a few percent they
    would be one blot.
    """
    kinds = [(words, trials[trials["finetuned"] == tuned]) for tuned, words in KINDS]
    return [pair for words, part in kinds if len(part[~part["dense"]]) for pair in _apart(words, part)]


def _apart(words: str, part: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Trials set to a cost, and trials at settings of their own; one group where there is only one kind."""
    own = part["target_gmacs"].isna() & ~part["dense"]
    if not own.any() or not (~own & ~part["dense"]).any():
        return [(words, part)]
    return [(f"{words}, set to a cost", part[~own]), (f"{words}, {OWN}", part[own])]


def caption(facts: Facts, scene: Scene) -> str:
    seeds = " Small hollow circles are single seeds." if has_seeds(facts) else ""
    below = "".join(labels.below(Facts(part)) for _, part in _groups(facts.trials))
    (paper, dense), (release, _) = published.ats_costs().values()
    return CAPTION.format(paper=paper, dense=dense, release=release) + seeds + below


PLOT = Plot(sampling, "{title}: accuracy against cost", caption)
