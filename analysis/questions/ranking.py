"""Who leads at equal cost: what any spec is asked that names no other kind."""

from __future__ import annotations

from analysis.questions.base import Question

QUESTION = Question()
