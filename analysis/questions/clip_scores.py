"""Which score decides best which tokens of a frame are kept."""

from __future__ import annotations

from analysis.questions.base import Question
from analysis.questions.clips import NOTE, ON, claims, rows

QUESTION = Question(noun="score", printed=rows, printed_on=ON, note=NOTE, claims=claims)
