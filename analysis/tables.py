"""Tables of results: numbers as data frames, and the same in Markdown, CSV and LaTeX, published numbers apart
from ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ablations.records.columns import OPTIONS
from analysis import stats
from analysis.facts.matching import against_dense
from analysis.facts.spec import Facts
from analysis.frame import records_of

OUR_NOTE = (
    "GMACs: as executed, reducer included, mean ± standard deviation over images. Reference: the published "
    "algorithm's order of work, for comparison with print. Brackets: 95 % intervals over images (bootstrap; Wilson's "
    "where a run left no per-image table); the difference to dense is paired on the same images. Seeds, where several: "
    "± is the standard deviation over them, which is not in the brackets. Target: the cost aimed at, * where it could "
    "not be reached (with the reason). Trials by the first eight digits of their key."
)
TESTS = (
    "difference_low", "difference_high", "difference_boot_low", "difference_boot_high", "p_value", "mid_p", "test",
)  # fmt: skip
COPIED = (
    "agreement", "coverage", "class_kept", "target_gmacs", "calibration_gmacs", "target_reached", "target_note",
    "probes", "images_per_second", "dense_images_per_second", "speedup", "speedup_low", "speedup_high",
    "measured_batch", "epochs", "train_images", "train_seconds",
)  # fmt: skip
SHORT = 8  # digits of a key in a table
EVERY = "every trial"  # of the plain model's row where it had no trial of its own: each trial records its answers
PUBLISHED_NOTE = (
    "Published by others, as printed. Not measured here; what differs from our setting stands in the last column."
)
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def measured(facts: Facts) -> pd.DataFrame:
    """Numbers of one spec, the dense model first: accuracies and differences 0 .. 1, costs in GMACs, trial
    keys.
    """
    records = [] if math.isnan(facts.dense_top1) else [_dense_record(facts.trials, facts.dense)]
    records += [_record(row, facts.dense) for row in records_of(facts.rows)]
    return pd.DataFrame(records)


def _record(row: Mapping[str, Any], dense_cost: float) -> dict[str, Any]:
    """One row of ``merge_seeds`` as a line of the table."""
    paired = against_dense(row)
    tests = {} if paired is None else {
        "difference_low": paired.low,
        "difference_high": paired.high,
        "difference_boot_low": paired.boot_low,
        "difference_boot_high": paired.boot_high,
        "p_value": paired.p_value,
        "mid_p": paired.mid_p,
        "test": paired.test,
    }  # fmt: skip
    copied = {name: row.get(name, math.nan) for name in (*COPIED, *OPTIONS)}
    return {
        "model": row["model"],
        "variant": row["variant"],
        "x": row["x"],
        "placement": row["placement"],
        "budget": row["budget"],
        "seeds": row["seeds"],
        "finetuned": row["finetuned"],
        "gmacs": row["gmacs_mean"],
        "gmacs_std": row["gmacs_std"],
        "reference_gmacs": row["reference_gmacs_mean"],
        "reducer_gmacs": row["reducer_gmacs_mean"],
        "share_of_dense": row["gmacs_mean"] / dense_cost,
        "top1": row["top1"],
        "top1_low": row["top1_low"],
        "top1_high": row["top1_high"],
        "top1_seed_sd": row["top1_sd"],
        "interval": row.get("interval", ""),
        "difference": row["top1"] - row["dense_top1"],
        **{name: tests.get(name, math.nan) for name in TESTS},
        "tokens_out": row["tokens"][-1] if len(row["tokens"]) else math.nan,
        **copied,
        "reducer": row["reducer"],
        "keys": " ".join(row["keys"]),
    }


def display(table: pd.DataFrame) -> pd.DataFrame:
    """``measured`` as a reader sees it: every cell text, units in the header. Columns without a value are left out."""
    columns = {
        "variant": [
            f"{v.replace('_', ' ')}{f' ({int(n)} seeds)' if n > 1 else ''}"
            for v, n in zip(table["variant"], table["seeds"], strict=True)
        ],
        "placement": table["placement"].to_list(),
        "budget": [b or (f"{x:g}" if pd.notna(x) else "") for b, x in zip(table["budget"], table["x"], strict=True)],
        "target": [
            f"{_number(value, 3)}{'*' if reached is False else ''}"
            for value, reached in zip(table["target_gmacs"], table["target_reached"], strict=True)
        ],
        "GMACs": [
            f"{_number(m, 3)} ± {_number(s, 3)}" if pd.notna(s) and s >= 0.0005 else _number(m, 3)
            for m, s in zip(table["gmacs"], table["gmacs_std"], strict=True)
        ],
        "GMACs, reference": [_number(value, 3) for value in table["reference_gmacs"]],
        "share of dense (%)": [_number(100 * value, 1) for value in table["share_of_dense"]],
        "top-1 (%)": [with_bounds(*row) for row in table[["top1", "top1_low", "top1_high"]].to_numpy(dtype=float)],
        "over seeds": [f"± {percent(value)}" if pd.notna(value) else "" for value in table["top1_seed_sd"]],
        "to dense (points)": [
            with_bounds(*row, sign=True)
            for row in table[["difference", "difference_low", "difference_high"]].to_numpy(dtype=float)
        ],
        "tokens out": [_number(value, 1) for value in table["tokens_out"]],
        "trained": [
            f"{images:,.0f} images in {epochs:g} epochs, {_number(seconds, 0)} s" if pd.notna(epochs) else ""
            for epochs, images, seconds in table[["epochs", "train_images", "train_seconds"]].to_numpy(dtype=float)
        ],
        "speed-up": [f"{_number(value, 2)} ×" if pd.notna(value) else "" for value in table["speedup"]],
        "trial": [short_keys(keys) or EVERY for keys in table["keys"]],
    }
    optional = ("target", "over seeds", "trained", "speed-up")
    shown = pd.DataFrame({name: cells for name, cells in columns.items() if name not in optional or any(cells)})
    for option in OPTIONS:  # how the model was driven, where trials differ in it
        told = [value if isinstance(value, str) else "" for value in table.get(option, [])]
        if len({*told} - {""}) > 1:
            shown.insert(list(shown.columns).index("budget") + 1, option, told)
    return shown


def listed(table: pd.DataFrame) -> list[dict[str, Any]]:
    """``measured`` as lines of the table of everything: words, and numbers that it can be sorted by."""
    shown = display(table)
    return [
        {
            "name": str(row["variant"]).replace("_", " "),
            "placement": row["placement"],
            "budget": shown["budget"].iloc[i],
            "share": _sortable(100 * row["share_of_dense"], 1),
            "gmacs": _sortable(row["gmacs"], 3),
            "top1": _sortable(100 * row["top1"], 1),
            "bounds": _range(100 * row["top1_low"], 100 * row["top1_high"]),
            "change": _sortable(100 * row["difference"], 1),
            "speedup": _sortable(row["speedup"], 2),
        }
        for i, row in enumerate(records_of(table))
    ]


def _sortable(value: float, digits: int) -> tuple[str, str]:
    """A number as it is shown, and as it is sorted by."""
    return (_number(value, digits).replace("-", "−"), "" if pd.isna(value) else f"{value:.6g}")


def _range(low: float, high: float) -> str:
    return "" if pd.isna(low) or pd.isna(high) else f"{low:.1f} to {high:.1f}"


def reasons(table: pd.DataFrame) -> list[str]:
    """For each row of ``measured`` why it did not reach the cost it aimed at; "" where it did."""
    return [
        str(note) if reached is False and isinstance(note, str) else ""
        for note, reached in zip(table["target_note"], table["target_reached"], strict=True)
    ]


def spoken_reasons(table: pd.DataFrame) -> list[str]:
    """The reasons as lines below a table, each with its trial."""
    rows = zip(reasons(table), table["target_gmacs"], table["placement"], table["keys"], strict=True)
    return [
        f"* {short_keys(keys)}, {placement}, target {_number(target, 3)}: {why}."
        for why, target, placement, keys in rows
        if why
    ]


def short_keys(keys: str) -> str:
    """Space-separated keys as a table shows them: "0123abcd +2"."""
    first, *others = keys.split(" ")
    return first[:SHORT] + (f" +{len(others)}" if others else "")


def display_published(rows: pd.DataFrame) -> pd.DataFrame:
    """Published rows as a reader sees them: source and setting in every row, then what differs from ours."""
    return pd.DataFrame(
        {
            "model": rows["model"].fillna(""),
            "method": rows["method"].fillna("none (dense)"),
            "GFLOPs as printed": [_number(value, None) for value in rows["gflops"]],
            "top-1 as printed (%)": [_number(value, None) for value in rows["top1"]],
            "data": rows["dataset"].fillna(""),
            "setting": [_setting(row) for row in records_of(rows)],
            "source": [f"{source}, {table}" for source, table in zip(rows["source"], rows["table"], strict=True)],
            "differs from ours": rows["differs"],
        }
    )


def _setting(row: Mapping[str, Any]) -> str:
    """What is printed beside a row; of clips also how many views their cost counts."""
    told = [row["setting"] if isinstance(row["setting"], str) else ""]
    told += [f"{row['views']} views"] if isinstance(row.get("views"), str) else []
    return "; ".join(text for text in told if text)


def with_bounds(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """A share 0 .. 1 in percent with its bounds: "78.2 [75.4, 80.7]"; a true minus sign where ``sign`` is
    asked for.
    """
    if math.isnan(value):
        return ""
    if math.isnan(low) or math.isnan(high):
        return percent(value, sign=sign)
    return f"{percent(value, sign=sign)} [{percent(low, sign=sign)}, {percent(high, sign=sign)}]"


def percent(value: float, *, sign: bool = False) -> str:
    """A share 0 .. 1 as a number of percent with one decimal, without "-0.0"."""
    text = f"{100 * value + 0.0:{'+' if sign else ''}.1f}"
    text = text.replace("-0.0", "0.0").replace("+0.0", "0.0") if float(text) == 0 else text
    return text.replace("-", "−")


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table; a pipe or a line break inside a cell cannot break it."""

    def line(cells: list[str]) -> str:
        clean = [
            str(c).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for c in cells
        ]
        return f"| {' | '.join(clean)} |"

    rows = [line(list(table.columns)), f"|{' --- |' * table.shape[1]}"]
    return "\n".join(rows + [line(list(row)) for row in table.itertuples(index=False)]) + "\n"


