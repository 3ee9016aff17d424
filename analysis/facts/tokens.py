"""How many tokens images keep: of the methods that adapt to the image, against what is to be seen in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import stats
from analysis.frame import records_of

CLUTTER = "the known amount of clutter in it"
HARDNESS = "the plain model's loss on it (how hard it is)"


@dataclass(frozen=True)
class Counted:
    """How an image's tokens are counted: one way for all the methods of a figure, and what the figure calls it."""

    label: str  # of an axis
    words: str  # in a sentence
    of: Callable[[np.ndarray], np.ndarray]  # (images, blocks + 1) -> (images,)


LAST = Counted("tokens leaving the last block", "the tokens that leave the last block", lambda counts: counts[:, -1])
MEAN = Counted(
    "tokens in a block, mean over all blocks",
    "the tokens an image has in a block, mean over all blocks",
    lambda counts: counts[:, :-1].mean(axis=1),
)


def tokens_kept(table: pd.DataFrame, counted: Counted) -> np.ndarray:
    """One number of tokens an image, prefix included."""
    return counted.of(np.stack(table["tokens"].to_list()).astype(float))


def adapts(table: pd.DataFrame) -> bool:
    """Whether images differ in their tokens, in any block."""
    return len(table) > 1 and bool(np.ptp(np.stack(table["tokens"].to_list()), axis=0).any())


def counting(tables: Iterable[pd.DataFrame]) -> Counted:
    """What to count so that every method that adapts is seen to: the last block's tokens, or the mean over all blocks
    where one of them ends with as many tokens in every image.
    """
    adaptive = [table for table in tables if adapts(table)]
    return LAST if all(np.ptp(tokens_kept(table, LAST)) > 0 for table in adaptive) else MEAN


def known(tables: list[pd.DataFrame], column: str) -> bool:
    return bool(tables) and all(
        column in table and table[column].notna().all() and table[column].nunique() > 1 for table in tables
    )


def hardness(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> pd.Series | None:
    """The plain model's loss by image name, from its own trial or from one that removed no token of any image; None
    where there is none.
    """
    whole = [len(row) > 1 and np.ptp(np.asarray(row, dtype=float)) == 0 for row in trials["tokens"]]
    candidates = [*trials.loc[trials["dense"], "key"], *trials.loc[np.array(whole, dtype=bool), "key"]]
    for key in candidates:
        if key in images and known([images[key]], "loss") and _like_dense(images[key]):
            return images[key].set_index("image")["loss"]
    return None


def _like_dense(table: pd.DataFrame) -> bool:
    """Whether a trial answered every image as the plain model did, as far as that is known."""
    return "dense_correct" not in table or bool((table["correct"] == table["dense_correct"]).all())


def correlations(
    rows: pd.DataFrame, images: Mapping[str, pd.DataFrame], hard: pd.Series | None = None
) -> tuple[pd.DataFrame, str]:
    """One line a method: variant, rho, low, high, clear (Bonferroni over the methods), gmacs, key; rho is nan for a
    method that keeps as many tokens in every image. And with what tokens were correlated; "" where nothing is known.
    """
    have = [(row, images[row["key"]]) for row in records_of(rows) if row["key"] in images]
    have = [(row, table) for row, table in have if "tokens" in table and len(table) > 3]
    tables = [table for _, table in have]
    if not tables:
        return pd.DataFrame(), ""
    if known(tables, "clutter"):
        what = CLUTTER
    elif hard is not None:
        what = HARDNESS
    else:
        return pd.DataFrame(), ""
    counted = counting(tables)
    differ = [bool(np.ptp(tokens_kept(table, counted)) > 0) for table in tables]
    strict = 1 - (1 - stats.LEVEL) / max(1, sum(differ))
    found = []
    for (row, table), varies in zip(have, differ, strict=True):
        other = table["clutter"] if what == CLUTTER else table["image"].map(hard if hard is not None else {})
        use = other.notna().to_numpy()
        a, b = tokens_kept(table, counted)[use], other.to_numpy(dtype=float)[use]
        rho = stats.spearman(a, b) if varies else stats.Interval(np.nan, np.nan, np.nan)
        wide = stats.spearman(a, b, level=strict) if varies else rho
        clear = bool(wide.low > 0 or wide.high < 0)
        found.append({"variant": row["variant"], "rho": rho.value, "low": rho.low, "high": rho.high, "clear": clear,
                      "gmacs": row["gmacs_mean"], "images": int(use.sum()), "counted": counted.words,
                      "key": row["key"]})  # fmt: skip
    return pd.DataFrame(found), what


def adaptive(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The trials whose number of tokens differs between images, by their per-image tables."""
    keep = [key in images and "tokens" in images[key] and adapts(images[key]) for key in trials["key"]]
    return trials[np.array(keep, dtype=bool)]


def clutter_known(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> bool:
    return known([images[key] for key in trials["key"] if key in images], "clutter")


def counted_in(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame]) -> Counted:
    """What the figure of these trials counts."""
    return counting(images[key] for key in trials["key"] if key in images and "tokens" in images[key])


def correlation(table: pd.DataFrame, counted: Counted) -> stats.Interval:
    """Spearman's rank correlation of an image's tokens with clutter, over images."""
    return stats.spearman(tokens_kept(table, counted), table["clutter"].to_numpy(dtype=float))
