"""What the report says of clips: tokens of frames against motion, steadiness, strips, what is in print."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from analysis import stats
from analysis.facts.clips import ClipGrid, frames_kept, motion, of_motion, steadiness
from analysis.facts.overview import pictured_methods
from analysis.plots import clip_motion, clip_steadiness, clip_strip
from analysis.plots.base import Sample
from analysis.published import printed_rows
from analysis.questions.clips import NOTE, printed_share

GRID = ClipGrid(4, 3, 5)  # 15 patches a frame: 60 bits, four of padding
CLIPS = 30


def table(kept: np.ndarray, moves: np.ndarray, **columns: Any) -> pd.DataFrame:
    """Per-image rows of a trial of two blocks: all is kept after the first, ``kept`` (clips, views, steps, N) after
    the last.
    """
    flat = kept.reshape(len(kept), -1)
    whole = np.packbits(np.ones_like(flat), axis=1)
    last = np.packbits(flat, axis=1)
    bits = [[one.tobytes(), other.tobytes()] for one, other in zip(whole, last, strict=True)]
    names = [f"clip/{i}" for i in range(len(kept))]
    return pd.DataFrame({"image": names, "kept": bits, "motion": list(moves), "correct": True, **columns})


@pytest.fixture
def images() -> dict[str, pd.DataFrame]:
    """Under "follows" frames keep more where more moves; under "blind" any patches; under "same" the same five."""
    random = np.random.default_rng(0)
    moves = random.random((CLIPS, 4))
    counts = np.round(3 + 9 * moves).astype(int)
    places = random.random((CLIPS, 1, 4, 15)).argsort(axis=3)
    follows = places < counts[:, None, :, None]
    blind = random.random((CLIPS, 1, 4, 15)).argsort(axis=3) < 5
    same = np.broadcast_to(np.arange(15) < 5, (CLIPS, 1, 4, 15))
    return {name: table(kept, moves) for name, kept in (("follows", follows), ("blind", blind), ("same", same))}


def rows(*names: str, reducer: str = "topk") -> pd.DataFrame:
    stages = f'[{{"at": [3], "stack": [{{"name": "{reducer}"}}]}}]'
    return pd.DataFrame({"key": list(names), "variant": list(names), "gmacs_mean": 1.0, "reducer": stages})


def test_bits_are_read_frame_by_frame(images: dict[str, pd.DataFrame]) -> None:
    kept = frames_kept(images, "follows", GRID)
    assert kept is not None and kept.shape == (CLIPS, 1, 4, 15)
    moves = motion(images["follows"], kept.shape)
    assert moves is not None and moves.shape == (CLIPS, 1, 4)
    assert (kept.sum(axis=3) == np.round(3 + 9 * moves)).all()


def test_views_are_told_apart_and_a_step_of_several_frames_has_their_mean() -> None:
    kept = np.zeros((CLIPS, 3, 4, 15), dtype=bool)
    kept[:, 1, 2, :7] = True
    moves = np.arange(CLIPS * 24.0).reshape(CLIPS, 24)  # two frames a step
    found = frames_kept({"a": table(kept, moves)}, "a", GRID)
    assert found is not None and (found == kept).all()
    told = motion(table(kept, moves), kept.shape)
    assert told is not None and told.shape == (CLIPS, 3, 4) and told[0, 0, 0] == 0.5
    assert frames_kept({"a": table(kept, moves)}, "a", ClipGrid(7, 3, 5)) is None  # 105 bits are no part of 180


def test_a_rank_correlation_of_groups_is_spearmans(images: dict[str, pd.DataFrame]) -> None:
    random = np.random.default_rng(1)
    a = random.integers(0, 5, (50, 6)).astype(float)  # with ties
    b = a + random.normal(0, 2, a.shape).round()
    found = stats.clustered_spearman(a, b)
    assert found.value == pytest.approx(scipy_stats.spearmanr(a.ravel(), b.ravel()).statistic)
    assert found.low < found.value < found.high
    assert np.isnan(stats.clustered_spearman(a, np.ones_like(a)).value)
    with pytest.raises(ValueError, match="groups"):
        stats.clustered_spearman(a, b[:10])


def test_the_interval_is_that_of_resampled_groups() -> None:
    """Against ranks that are made anew, group by group; and wider where a group's pairs are copies of one."""
    random = np.random.default_rng(2)
    a, b = random.normal(size=(40, 5)), random.normal(size=(40, 5))
    b += a
    draws = []
    for _ in range(1000):
        chosen = random.integers(0, 40, 40)
        draws.append(scipy_stats.spearmanr(a[chosen].ravel(), b[chosen].ravel()).statistic)
    found = stats.clustered_spearman(a, b)
    assert np.allclose([found.low, found.high], np.quantile(draws, [0.025, 0.975]), atol=0.02)
    copied = stats.clustered_spearman(np.repeat(a[:, :1], 5, axis=1), np.repeat(b[:, :1], 5, axis=1))
    assert copied.high - copied.low > 1.5 * (found.high - found.low)


