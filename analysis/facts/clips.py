"""What survives in each frame of a clip: how many patches, against how much moves there, and how steadily."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import stats
from analysis.facts.kept import Bits, packed
from analysis.frame import choosing, records_of


@dataclass(frozen=True)
class ClipGrid:
    """How the patches of one view of a clip lie: ``steps`` grids of ``rows`` x ``columns``, one after the other. A step
    is a frame, or a tubelet several frames deep.
    """

    steps: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """Of a step."""
        return self.rows * self.columns


def frames_kept(images: Mapping[str, pd.DataFrame], key: str, grid: ClipGrid) -> Bits | None:
    """(clips, views, steps, patches of a step) bool, rows as in the table: patches with a token of their own after the
    last block. None where the trial left no bits of such a grid.
    """
    bits = packed(images, key)
    if bits is None:
        return None
    last = np.unpackbits(bits[:, -1], axis=1).astype(bool)
    view = grid.steps * grid.patches
    views = last.shape[1] // view
    if views == 0 or last.shape[1] - views * view >= 8:
        return None
    return last[:, : views * view].reshape(len(last), views, grid.steps, grid.patches)


def motion(table: pd.DataFrame, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """(clips, views, steps): how much moves in a frame, or on average in the frames of a step; None where unknown."""
    if "motion" not in table or table["motion"].isna().any():
        return None
    found = np.stack(table["motion"].to_list()).astype(np.float64)
    clips, views, steps = shape[:3]
    if found.shape[1] % (views * steps):
        return None
    return found.reshape(clips, views, steps, -1).mean(axis=3)


def of_motion(rows: pd.DataFrame, images: Mapping[str, pd.DataFrame], grid: ClipGrid) -> pd.DataFrame:
    """One line a method: variant, rho of the patches that a frame keeps with its motion over all frames of all clips,
    low and high (clips resampled), within (the same of what is left after each clip's means are taken off), kept (mean
    patches of a frame), gmacs, key. rho is nan where every frame keeps as many.
    """
    found = []
    for row in records_of(rows):
        kept = frames_kept(images, row["key"], grid)
        moves = None if kept is None else motion(images[row["key"]], kept.shape)
        if kept is None or moves is None or len(kept) < 4:
            continue
        counts = kept.sum(axis=3).reshape(len(kept), -1).astype(np.float64)
        flat = moves.reshape(len(kept), -1)
        rho = stats.clustered_spearman(counts, flat)
        inside = stats.clustered_spearman(_centred(counts), _centred(flat))
        found.append(
            {"variant": row["variant"], "rho": rho.value, "low": rho.low, "high": rho.high, "within": inside.value,
             "within_low": inside.low, "within_high": inside.high, "kept": float(counts.mean()),
             "gmacs": row["gmacs_mean"], "clips": len(kept), "key": row["key"]}
        )  # fmt: skip
    return pd.DataFrame(found)


def steadiness(rows: pd.DataFrame, images: Mapping[str, pd.DataFrame], grid: ClipGrid) -> pd.DataFrame:
    """One line a method: variant, jaccard (places kept in two neighbouring frames over places kept in either, mean over
    pairs and clips), low and high (clips resampled), chance (what blind choices of as many would have), gmacs, key.
    Controls that show the model other frames have no line.
    """
    found = []
    for row in records_of(choosing(rows)):
        kept = frames_kept(images, row["key"], grid)
        if kept is None or kept.shape[2] < 2:
            continue
        one, other = kept[:, :, :-1], kept[:, :, 1:]
        a, b = one.sum(axis=3).astype(float), other.sum(axis=3).astype(float)
        both = (one & other).sum(axis=3).astype(float)
        blind = a * b / grid.patches
        with np.errstate(invalid="ignore", divide="ignore"):
            jaccard, chance = both / (a + b - both), blind / (a + b - blind)
        told = (a + b > 0).reshape(len(kept), -1)
        some = told.any(axis=1)
        if not some.any():
            continue
        of_clips = [
            np.where(told, values.reshape(len(kept), -1), 0.0).sum(axis=1)[some] / told.sum(axis=1)[some]
            for values in (jaccard, chance)
        ]
        interval = stats.bootstrap(of_clips[0], draws=1000)
        found.append(
            {"variant": row["variant"], "jaccard": interval.value, "low": interval.low, "high": interval.high,
             "chance": float(of_clips[1].mean()), "gmacs": row["gmacs_mean"], "clips": int(some.sum()),
             "key": row["key"]}
        )  # fmt: skip
    return pd.DataFrame(found)


def _centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values - values.mean(axis=1, keepdims=True)
