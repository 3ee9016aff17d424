"""The numbers in print that a table of ours may be read beside, each with its source, and why it is not the
same thing.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import resources

import pandas as pd

from analysis.frame import Setting

DEIT = {"deit_tiny": "DeiT-Ti", "deit_small": "DeiT-S", "deit_base": "DeiT-B"}  # prefixes of timm names
IMAGENET_VAL = 50_000  # images of the full validation set
NO_MODEL = "no single model"


@dataclass(frozen=True)
class Reference:
    """What is in print about a spec's question: rows of numbers, and in words what was only drawn or said."""

    choose: Callable[[pd.DataFrame], pd.Series[bool]]
    note: str = ""


def _table(*names: str) -> Callable[[pd.DataFrame], pd.Series[bool]]:
    return lambda rows: rows["source"].str.startswith("ATS") & rows["table"].isin(names)


def _stacking(rows: pd.DataFrame) -> pd.Series[bool]:
    return _table("Table A.5")(rows) | (rows["source"].str.startswith("EViT") & rows["method"].str.startswith("EViT"))


def _methods(rows: pd.DataFrame) -> pd.Series[bool]:
    deit = rows["model"].isin(["DeiT-Ti", "DeiT-S", "DeiT-B"]) & rows["top1"].notna() & rows["gflops"].notna()
    return deit & rows["table"].isin(["Table 1", "Table A.3", "README"])


REFERENCES: Mapping[str, Reference] = {
    "score_functions": Reference(
        lambda rows: rows["table"].isna() & False,
        "Printed as curves only (ATS, Figure 3; DeiT-S, one stage, off the shelf): class attention times "
        "value norm is best, random is worst.",
    ),
    "k_values": Reference(
        _table("Figure A.1"), "The curves of Figure A.1 are not given as numbers; only this point is stated."
    ),
    "stage_placement": Reference(_table("Table A.4")),
    "class_token": Reference(
        lambda rows: rows["table"].isna() & False,
        "Printed as curves only (ATS, Figure A.4; DeiT-S, one stage, off the shelf): always keeping the "
        "class token is better.",
    ),
    "evit_stacking": Reference(_stacking),
    "sampling_method": Reference(_table("Table A.3")),
    "single_multi_stage": Reference(_table("Figure 4"), "Printed as curves (ATS, Figure 4); only this is stated."),
    "runtime": Reference(_table("Table A.1")),
    "finetuning": Reference(_table("Table A.3")),
    "methods": Reference(_methods),
}


@functools.cache
def load() -> pd.DataFrame:
    """Every published row: source, table, model, method, gflops, top1, setting and more, as printed (top1 in
    percent).
    """
    text = resources.files("analysis").joinpath("reference/published_results.csv").read_text(encoding="utf-8")
    return pd.read_csv(io.StringIO(text))


@dataclass(frozen=True)
class Printed:
    """A row of the reference table as printed; what is not printed is NaN."""

    method: str  # "" is the dense model
    top1: float  # percent
    gflops: float
    images_per_second: float
    setting: str


def printed_rows(table: str, *, model: str = "DeiT-S") -> list[Printed]:
    """The rows of a table of the ATS paper, or of all the READMEs, on a model, in their order."""
    rows = load().fillna({"method": "", "setting": ""})
    rows = rows[(rows["table"] == table) & (rows["model"] == model)]
    return [Printed(*row) for row in rows[[field.name for field in fields(Printed)]].itertuples(index=False)]


def printed(table: str, method: str, *, model: str = "DeiT-S") -> Printed:
    """The one row of a method, found by its name as it is printed."""
    (found,) = [row for row in printed_rows(table, model=model) if row.method == method]
    return found


def published_rows(spec: str, setting: Setting) -> pd.DataFrame:
    """Published rows on a spec's question with a column ``differs``; the rows on our model come first."""
    reference = REFERENCES.get(spec)
    rows = load()
    rows = rows[reference.choose(rows)] if reference else rows.iloc[:0]
    ours = model_name(setting.model)
    rows = rows.assign(differs=[differs(row, setting) for row in rows.to_dict("records")])
    return rows.sort_values("model", key=lambda names: names != ours, kind="stable").reset_index(drop=True)


def published_note(spec: str) -> str:
    """What is in print about the question without numbers; "" where nothing is to be said."""
    return REFERENCES[spec].note if spec in REFERENCES else ""


def model_name(timm_name: str) -> str:
    """A timm name as the papers print it, where it is one of theirs ("DeiT-Ti"); else unchanged."""
    return next((paper for prefix, paper in DEIT.items() if timm_name.startswith(f"{prefix}_patch16_224")), timm_name)


def differs(row: Mapping[str, object], setting: Setting) -> str:
    """Why a published row is not the same measurement as ours: model, data, training."""
    reasons = []
    if model_name(setting.model) != row["model"]:
        reasons.append(f"other model ({row['model'] if isinstance(row['model'], str) else NO_MODEL})")
    if setting.workload == "embedded":
        reasons.append("other data (ImageNet-1k val)")
    elif setting.images < IMAGENET_VAL:
        reasons.append(f"all 50,000 images of ImageNet-1k val (here {setting.images:,} images)")
    words = str(row["setting"]).casefold()
    if row["table"] == "Table A.5" or "finetuned" in words or "trained" in words:
        reasons.append("trained with the reduction")
    return "; ".join(reasons) or "same model and data as printed"
