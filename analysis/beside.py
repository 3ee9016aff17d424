"""Published values beside ours: each claim of a paper with what was measured here that comes nearest to it.

Models and data differ, so both are given as the change to the dense model at a share of its cost; absolute numbers
follow in brackets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import stats, style
from analysis.comparison import spoken
from analysis.frame import reducer_names
from analysis.matching import against_dense, dense_cost, merge_seeds, paired
from analysis.plots.runtime import timed
from analysis.published import Printed, printed, printed_rows
from analysis.tables import percent, with_bounds

NEAREST = 0.06  # of the dense cost: how far from a claim's cost ours may lie
SAMPLERS = {"top-K": (["topk"], "top-K"), "inverse transform": (["ats"], "ATS inverse transform")}  # Table A.3
METHODS = {  # reducers, the printed row's table and method, and what was done
    "IA-RED2": (["ia_red2", "iared2"], ("Table 1", "IA-RED2"), "finetuned"),
    "DynamicViT": (["dynamic_vit", "dynamicvit"], ("Table 1", "DynamicViT (30 epochs)"), "finetuned"),
    "EViT": (["evit"], ("Table 1", "EViT (30 epochs)"), "finetuned"),
    "ATS": (["ats"], ("Table 1", "ATS"), "finetuned"),
    "ToMe": (["tome"], ("README", "ToMe r=13"), "trained"),
}
COLUMNS = ("what", "published", "measured here", "trials")

Row = dict[str, Any]


def beside(spec: str, trials: pd.DataFrame, *, patches: int | None = None) -> pd.DataFrame:
    """One line for each published claim that this spec's trials speak to, as text with full trial keys."""
    rows = merge_seeds(trials[~trials["dense"]]).to_dict("records")
    make = MAKERS.get(spec)
    lines = make(rows, trials, patches) if make and rows else []
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _placements(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    stages = {one.setting.removeprefix("stage(s) "): one for one in printed_rows("Table A.4")}
    claims = {f"block{'s' if '-' in stage else ''} {stage}": one for stage, one in stages.items()}
    return [
        _line(
            f"ATS at {where} (Table A.4)",
            _printed(claim),
            _nearest(rows, trials, _share(printed("Table 1", "ATS")), lambda row, w=where: row["placement"] == w),  # type: ignore[misc]
            trials,
        )
        for where, claim in claims.items()
    ]


def _samplers(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    lines, share = [], _share(printed("Table 1", "ATS"))
    for words, (name, method) in SAMPLERS.items():
        for tuned in (True, False):
            part = [row for row in rows if row["finetuned"] is tuned or bool(row["finetuned"]) == tuned]
            found = _nearest(part, trials, share, lambda row, n=name: reducer_names(row["reducer"]) == n)  # type: ignore[misc]
            if found is not None or tuned:
                known = "" if tuned else " (finetuned; ours is off the shelf)"
                claim = _printed(printed("Table A.3", method)) + known
                lines.append(
                    _line(f"{words}, {'finetuned' if tuned else 'off the shelf'} (Table A.3)", claim, found, trials)
                )
    return lines


def _stacking(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    lines = []
    for row in rows:
        if pd.isna(row["x"]) or abs(row["x"] - 0.7) > 1e-6 or not pd.isna(row["target_gmacs"]):
            continue
        alone = reducer_names(row["reducer"]) == ["evit"]
        claim = _printed(printed("Table A.5", f"EViT (30 epochs){'' if alone else ' + ATS'}"))
        lines.append(_line(f"{row['variant']}, keep 0.7 (Table A.5)", f"{claim}, 30 epochs", row, trials))
    return lines


def _k(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    ats = [row for row in rows if reducer_names(row["reducer"]) == ["ats"] and not pd.isna(row["x"])]
    count = 48 if not patches else 48 * patches / 196
    row = min(ats, key=lambda one: abs(one["x"] - count), default=None)
    if row is None:
        return []
    known = printed("Figure A.1", "ATS")
    claim = f"about {known.gflops:g} of {_dense().gflops:g} GFLOPs, {100 * _share(known):.0f} % of dense"
    return [_line(f"ATS, one stage, K = {row['x']:g} (Figure A.1: K = 48 of 196)", claim, row, trials)]


def _stages(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    names = dict.fromkeys(row["variant"] for row in rows if reducer_names(row["reducer"]) == ["ats"])
    return [
        _line(
            f"{name} (Figure 4)",
            "37 % of GFLOPs saved, accuracy almost kept (DeiT-S, finetuned)",
            _nearest(rows, trials, 0.63, lambda row, n=name: row["variant"] == n),  # type: ignore[misc]
            trials,
        )
        for name in names
    ]


def _methods(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    lines = []
    for name, (reducers, (where, method), done) in METHODS.items():
        claim = printed(where, method)
        source = "its README" if where == "README" else where
        own = [row for row in rows if len(set(used := reducer_names(row["reducer"]))) == 1 and used[0] in reducers]
        for variant in dict.fromkeys(row["variant"] for row in own):
            found = _nearest(own, trials, _share(claim), lambda row, v=variant: row["variant"] == v)  # type: ignore[misc]
            if found is not None:
                lines.append(_line(f"{variant} ({name}: {source}, {done})", _printed(claim), found, trials))
    return lines


def _runtime(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    measured = timed(trials)
    if measured.empty:
        return []
    dense, ats = (printed("Table A.1", method) for method in ("", "ATS"))
    fewer, faster = dense.gflops / ats.gflops, ats.images_per_second / dense.images_per_second
    rates = f"{dense.images_per_second:g} to {ats.images_per_second:g} images/s"
    claim = f"{faster:.2f} × ({rates}) at {fewer:.2f} × fewer GFLOPs"
    lines = []
    for name, part in measured.groupby("variant", sort=False):
        row = part.loc[(part["ratio"] - fewer).abs().idxmin()]
        here = f"{row['faster']:.2f} × at {row['ratio']:.2f} × fewer GMACs (batch {row['at_batch']:g})"
        lines.append((f"{name} (Table A.1)", claim, here, row["key"]))
    return lines


def _scores(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    return _order(rows, trials, "class attention x value norm best, random worst (curves only, Figure 3)")


def _class_token(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    return _order(rows, trials, "always keeping it is better (curves only, Figure A.4)")


def _order(rows: list[Row], trials: pd.DataFrame, claim: str) -> list[tuple[str, str, str, str]]:
    """The series from best to worst by their mean change to dense near half the dense cost."""
    found = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        row = _nearest(rows, trials, 0.5, lambda one, n=name: one["variant"] == n)  # type: ignore[misc]
        found += [row] if row is not None else []
    if len(found) < 2:
        return []
    ranked = sorted(found, key=lambda row: -row["top1"])
    here = "; ".join(f"{spoken(row['variant'])} {percent(row['top1'])}" for row in ranked)
    keys = " ".join(key for row in ranked for key in row["keys"])
    return [("order at about half the cost", claim, f"{here} (top-1, %){_told(ranked)}", keys)]


def _told(ranked: Sequence[Row]) -> str:
    """Which of a ranking are told apart from its first: an order of numbers is not yet an order."""
    tests = [(row, paired(ranked[0], row)) for row in ranked[1:]]
    known = [(row, test) for row, test in tests if test is not None]
    if not known:
        return ""
    corrected = stats.holm([test.p_value for _, test in known])
    names = [spoken(row["variant"]) for (row, _), p in zip(known, corrected, strict=True) if p < stats.ALPHA]
    return f"; told apart from the first (Holm): {', '.join(names) or 'none'}"


def _nearest(rows: Sequence[Row], trials: pd.DataFrame, share: float, chosen: Callable[[Row], bool]) -> Row | None:
    """The chosen row nearest to a share of the dense cost; None where none is near."""
    dense = dense_cost(trials)
    part = [row for row in rows if chosen(row)]
    row = min(part, key=lambda one: abs(one["gmacs_mean"] / dense - share), default=None)
    return row if row is not None and abs(row["gmacs_mean"] / dense - share) <= NEAREST else None


def _printed(claim: Printed) -> str:
    """A published DeiT-S value: "−0.1 points at 63 % (79.7; 2.9 of 4.6 GFLOPs)"."""
    change = percent((claim.top1 - _dense().top1) / 100, sign=True)
    if math.isnan(claim.gflops):
        return f"{change} points ({claim.top1:g}; GFLOPs matched)"
    of = f"{claim.gflops:g} of {_dense().gflops:g} GFLOPs"
    return f"{change} points at {100 * _share(claim):.0f} % ({claim.top1:g}; {of})"


def _dense() -> Printed:
    """DeiT-S itself."""
    return printed("Table 1", "")


def _share(claim: Printed) -> float:
    """Of the dense cost."""
    return claim.gflops / _dense().gflops


def _line(what: str, claim: str, row: Mapping[str, Any] | None, trials: pd.DataFrame) -> tuple[str, str, str, str]:
    if row is None:
        return what, claim, "not measured near this cost", ""
    share, test = row["gmacs_mean"] / dense_cost(trials), against_dense(row)
    change = with_bounds(test.difference, test.low, test.high, sign=True) if test else percent(
        row["top1"] - row["dense_top1"], sign=True
    )  # fmt: skip
    seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
    here = (
        f"{change} points at {100 * share:.0f} % ({percent(row['top1'])}; {style.cost(row['gmacs_mean'])} of "
        f"{style.cost(dense_cost(trials))} GMACs{seeds})"
    )
    return what, claim, here, " ".join(row["keys"])


MAKERS: Mapping[str, Callable[[list[Row], pd.DataFrame, int | None], list[tuple[str, str, str, str]]]] = {
    "score_functions": _scores,
    "k_values": _k,
    "sampling_method": _samplers,
    "class_token": _class_token,
    "stage_placement": _placements,
    "single_multi_stage": _stages,
    "evit_stacking": _stacking,
    "runtime": _runtime,
    "methods": _methods,
    "finetuning": _samplers,
}
