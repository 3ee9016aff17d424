"""How much of the multiply-adds that are saved is saved in time (Table A.1 of the ATS paper)."""

from __future__ import annotations

import pandas as pd

from analysis.facts.spec import Facts
from analysis.frame import records_of, row_nearest
from analysis.plots import runtime, tradeoff
from analysis.published import of_ats, printed
from analysis.questions.base import Line, Question
from analysis.tables import percent
from analysis.verdict import ROWS, between
from analysis.words import Finding, spoken


def found(facts: Facts) -> list[Finding]:
    """Measured speed-up as a share of what the count promises."""
    said = []
    for name, part in facts.timed.groupby("variant", sort=False):
        faster, ratio = part["faster"], part["ratio"]
        batches = sorted({f"{size:g}" for size in part["at_batch"].dropna()}, key=float)
        text = (
            f"{spoken(name)}: {_range(f'{faster.min():.2f}', f'{faster.max():.2f}')} times as fast as dense at "
            f"{_range(f'{ratio.min():.2f}', f'{ratio.max():.2f}')} times fewer GMACs: "
            f"{_range(percent((faster / ratio).min()), percent((faster / ratio).max()))} % of the ratio "
            f"(batch {', '.join(batches)})."
        )
        said.append(Finding(text, keys=tuple(part["key"]), headline=True))
    return said


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _claims(facts: Facts, patches: int | None) -> list[Line]:
    if facts.timed.empty:
        return []
    dense, ats = (printed("Table A.1", method) for method in ("", "ATS"))
    fewer, faster = dense.gflops / ats.gflops, ats.images_per_second / dense.images_per_second
    rates = f"{dense.images_per_second:g} to {ats.images_per_second:g} images/s"
    claim = f"{faster:.2f} × ({rates}) at {fewer:.2f} × fewer GFLOPs"
    lines = []
    for name, part in facts.timed.groupby("variant", sort=False):
        row = row_nearest(part, "ratio", fewer)
        here = f"{row['faster']:.2f} × at {row['ratio']:.2f} × fewer GMACs (batch {row['at_batch']:g})"
        lines.append((f"{name} (Table A.1)", claim, here, row["key"]))
    return lines


def _short(facts: Facts) -> str | None:
    """What share of the saving the clock shows, and who is fastest."""
    if facts.timed.empty:
        return None
    rows = facts.timed.assign(got=facts.timed["faster"] / facts.timed["ratio"])
    best = records_of(rows.nlargest(1, "faster"))[0]
    if best["faster"] <= 1:
        return (
            f"No time is saved: {spoken(best['variant'])}, the fastest, is {best['faster']:.2f} times as fast as the "
            f"dense model at {best['ratio']:.2f} times fewer multiply-adds."
        )
    return (
        f"Of the speed-up that the count promises {between(rows['got'].tolist())} % arrives; "
        f"{spoken(best['variant'])} is "
        f"{best['faster']:.2f} times as fast at {best['ratio']:.2f} times fewer multiply-adds."
    )


def _few(facts: Facts) -> pd.DataFrame:
    """The fastest of each series."""
    rows = facts.timed.sort_values("faster", ascending=False, kind="stable").drop_duplicates("variant").head(ROWS)
    bounds = zip(rows["faster"], rows["speedup_low"], rows["speedup_high"], strict=True)
    return pd.DataFrame(
        {
            "series": [spoken(name) for name in rows["variant"]],
            "share of dense cost (%)": [f"{100 / ratio:.0f}" for ratio in rows["ratio"]],
            "speed-up [quartiles]": [f"{one:.2f} [{low:.2f}, {high:.2f}]" for one, low, high in bounds],
            "of what the count promises (%)": [percent(one) for one in rows["faster"] / rows["ratio"]],
            "batch": [f"{size:g}" for size in rows["at_batch"]],
        }
    )


QUESTION = Question(
    short=_short,
    few=_few,
    found=found,
    ranked=False,
    plots=(runtime.PLOT, tradeoff.PLOT),
    printed=of_ats("Table A.1"),
    claims=_claims,
)
