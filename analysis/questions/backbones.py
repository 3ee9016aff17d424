"""ATS on the hierarchical and sampling backbones that it was published on, at the costs in print."""

from __future__ import annotations

import pandas as pd

from analysis.published import of_ats
from analysis.questions.base import Question


def _rows(rows: pd.DataFrame) -> pd.Series[bool]:
    return of_ats("Table 1")(rows) & rows["model"].str.startswith(("CvT", "PS-ViT"), na=False)


QUESTION = Question(
    noun="placement",
    like_dense=True,
    printed=_rows,
    note=(
        "No public text or code says in which blocks ATS sat in CvT and PS-ViT, nor how CvT's class token scored 196 "
        "queries by 49 key cells: placements and scores here are this project's. Counts of tokens on random weights "
        "say nothing about trained ones."
    ),
    finetuned_in_print=True,
)
