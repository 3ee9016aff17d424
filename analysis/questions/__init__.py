"""What is asked, one kind a file: its noun, its findings, its figures, and what is in print about it.

A spec names its kind (``answers:``); the record of a run hands it on. A new kind is one file here and one word in
``ablations.records.kinds``.
"""

from __future__ import annotations

import functools
from importlib import import_module

from analysis.questions.base import Question


@functools.cache
def question_of(kind: str) -> Question:
    """The question of a kind."""
    found = import_module(f"analysis.questions.{kind}").QUESTION
    assert isinstance(found, Question)
    return found


__all__ = ["Question", "question_of"]
