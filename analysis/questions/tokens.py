"""How many tokens an image keeps, and how far images differ in it (Figures 5 to 7 of the ATS paper)."""

from __future__ import annotations

import math

import numpy as np

from analysis import style
from analysis.facts.overview import staged_trial
from analysis.facts.spec import Facts
from analysis.frame import records_of
from analysis.plots import tradeoff
from analysis.plots.shared import staged
from analysis.questions.base import Question
from analysis.words import Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """How many tokens are left after the first and the last stage."""
    said = []
    for row in records_of(facts.rows):
        blocks, counts, spread = row["blocks"], row["tokens"], row["tokens_std"]
        if len(blocks) > 1 and len(counts) > max(blocks) + 1 and len(spread) == len(counts):
            first, last = int(blocks[0]) + 1, int(blocks[-1]) + 1
            text = (
                f"{spoken(row['variant'])} at {style.cost(row['gmacs_mean'])} GMACs: {counts[first]:.0f} ± "
                f"{spread[first]:.0f} tokens after block {blocks[0]}, {counts[last]:.0f} ± {spread[last]:.0f} after "
                f"block {blocks[-1]} (mean and standard deviation over images, prefix included)."
            )
            said.append(Finding(text, keys=tuple(row["keys"]), headline=True))
    return said


def _short(facts: Facts) -> str | None:
    """Between how many tokens most images lie, of the trial with most stages."""
    row = staged_trial(facts.trials, facts.images)
    if row is None:
        return "Every image keeps as many tokens as any other: nothing adapts here."
    table = facts.images[str(row["key"])]
    low, middle, high = np.quantile([counts[-1] for counts in table["tokens"]], [0.1, 0.5, 0.9])
    share = (
        ""
        if math.isnan(facts.dense)
        else f" at {100 * float(str(row['gmacs_mean'])) / facts.dense:.0f} % of the dense cost"
    )
    return (
        f"{spoken(row['variant'])}{share} leaves {low:.0f} to {high:.0f} tokens in 80 % of images, {middle:.0f} in "
        "the middle one."
    )


QUESTION = Question(
    short=_short,
    found=found,
    opens=True,
    plots=(tradeoff.PLOT,),
    more=lambda facts, title, scene: staged(facts, facts.name, title, scene),
)