def test_frames_that_follow_motion_are_told_from_those_that_do_not(images: dict[str, pd.DataFrame]) -> None:
    found = of_motion(rows("follows", "blind", "same"), images, GRID).set_index("variant")
    assert found.loc["follows", "rho"] > 0.95 and found.loc["follows", "low"] > 0.9
    assert found.loc["follows", "within"] > 0.9
    assert np.isnan(found.loc["blind", "rho"]) and np.isnan(found.loc["same", "rho"])  # five in every frame


def test_steadiness_is_one_where_places_stay_and_chance_where_they_are_blind(images: dict[str, pd.DataFrame]) -> None:
    found = steadiness(rows("blind", "same"), images, GRID).set_index("variant")
    assert found.loc["same", "jaccard"] == 1
    blind = found.loc["blind"]
    assert blind["chance"] == pytest.approx((25 / 15) / (10 - 25 / 15))
    assert blind["low"] < blind["chance"] + 0.05 and abs(blind["jaccard"] - blind["chance"]) < 0.06
    kept = frames_kept(images, "blind", GRID)
    assert kept is not None
    slow = [np.mean([(one & other).sum() / (one | other).sum() for one, other in pairwise(clip[0])]) for clip in kept]
    assert blind["jaccard"] == pytest.approx(np.mean(slow))


def test_smaller_and_fewer_frames_choose_no_patches(images: dict[str, pd.DataFrame]) -> None:
    """A grid of larger patches is the same in every frame, and frames that are left out hold none."""
    controls = pd.concat([rows("blind", reducer="small_input"), rows("same", reducer="fewer_frames")])
    assert len(steadiness(controls, images, GRID)) == 0
    every = pd.concat([controls, rows("follows")]).assign(top1=0.5, blocks=[(3,)] * 3)
    assert list(pictured_methods(every, images)["key"]) == ["follows"]


def test_frames_that_keep_nothing_do_not_count() -> None:
    kept = np.zeros((CLIPS, 1, 4, 15), dtype=bool)
    kept[:10, :, :2, :3] = True
    found = steadiness(rows("a"), {"a": table(kept, np.zeros((CLIPS, 4)))}, GRID).iloc[0]
    assert found["clips"] == 10 and found["jaccard"] == pytest.approx(0.5)  # two alike, then one against nothing


def test_figures_of_clips_show_a_line_for_each_method(images: dict[str, pd.DataFrame]) -> None:
    moved = of_motion(rows("follows", "same"), images, GRID)
    figure = clip_motion.clip_motion(moved, looks={}, title="t", subtitle="s")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["follows"]
    assert "same" in clip_motion.caption(moved, "level")
    steady = steadiness(rows("blind", "same"), images, GRID)
    axes = clip_steadiness.clip_steadiness(steady, looks={}, title="t", subtitle="s").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["blind", "same"]
    assert sum(line.get_gid() == "chance" for line in axes.lines) == 2


def test_a_strip_shows_the_patches_of_each_frame(images: dict[str, pd.DataFrame]) -> None:
    pictures = [Sample(f"clip/{i}", i, np.full((4 * 6, 10, 3), 200, dtype=np.uint8), (12, 5)) for i in (0, 1, 2)]
    figure = clip_strip.clip_strip(rows("follows", "same"), images, pictures, GRID, title="t", subtitle="s")
    grid = np.array(figure.axes).reshape(6, 5)  # of the first and the last clip: frames, and a line for each method
    kept = frames_kept(images, "follows", GRID)
    assert kept is not None
    for line, clip in ((1, 0), (4, 2)):
        for step in range(4):
            axes = grid[line, 1 + step]
            shown = (axes.images[0].get_array() == 200).all(axis=2)[::2, ::2]
            assert (shown == kept[clip, 0, step].reshape(3, 5)).all()
            assert str(kept[clip, 0, step].sum()) in [text.get_text() for text in axes.texts]


def test_what_is_in_print_is_read_from_the_table() -> None:
    dense, ats = printed_rows("Table 2", model="TimeSformer-L")
    assert (dense.gflops, ats.gflops, dense.top1, ats.top1) == (7140, 3510, 80.7, 80.5)
    assert printed_share("Table 2", "X-ViT (16x)") == pytest.approx(259 / 425)
    assert printed_share("Table 3", "TimeSformer-HR") == pytest.approx(3103 / 5110)
    assert all(number in NOTE for number in ("7140", "5110", "425", "850")) and "8 frames" in NOTE
