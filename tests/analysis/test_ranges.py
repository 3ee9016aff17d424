"""What a figure draws lies in the range that its axis's label allows: no other quantity stands under a label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from ablations.cli.main import main as ablate
from analysis import page, plots, style, tables
from analysis.facts import tokens
from analysis.facts.outcomes import with_answers
from analysis.facts.overview import Overview
from analysis.facts.spec import Facts
from analysis.frame import read_results, tidy
from analysis.plots import Drawn, adaptivity, clutter, coverage, samples, single_multi
from analysis.plots.shared import shared_figures
from tests.analysis.asked import draw, figures
from tests.analysis.synthetic import DENSE_GMACS, DEPTH, PATCHES, Maker

HAIR = 1e-6
OVER = 1.15  # of the dense model's cost: a reducer's own work comes on top


def ranges(*, tokens: float, gmacs: float, images: int) -> dict[str, tuple[float, float]]:
    """What a label allows, by how it begins; of labels that begin alike the longer first."""
    return {
        style.GMACS: (HAIR, OVER * gmacs),
        "GMACs saved": (-100, 100),
        "GMACs": (HAIR, OVER * gmacs),
        "dense GMACs / GMACs": (1 / OVER, 1000),
        style.TOP1: (0, 100),
        "top-1 against": (-100, 100),
        "change in top-1": (-100, 100),
        "finetuned −": (-100, 100),
        "tokens": (0, tokens),
        "images (%)": (0, 100),
        "images": (0, images),
        "class token lost": (0, 100),
        "object's patches": (0, 100),
        "all tokens": (0, 100),
        "clutter": (0, 1000),
        "rank correlation": (-1, 1),
        "K (": (1, tokens),
        "cost (%": (0, 100 * OVER),
        "measured speed-up": (HAIR, 1000),
        "batch size": (1, 1e6),
        "entering block": (0, DEPTH),
        "reducing block": (-1, 1000),
        "Cohen's kappa": (-1, 1),
    }


def labels(axes: Axes, figure: Figure) -> tuple[str, str]:
    """Of a panel without a label of its own, that of the panels it shares the axis with, or of all."""
    x = [one.get_xlabel() for one in (axes, *axes.get_shared_x_axes().get_siblings(axes)) if one.get_xlabel()]
    y = [one.get_ylabel() for one in (axes, *axes.get_shared_y_axes().get_siblings(axes)) if one.get_ylabel()]
    return next(iter(x), figure.get_supxlabel()), next(iter(y), figure.get_supylabel())


def numbers(axes: Axes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """x and y of everything drawn from data; what is printed elsewhere, and rules over a whole axis, are not."""
    for line in axes.lines:
        in_x, in_y = line.get_transform().contains_branch_seperately(axes.transData)
        if not str(line.get_gid() or "").startswith(("published", "printed", "diagonal")):
            x, y = (np.asarray(v, dtype=float) for v in (line.get_xdata(), line.get_ydata()))
            yield (x if in_x else x[:0]), (y if in_y else y[:0])
    for collection in axes.collections:
        if isinstance(collection, LineCollection | PolyCollection):
            for path in collection.get_paths():
                yield path.vertices[:, 0], path.vertices[:, 1]
    for patch in axes.patches:  # bars: their bins reach half a token beyond the counts
        if hasattr(patch, "get_height"):
            yield np.array([]), np.array([patch.get_height()])


def astray(figure: Figure, allowed: dict[str, tuple[float, float]]) -> list[tuple[str, float, float]]:
    """Labels whose numbers leave their range, with the numbers' ends; and labels that no range is known for."""
    found = []
    for axes in figure.axes:
        if not axes.axison or axes.images:
            continue
        drawn = list(numbers(axes))
        for label, side in zip(labels(axes, figure), (0, 1), strict=True):
            values = np.concatenate([pair[side] for pair in drawn] or [np.array([])])
            values = values[np.isfinite(values)]
            if not label or not len(values):
                continue
            low, high = next((r for text, r in allowed.items() if label.startswith(text)), (np.inf, -np.inf))
            slack = 0.5 if label.startswith("tokens") and side == 0 else HAIR  # a histogram's outermost bin
            if values.min() < low - slack or values.max() > high + slack:
                found.append((label, float(values.min()), float(values.max())))
    return found


