"""Published values beside ours: each claim of a paper with what was measured here that comes nearest to it.

Models and data differ, so both are given as the change to the dense model at a share of its cost; absolute numbers
follow in brackets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import stats, style
from analysis.comparison import spoken
from analysis.frame import reducer_names
from analysis.matching import against_dense, dense_cost, merge_seeds, paired
from analysis.plots.runtime import timed
from analysis.tables import percent, with_bounds

DEIT_S, DEIT_S_TOP1 = 4.6, 79.8  # GFLOPs and top-1 of the dense model in the ATS paper
NEAREST = 0.06  # of the dense cost: how far from a claim's cost ours may lie
# As printed, DeiT-S: a test holds them to the reference table.
PLACEMENTS = {"block 0": 73.1, "block 3": 78.5, "block 6": 77.4, "blocks 3-11": 79.2}  # Table A.4, costs matched
SAMPLERS = {"top-K": (["topk"], 78.9), "inverse transform": (["ats"], 79.7)}  # Table A.3, both at 2.9
EVIT_ALONE, EVIT_AND_ATS = (79.5, 3.0), (79.5, 2.5)  # Table A.5, 30 epochs
METHODS = {
    "IA-RED2": (["ia_red2", "iared2"], 78.6, 2.9, "Table 1, finetuned"),
    "DynamicViT": (["dynamic_vit", "dynamicvit"], 79.3, 2.9, "Table 1, finetuned"),
    "EViT": (["evit"], 79.5, 3.0, "Table 1, finetuned"),
    "ATS": (["ats"], 79.7, 2.9, "Table 1, finetuned"),
    "ToMe": (["tome"], 79.36, 2.7, "its README, trained"),
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
    share = 2.9 / DEIT_S
    return [
        _line(
            f"ATS at {where} (Table A.4)",
            _printed(top1, None),
            _nearest(rows, trials, share, lambda row, w=where: row["placement"] == w),  # type: ignore[misc]
            trials,
        )
        for where, top1 in PLACEMENTS.items()
    ]


def _samplers(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    lines = []
    for words, (name, top1) in SAMPLERS.items():
        for tuned in (True, False):
            part = [row for row in rows if row["finetuned"] is tuned or bool(row["finetuned"]) == tuned]
            found = _nearest(part, trials, 2.9 / DEIT_S, lambda row, n=name: reducer_names(row["reducer"]) == n)  # type: ignore[misc]
            if found is not None or tuned:
                claim = _printed(top1, 2.9) + ("" if tuned else " (finetuned; ours is off the shelf)")
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
        claim = _printed(*(EVIT_ALONE if alone else EVIT_AND_ATS))
        lines.append(_line(f"{row['variant']}, keep 0.7 (Table A.5)", f"{claim}, 30 epochs", row, trials))
    return lines


def _k(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    ats = [row for row in rows if reducer_names(row["reducer"]) == ["ats"] and not pd.isna(row["x"])]
    count = 48 if not patches else 48 * patches / 196
    row = min(ats, key=lambda one: abs(one["x"] - count), default=None)
    if row is None:
        return []
    claim = f"about 2 of 4.6 GFLOPs, {100 * 2 / DEIT_S:.0f} % of dense"
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
    for name, (reducers, top1, cost, where) in METHODS.items():
        own = [row for row in rows if len(set(used := reducer_names(row["reducer"]))) == 1 and used[0] in reducers]
        for variant in dict.fromkeys(row["variant"] for row in own):
            found = _nearest(own, trials, cost / DEIT_S, lambda row, v=variant: row["variant"] == v)  # type: ignore[misc]
            if found is not None:
                lines.append(_line(f"{variant} ({name}: {where})", _printed(top1, cost), found, trials))
    return lines


def _runtime(rows: list[Row], trials: pd.DataFrame, patches: int | None) -> list[tuple[str, str, str, str]]:
    measured = timed(trials)
    if measured.empty:
        return []
    lines = []
    for name, part in measured.groupby("variant", sort=False):
        row = part.loc[(part["ratio"] - DEIT_S / 2.9).abs().idxmin()]
        here = f"{row['faster']:.2f} × at {row['ratio']:.2f} × fewer GMACs (batch {row['at_batch']:g})"
        claim = "1.39 × (1010 to 1403 images/s) at 1.59 × fewer GFLOPs"
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


def _printed(top1: float, gflops: float | None) -> str:
    """A published DeiT-S value: "−0.1 points at 63 % (79.7; 2.9 of 4.6 GFLOPs)"."""
    change = percent((top1 - DEIT_S_TOP1) / 100, sign=True)
    if gflops is None:
        return f"{change} points ({top1:g}; GFLOPs matched)"
    return f"{change} points at {100 * gflops / DEIT_S:.0f} % ({top1:g}; {gflops:g} of 4.6 GFLOPs)"


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
