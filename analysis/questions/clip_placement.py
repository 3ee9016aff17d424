"""In which blocks of a video model tokens should be reduced: in print there is nothing about it."""

from __future__ import annotations

from analysis.plots import placement, tradeoff
from analysis.questions.base import Question
from analysis.questions.clips import NOTE, ON, claims, rows

QUESTION = Question(
    noun="placement",
    plots=(placement.PLOT, tradeoff.PLOT),
    printed=rows,
    printed_on=ON,
    note=NOTE,
    claims=claims,
)