def to_latex(table: pd.DataFrame, *, caption: str, label: str) -> str:
    """A table with booktabs rules; every cell escaped."""
    lines = [
        r"\begin{table}[t]",
        r"\centering\small",
        f"\\caption{{{latex(caption)}}}",
        f"\\label{{tab:{label}}}",
        f"\\begin{{tabular}}{{{'l' * table.shape[1]}}}",
        r"\toprule",
    ]
    lines.append(" & ".join(latex(name) for name in table.columns) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(latex(str(cell)) for cell in row) + r" \\" for row in table.itertuples(index=False)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def latex(text: str) -> str:
    """Plain text as LaTeX source."""
    return "".join(_LATEX.get(character, character) for character in text).replace("\n", " ")


def write(
    folder: Path,
    name: str,
    *,
    title: str,
    subtitle: str,
    ours: pd.DataFrame,
    published: pd.DataFrame,
    beside: pd.DataFrame,
    note: str,
) -> list[Path]:
    """Write a spec's tables: <name>.md and .tex with both parts apart, <name>.csv with our numbers only, and
    <name>_published.csv where there are published ones. Returns what was written.
    """
    shown, printed = display(ours), display_published(published)
    heading = ". ".join(subtitle.split("\n"))
    missed = spoken_reasons(ours)
    md = [f"# {title}\n", f"{heading}\n", to_markdown(shown), f"{OUR_NOTE}\n"]
    md += ["\n".join(f"- {line.removeprefix('* ')}" for line in missed) + "\n"] if missed else []
    tex = [to_latex(shown, caption=" ".join([f"{title} ({heading}). {OUR_NOTE}", *missed]), label=name)]
    if len(beside):
        sided = beside.assign(trials=[short_keys(keys) for keys in beside["trials"]])
        md += ["## Beside print\n", to_markdown(sided)]
        tex.append(to_latex(sided, caption=f"{title}: beside published values.", label=f"{name}-beside"))
    if len(published) or note:
        md.append("## Published\n")
        md += [f"{note}\n"] if note else []
    if len(published):
        md += [to_markdown(printed), f"{PUBLISHED_NOTE}\n"]
        tex.append(
            to_latex(printed, caption=f"{title}: published numbers. {PUBLISHED_NOTE}", label=f"{name}-published")
        )
    paths = {
        folder / f"{name}.md": "\n".join(md),
        folder / f"{name}.tex": "\n".join(tex),
        folder / f"{name}.csv": ours.to_csv(index=False),
    }
    if len(beside):
        paths[folder / f"{name}_beside.csv"] = beside.to_csv(index=False)
    if len(published):
        paths[folder / f"{name}_published.csv"] = published.to_csv(index=False)
    for path, text in paths.items():
        path.write_text(text, encoding="utf-8")
    return list(paths)


def _dense_record(trials: pd.DataFrame, cost: float) -> dict[str, object]:
    """The plain model as a row: from its own trial where there is one, else from what every trial notes of
    it.
    """
    first = trials[trials["dense_top1"].notna()].iloc[0]
    own = trials[trials["dense"]]
    top1, images = float(first["dense_top1"]), int(first["images"])
    answers = first.get("dense_answers")
    if isinstance(answers, np.ndarray):
        bounds, interval = stats.accuracy(answers), "bootstrap"
    else:
        bounds = stats.wilson(top1 * images, images) if images else stats.Interval(top1, math.nan, math.nan)
        interval = "Wilson"
    tokens = own.iloc[0]["tokens"] if len(own) else first["tokens"][:1]  # the first block has not reduced anything yet
    return {
        **dict.fromkeys((*TESTS, *COPIED, *OPTIONS), math.nan),
        "model": first["model"],
        "variant": "dense",
        "x": math.nan,
        "placement": "",
        "budget": "",
        "seeds": 1,
        "finetuned": False,
        "gmacs": cost,
        "gmacs_std": 0.0,
        "reference_gmacs": cost,
        "reducer_gmacs": 0.0,
        "share_of_dense": 1.0,
        "top1": top1,
        "top1_low": bounds.low,
        "top1_high": bounds.high,
        "top1_seed_sd": math.nan,
        "interval": interval,
        "difference": 0.0,
        "tokens_out": tokens[-1] if len(tokens) else math.nan,
        "agreement": 1.0,
        "reducer": "[]",
        "keys": " ".join(own["key"]),
    }


def _number(value: Any, digits: int | None) -> str:
    """A number with fixed decimals, or as short as it is where ``digits`` is None; "" for a null."""
    if pd.isna(value):
        return ""
    return f"{value:g}" if digits is None else f"{value:.{digits}f}"
