"""Which images each trial answers rightly, in one order of the images for all trials: what every test rests on."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis import stats

log = logging.getLogger(__name__)

BOOTSTRAP, RECORDED = "bootstrap", "as recorded"


def with_answers(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The trials of one setting with ``answers`` and ``dense_answers`` ((images,) bool in the order of the image
    names, or None), ``top1_low`` and ``top1_high`` from a bootstrap over images, and ``interval``, which says where
    these come from: a trial without a per-image table keeps the interval its run recorded.
    """
    rows = trials.copy()
    names: np.ndarray | None = None
    answers: list[np.ndarray | None] = []
    dense: list[np.ndarray | None] = []
    for key in rows["key"]:
        table = images.get(key)
        if table is None or table.empty:
            answers.append(None)
            dense.append(None)
            continue
        order = np.argsort(table["image"].to_numpy(dtype=str), kind="stable")
        seen = table["image"].to_numpy(dtype=str)[order]
        if names is None:
            names = seen
        if len(seen) != len(names) or not np.array_equal(seen, names):
            log.warning("trial %s saw other images than the rest: it takes part in no paired test", key)
            answers.append(None)
            dense.append(None)
            continue
        answers.append(table["correct"].to_numpy(dtype=bool)[order])
        dense.append(table["dense_correct"].to_numpy(dtype=bool)[order] if "dense_correct" in table else None)
    rows["answers"] = pd.Series(answers, index=rows.index, dtype=object)
    rows["dense_answers"] = pd.Series(dense, index=rows.index, dtype=object)
    found = [stats.accuracy(one) if one is not None else None for one in answers]
    bounds = zip(found, rows["top1_low"], rows["top1_high"], strict=True)
    pairs = [(f.low, f.high) if f else (low, high) for f, low, high in bounds]
    rows["top1_low"], rows["top1_high"] = [low for low, _ in pairs], [high for _, high in pairs]
    rows["interval"] = [BOOTSTRAP if f else RECORDED for f in found]
    return rows
