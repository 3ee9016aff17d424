"""Which method, or which way of counting, to take on clips; beside it what Tables 2 and 3 of the ATS paper print.

The tables count all views of a clip, and so do results here.
"""

from __future__ import annotations

import pandas as pd

from analysis.facts.spec import Facts
from analysis.frame import reducer_names
from analysis.plots import difference, pareto, tradeoff
from analysis.published import Printed, of_ats, printed, printed_rows
from analysis.questions.base import Line, Question
from analysis.questions.beside import line, nearest, records
from analysis.tables import percent

TABLES = ("Table 2", "Table 3")
MODELS = {"Table 2": ("TimeSformer-L", "X-ViT (16x)"), "Table 3": ("TimeSformer-HR", "X-ViT (16x)")}
MIXED = ("Table 2", "X-ViT (16x)")  # the cost printed there is that of 8 frames


def dense_row(table: str, model: str) -> Printed:
    """The printed row of the model without reduction."""
    return next(row for row in printed_rows(table, model=model) if row.method == "")


def printed_share(table: str, model: str) -> float:
    """The printed cost with ATS as a share of the dense model's, the same views on both sides."""
    return printed(table, "ATS", model=model).gflops / dense_row(table, model).gflops


def rows(every: pd.DataFrame) -> pd.Series[bool]:
    """The printed rows on the models that ATS was added to."""
    models = {model for names in MODELS.values() for model in names}
    return of_ats(*TABLES)(every) & every["model"].isin(models)


def claims(facts: Facts, patches: int | None) -> list[Line]:
    """Each printed pair, dense and with ATS, with our nearest trial of ATS alone."""
    own = [row for row in records(facts) if reducer_names(row["reducer"]) == ["ats"]]
    found = []
    for table, names in MODELS.items():
        for model in names:
            here = nearest(own, facts, printed_share(table, model), lambda row: True)
            found.append(line(f"ATS on {model} ({table})", _words(table, model), here, facts))
    return found


def _words(table: str, model: str) -> str:
    """As printed: "−0.2 points at 49 % (80.5; 3510 of 7140 GFLOPs, all views)"."""
    ats, dense = printed(table, "ATS", model=model), dense_row(table, model)
    change = percent((ats.top1 - dense.top1) / 100, sign=True)
    frames = "; a cost of 8 frames beside an accuracy of 16" if (table, model) == MIXED else ""
    return (
        f"{change} points at {100 * printed_share(table, model):.0f} % ({ats.top1:g}; {ats.gflops:g} of "
        f"{dense.gflops:g} GFLOPs, all views{frames})"
    )


def _note() -> str:
    mixed, whole = dense_row(*MIXED).gflops, dense_row("Table 3", MIXED[1]).gflops
    large, high = dense_row("Table 2", "TimeSformer-L").gflops, dense_row("Table 3", "TimeSformer-HR").gflops
    return (
        f"Costs in print are of a clip with all its views: TimeSformer's {large:g} and {high:g} GFLOPs are three. "
        f"The row X-ViT (16x) of Table 2 has the cost of 8 frames, {mixed:g}, beside an accuracy of 16, which cost "
        f"{whole:g} (Table 3): compare shares of the dense cost, not numbers. No public text or code says in which "
        "blocks ATS sat in these models, what its budget counted, how places that are gone entered the attention over "
        "time or the shift, or whether the models were finetuned: all of that is this project's reading."
    )


NOTE = _note()
ON = "TimeSformer-L, TimeSformer-HR and X-ViT"

QUESTION = Question(
    noun="method",
    each_cost=True,
    like_dense=True,
    plots=(pareto.PLOT, tradeoff.PLOT, difference.PLOT),
    printed=rows,
    printed_on=ON,
    note=NOTE,
    claims=claims,
)
