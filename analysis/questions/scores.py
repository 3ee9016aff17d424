"""Which score decides best which tokens are kept (Figure 3 of the ATS paper)."""

from __future__ import annotations

from analysis.questions.base import Question
from analysis.questions.beside import order

QUESTION = Question(
    noun="score",
    note="Printed as curves only (ATS, Figure 3; DeiT-S, one stage, off the shelf): class attention times value norm "
    "is best, random is worst.",
    claims=lambda facts, patches: order(
        facts, "class attention x value norm best, random worst (curves only, Figure 3)"
    ),
)
