"""Which of many methods to take at which cost."""

from __future__ import annotations

import pandas as pd

from analysis.facts.spec import Facts
from analysis.frame import reducer_names
from analysis.plots import difference, pareto, published_points, tradeoff
from analysis.published import DEIT, printed, share
from analysis.questions.base import Line, Question
from analysis.questions.beside import in_words, line, nearest, records

KNOWN = {  # reducers, the printed row's table and method, and what was done
    "IA-RED2": (["ia_red2", "iared2"], ("Table 1", "IA-RED2"), "finetuned"),
    "DynamicViT": (["dynamic_vit", "dynamicvit"], ("Table 1", "DynamicViT (30 epochs)"), "finetuned"),
    "EViT": (["evit"], ("Table 1", "EViT (30 epochs)"), "finetuned"),
    "ATS": (["ats"], ("Table 1", "ATS"), "finetuned"),
    "ToMe": (["tome"], ("README", "ToMe r=13"), "trained"),
}


def _claims(facts: Facts, patches: int | None) -> list[Line]:
    lines, rows = [], records(facts)
    for name, (reducers, (where, method), done) in KNOWN.items():
        claim = printed(where, method)
        source = "its README" if where == "README" else where
        own = [row for row in rows if len(set(used := reducer_names(row["reducer"]))) == 1 and used[0] in reducers]
        for variant in dict.fromkeys(row["variant"] for row in own):
            here = nearest(own, facts, share(claim), lambda row, v=variant: row["variant"] == v)  # type: ignore[misc]
            if here is not None:
                lines.append(line(f"{variant} ({name}: {source}, {done})", in_words(claim), here, facts))
    return lines


def _rows(rows: pd.DataFrame) -> pd.Series[bool]:
    deit = rows["model"].isin(DEIT.values()) & rows["top1"].notna() & rows["gflops"].notna()
    return deit & rows["table"].isin(["Table 1", "Table A.3", "README"])


QUESTION = Question(
    noun="method",
    each_cost=True,
    like_dense=True,
    plots=(pareto.PLOT, tradeoff.PLOT, difference.PLOT, published_points.PLOT),
    printed=_rows,
    claims=_claims,
    finetuned_in_print=True,
)
