"""Whether the class token must be kept (Figure A.4 of the ATS paper)."""

from __future__ import annotations

from analysis.facts.spec import Facts
from analysis.plots import class_token, difference
from analysis.questions.base import Question
from analysis.questions.beside import order
from analysis.tables import percent
from analysis.words import Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """How often the class token was lost."""
    trials = facts.trials
    rows = trials[~trials["dense"] & trials["class_kept"].notna()]
    said = []
    if len(rows) and (rows["class_kept"] == 1).all():
        text = "The class token was lost in no image, at no cost, where it might have been dropped as well."
        said.append(Finding(text, keys=tuple(rows["key"]), headline=True))
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
        said.append(Finding(f"{spoken(name)}: {text}.", keys=tuple(group["key"]), headline=bool(lost.max() > 0)))
    return said


QUESTION = Question(
    noun="treatment of the class token",
    found=found,
    opens=True,
    plots=(class_token.PLOT, difference.PLOT),
    note="Printed as curves only (ATS, Figure A.4; DeiT-S, one stage, off the shelf): always keeping the class token "
    "is better.",
    claims=lambda facts, patches: order(facts, "always keeping it is better (curves only, Figure A.4)"),
)