def test_every_number_of_every_figure_is_one_that_its_label_allows(drawn: list[Drawn]) -> None:
    allowed = ranges(tokens=PATCHES + 1, gmacs=DENSE_GMACS, images=400)
    assert [(one.name, wrong) for one in drawn for wrong in astray(one.figure, allowed)] == []


def test_no_figure_has_more_than_nine_panels_nor_a_name_without_a_curve(drawn: list[Drawn]) -> None:
    for one in drawn:
        shown = [axes for axes in one.figure.axes if axes.axison and not axes.images and (axes.lines or axes.patches)]
        assert len(shown) <= 9, one.name
        for axes in shown:
            low, high = axes.get_ylim()
            named = {" ".join(text.get_text().split()) for text in axes.texts if text.get_gid() == "name"}
            seen = {
                str(line.get_label()).replace("_", " ")
                for line in [*axes.lines, *(box.lines[0] for box in axes.containers if hasattr(box, "lines"))]
                if np.any((np.asarray(line.get_ydata()) >= low) & (np.asarray(line.get_ydata()) <= high))
            } | {str(box.get_label()).replace("_", " ") for box in axes.containers}
            assert named <= seen, one.name


def test_every_number_of_a_table_is_one_that_its_column_allows(answered: pd.DataFrame) -> None:
    for _, part in answered.groupby(["spec", "model"]):
        table = tables.measured(Facts(part))
        bounds = {"top1": (0, 1), "top1_low": (0, 1), "top1_high": (0, 1), "coverage": (0, 1), "class_kept": (0, 1),
                  "share_of_dense": (HAIR, OVER), "gmacs": (HAIR, OVER * DENSE_GMACS), "tokens_out": (1, PATCHES + 1),
                  "difference": (-1, 1), "seeds": (1, 100), "speedup": (HAIR, 1000)}  # fmt: skip
        for name, (low, high) in bounds.items():
            assert table[name].dropna().between(low - HAIR, high + HAIR).all(), name


