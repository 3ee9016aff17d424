"""The numbers in print that a table of ours may be read beside, each with its source, and why it is not the
same thing.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import resources

import pandas as pd

from analysis.frame import Setting, records_of

DEIT = {"deit_tiny": "DeiT-Ti", "deit_small": "DeiT-S", "deit_base": "DeiT-B"}  # prefixes of timm names
_BACKBONES = {"cvt": "CvT", "ps_vit": "PS-ViT"}  # beginnings of this project's names of models
IMAGENET_VAL = 50_000  # images of the full validation set
NO_MODEL = "no single model"


Choose = Callable[[pd.DataFrame], "pd.Series[bool]"]  # which rows of the table speak to a question


def of_ats(*names: str) -> Choose:
    """The rows of these tables and figures of the ATS paper."""
    return lambda rows: rows["source"].str.startswith("ATS") & rows["table"].isin(names)


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
    """The rows of a table (of the ATS paper, or of all the READMEs) on a model, in their order."""
    rows = load().fillna({"method": "", "setting": ""})
    rows = rows[(rows["table"] == table) & (rows["model"] == model)]
    return [Printed(*row) for row in rows[[field.name for field in fields(Printed)]].itertuples(index=False)]


def printed(table: str, method: str, *, model: str = "DeiT-S") -> Printed:
    """The one row of a method, found by its name as it is printed."""
    (found,) = [row for row in printed_rows(table, model=model) if row.method == method]
    return found


def share(claim: Printed, *, model: str = "DeiT-S") -> float:
    """A printed cost as a share of the dense model's."""
    return claim.gflops / printed("Table 1", "", model=model).gflops


def number(table: str, method: str, before: str, after: str = "") -> float:
    """The number that stands between these words in what is printed about a method."""
    (found,) = re.findall(f"{before}([0-9.]+){after}", printed(table, method).setting)
    return float(found)


def ats_costs() -> dict[str, tuple[float, float]]:
    """GFLOPs of ATS on DeiT-S and of DeiT-S itself, by who says so: the paper, and a user of its released code."""
    dense = printed("Table 1", "").gflops
    said = {"paper": printed("Table 1", "ATS"), "release, by a user": printed("issue 2", "ATS")}
    return {who: (row.gflops, dense) for who, row in said.items()}


def published_rows(choose: Choose | None, setting: Setting) -> pd.DataFrame:
    """Published rows on a question with a column ``differs``; the rows on our model come first."""
    rows = load()
    rows = rows.iloc[:0] if choose is None else rows[choose(rows)]
    ours = model_name(setting.model)
    rows = rows.assign(differs=[differs(row, setting) for row in records_of(rows)])
    return rows.sort_values("model", key=lambda names: names != ours, kind="stable").reset_index(drop=True)


def dense_top1(model: str) -> float | None:
    """Accuracy in print of a DeiT without any reduction, in percent; None for a model of another name."""
    rows = load()
    names = {"DeiT-B": "DeiT-Base/16"}
    found = rows[(rows["model"] == names.get(model, model)) & rows["method"].isna() & model.startswith("DeiT-")]
    return None if found.empty else float(found["top1"].iloc[0])


def model_name(timm_name: str) -> str:
    """A model's name as the papers print it, where it is one of theirs ("DeiT-Ti", "CvT-13"); else unchanged."""
    for ours, theirs in _BACKBONES.items():
        bare = timm_name.partition("?img=")[0]
        if bare.startswith(f"{ours}_"):  # ps_vit_b_14 -> PS-ViT-B/14
            parts = bare.removeprefix(f"{ours}_").split("_")
            return f"{theirs}-{'/'.join(part.upper() if len(part) == 1 else part.title() for part in parts)}"
    return next((paper for prefix, paper in DEIT.items() if timm_name.startswith(f"{prefix}_patch16_224")), timm_name)


def differs(row: Mapping[str, object], setting: Setting) -> str:
    """Why a published row is not the same measurement as ours: model, data, training."""
    reasons = []
    if model_name(setting.model) != row["model"]:
        reasons.append(f"other model ({row['model'] if isinstance(row['model'], str) else NO_MODEL})")
    known = str(row["dataset"])
    images = known.startswith("ImageNet")
    if setting.workload in ("embedded", "embedded:v1", "moving_digits") or images == (setting.workload == "clips"):
        reasons.append(f"other data ({known})")
    elif not images:
        reasons.append(f"the validation clips of {known} (here {setting.images:,} clips)")
    elif setting.images < IMAGENET_VAL:
        reasons.append(f"all 50,000 images of ImageNet-1k val (here {setting.images:,} images)")
    words = str(row["setting"]).casefold()
    if row["table"] == "Table A.5" or "finetuned" in words or "trained" in words:
        reasons.append("trained with the reduction")
    return "; ".join(reasons) or "same model and data as printed"
