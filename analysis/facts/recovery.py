"""What training with the reduction in place gives back: a finetuned row and the same off the shelf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import stats
from analysis.facts.matching import paired
from analysis.frame import records_of

SUFFIX = " (finetuned)"


@dataclass(frozen=True)
class Pair:
    """A finetuned row and the same reduction off the shelf."""

    name: str
    gmacs: float
    paired: stats.Paired
    keys: tuple[str, ...]


def base(name: str) -> str:
    """A series' name without what says that it was finetuned."""
    text = name.removesuffix(SUFFIX)
    for words in (", finetuned", " finetuned", ", off the shelf", " off the shelf"):
        text = text.removesuffix(words)
    return text


def pairs(rows: pd.DataFrame) -> list[Pair]:
    """Finetuned rows that have a row off the shelf of the same name at the same target or setting."""
    records = records_of(rows)
    plain = {_setting(row): row for row in records if not row["finetuned"]}
    found = []
    for row in records:
        other = plain.get(_setting(row)) if row["finetuned"] else None
        test = paired(row, other) if other is not None else None
        if other is not None and test is not None:
            found.append(Pair(base(row["variant"]), row["gmacs_mean"], test, (*row["keys"], *other["keys"])))
    return found


def _setting(row: Mapping[str, Any]) -> tuple[object, ...]:
    """What a finetuned row shares with its counterpart off the shelf."""
    target, x = row["target_gmacs"], row["x"]
    aimed = None if pd.isna(target) else round(float(target), 6)
    free = None if pd.isna(x) else round(float(x), 6)
    return base(str(row["variant"])), row["placement"], aimed if aimed is not None else (free, row["budget"])