SPEC = """\
name: adaptivity
title: Adaptivity
base: {stages: [{at: $at, stack: [{name: ats, budget: {count: $K}}]}]}
arms:
  - {variant: "ATS, each block", set: {at: 3-11, K: 3}}
  - {variant: "ATS, block 3", set: {at: 3, K: 24}}
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials of the narrow embedded model, its weights random, on ten images."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "adaptivity.yaml").write_text(SPEC)
    status = ablate(["run", "--serial", "--out", str(folder / "out"), "--model", "digits_vit_tiny", "--weights",
                     "random", "--limit", "10", "--batch", "5", "--specs",
                     str(folder / "adaptivity.yaml")])  # fmt: skip
    assert status == 0
    return folder / "out"


def test_a_real_run_is_drawn_within_its_labels(real: Path) -> None:
    results = read_results(real)
    trials = with_answers(results.finished, results.images)
    pictures = page.read_samples(real / "samples")
    scene = plots.Scene(style.assign_looks(trials), "subtitle", pictures, patches=64, count=10)
    drawn = shared_figures(Overview(trials, results.images), scene) + figures(
        trials, results.images, "Adaptivity", scene
    )
    allowed = ranges(tokens=65, gmacs=float(trials["dense_gmacs"].iloc[0]), images=10)
    assert len(drawn) >= 4 and [(one.name, wrong) for one in drawn for wrong in astray(one.figure, allowed)] == []


def late(maker: Maker, variant: str, *, same_at_the_end: bool) -> None:
    key = maker.add("adaptivity", variant, reducer=[{"name": "ats", "of": variant}], blocks=[3, 6], keep=0.5,
                    accuracy=0.8, adaptive=True)["key"]  # fmt: skip
    if same_at_the_end:
        counts = np.stack(maker.images[key]["tokens"].to_list())
        counts[:, -1] = counts[:, -2].min()
        maker.images[key]["tokens"] = list(counts)


@pytest.mark.parametrize("same", [False, True])
def test_tokens_are_counted_one_way_in_a_figure_that_says_which(same: bool) -> None:
    maker = Maker(images=80)
    late(maker, "ATS", same_at_the_end=False)
    late(maker, "ends alike", same_at_the_end=same)
    rows = tidy(maker.frame())
    assert len(tokens.adaptive(rows, maker.images)) == 2
    figure = adaptivity.adaptivity(rows, maker.images, looks={}, title="T", subtitle="")
    label = figure.axes[0].get_xlabel()
    assert label == ("tokens in a block, mean over all blocks" if same else "tokens leaving the last block")
    assert (
        " ".join(figure.axes[1].get_ylabel().split()) == label
        and astray(figure, ranges(tokens=PATCHES + 1, gmacs=DENSE_GMACS, images=80)) == []
    )
    found, what = tokens.correlations(rows, maker.images)
    assert label in clutter.clutter(found, what, looks={}, title="T", subtitle="").axes[0].get_xlabel()
    counts = np.stack(maker.images[rows["key"].iloc[0]]["tokens"].to_list())
    expected = counts[:, :-1].mean(axis=1) if same else counts[:, -1]
    rho = pd.Series(expected).corr(pd.Series(maker.clutter), method="spearman")
    assert found["rho"].iloc[0] == pytest.approx(rho) and found["counted"].iloc[0] in clutter.caption(found, what, "")


def test_a_rate_taken_apart_is_no_measured_speed_up(answered: pd.DataFrame) -> None:
    rows = answered[answered["spec"] == "runtime"]
    apart = rows.assign(speedup=np.where(rows["variant"] == "ToMe", np.nan, rows["speedup"]))
    assert set(Facts(apart).timed["variant"]) == {"ATS (blocks 3-11)"}


def test_a_share_is_no_k(answered: pd.DataFrame) -> None:
    rows = answered[answered["spec"] == "k_values"]
    scene = plots.Scene({}, "subtitle")
    names = [[one.name for one in figures(part, {}, "T", scene)]
             for part in (rows, rows.assign(x=rows["x"] / 100))]  # fmt: skip
    assert "k_values_effect" in names[0] and "k_values_effect" not in names[1]


def test_the_dearest_trial_does_not_pass_for_the_dense_model(answered: pd.DataFrame) -> None:
    rows = answered[answered["spec"] == "single_multi_stage"].assign(dense_gmacs=np.nan)
    table = tables.measured(Facts(rows))
    assert table["share_of_dense"].isna()[table["variant"] != "dense"].all()
    axes = draw(single_multi.single_multi, rows).axes[0]
    printed = next(line for line in axes.lines if line.get_gid() == "published")
    assert np.isnan(printed.get_xdata()[0])


def test_a_picture_that_a_table_lacks_is_not_shown_with_another_images_patches() -> None:
    table = pd.DataFrame({"image": ["a", "b", "b"]})
    here = [samples.find_row(table, plots.Sample(name, row, np.zeros((1, 1, 3)), (1, 1)))
            for name, row in (("a", 2), ("b", 2), ("c", 1))]  # fmt: skip
    assert here == [0, 2, None]


def test_what_is_left_where_stages_merge_patches_is_a_share_of_what_the_dense_model_has_left(
    answered: pd.DataFrame,
) -> None:
    """16 of 64 tokens behind stages of 1,024 and 256 are a quarter, and a blind choice lies on the diagonal."""
    rows = answered[answered["spec"] == "methods"]
    rows = rows.assign(coverage=np.where(rows["dense"], 1.0, 0.25))
    rows["tokens"] = [[1024, 256, 64 if dense else 16] for dense in rows["dense"]]
    assert rows["dense"].any()
    _, against_left = coverage.coverage(rows, {}, looks={}, title="T", subtitle="").axes
    drawn = [container.lines[0].get_xydata() for container in against_left.containers]
    assert drawn and all((points == 25.0).all() for points in drawn)


def test_what_is_left_is_counted_in_tokens_where_the_prefix_is_among_them(answered: pd.DataFrame) -> None:
    rows = answered[answered["spec"] == "methods"]
    figure = coverage.coverage(rows, {}, looks={}, title="T", subtitle="")
    assert figure.axes[1].get_xlabel() == "all tokens that are left (%)"
    assert "prefix included" in coverage.caption(rows)
