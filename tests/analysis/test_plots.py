"""The figures: what stands in their axes, titles and legends, not their pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis import style
from analysis.facts.matching import merge_seeds
from analysis.facts.outcomes import with_answers
from analysis.facts.overview import overview, pictured_methods
from analysis.facts.spec import PLACED, Facts
from analysis.frame import Results, tidy
from analysis.page import read_samples
from analysis.plots import Drawn, adaptivity, class_token, coverage, k_effect, placement, samples, stacking
from analysis.plots import tokens_per_block as tokens
from analysis.plots.panels import TOO_MANY
from analysis.plots.tradeoff import tradeoff
from tests.analysis.asked import WORDS, draw
from tests.analysis.synthetic import DENSE_GMACS, Maker
from tests.samples import shared_out

Looks = Mapping[str, style.Look]


def spec(results: Results, name: str) -> pd.DataFrame:
    rows = results.finished
    return with_answers(rows[rows["spec"] == name], results.images)


def curves(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Series drawn with error bars: label -> x, y."""
    found = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line = container.lines[0]
            found[str(container.get_label())] = (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
    return found


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def drawn_texts(figure: Figure) -> list[Text]:
    """Every text that is drawn: those of ticks beyond the end of an axis are not."""
    hidden: set[int] = set()
    for axes in [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]:
        for axis in (axes.xaxis, axes.yaxis):  # type: ignore[attr-defined]
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not axes.axison or not low - slack <= tick.get_loc() <= high + slack:
                    hidden |= {id(tick.label1), id(tick.label2)}
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and id(t) not in hidden]


def overlapping_texts(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes overlap once the figure is laid out, and texts that reach over its edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in drawn_texts(figure)]
    boxes = [(text, box) for text, box in boxes if not text.startswith("\n")]  # blank lines hold room for others
    edge = figure.bbox.padded(1)
    cut = [
        (text, "edge")
        for text, box in boxes
        if box.x0 < edge.x0 or box.x1 > edge.x1 or box.y0 < edge.y0 or box.y1 > edge.y1
    ]
    return cut + [
        (a, b)
        for i, (a, one) in enumerate(boxes)
        for b, two in boxes[i + 1 :]
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]


def test_accuracy_against_cost_shows_every_series_and_the_dense_model(results: Results, looks: Looks) -> None:
    rows = spec(results, "methods")
    figure = draw(tradeoff, rows, looks)
    axes = figure.axes[0]
    drawn = curves(axes)
    assert list(drawn) == ["ATS", "top-K", "EViT", "ToMe", "random"]
    expected = rows[rows["variant"] == "EViT"].sort_values("gmacs_mean")
    assert drawn["EViT"][0] == pytest.approx(expected["gmacs_mean"].to_numpy())
    assert drawn["EViT"][1] == pytest.approx(100 * expected["top1"].to_numpy())
    assert axes.get_xlabel() == "GMACs (the papers' GFLOPs)" and axes.get_ylabel() == "top-1 accuracy (%)"
    dense = 100 * rows["dense_top1"].iloc[0]
    line = next(line for line in axes.lines if line.get_gid() == "dense-line")
    assert list(line.get_ydata()) == [dense, dense]
    star = next(line for line in axes.lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((DENSE_GMACS, dense))
    assert legend(figure) == ["95 % interval over images", "dense model"]
    assert [text.get_text() for text in axes.texts if text.get_gid() == "name"] == list(drawn)
    assert figure.get_suptitle().startswith("A title\ncluttered digits")


def test_error_bars_are_the_intervals_of_the_results(results: Results, looks: Looks) -> None:
    rows = spec(results, "methods")
    axes = draw(tradeoff, rows, looks).axes[0]
    container = next(c for c in axes.containers if c.get_label() == "ATS")
    expected = rows[rows["variant"] == "ATS"].sort_values("gmacs_mean")
    segments = np.array(container.lines[2][0].get_segments())[:, :, 1]
    assert segments == pytest.approx(100 * expected[["top1_low", "top1_high"]].to_numpy())


def test_points_of_several_placements_are_not_joined(looks: Looks) -> None:
    maker = Maker(images=30)
    for block in (0, 3, 6):
        maker.add("s", "single block", reducer=[{"name": "ats"}], blocks=[block], keep=0.5, accuracy=0.8, x=block)
    axes = draw(tradeoff, tidy(maker.frame()), looks).axes[0]
    container = next(c for c in axes.containers if c.get_label() == "single block")
    assert container.lines[0].get_linestyle() == "None" and len(container.lines[0].get_xdata()) == 3


def test_k_has_a_panel_for_accuracy_and_one_for_cost(results: Results, looks: Looks) -> None:
    rows = spec(results, "k_values")
    figure = draw(k_effect.k_effect, rows, looks)
    accuracy, cost = figure.axes
    assert set(curves(accuracy)) == {"ATS", "top-K"}
    assert curves(accuracy)["ATS"][0].tolist() == [8, 16, 24, 32, 48, 64]
    line = next(line for line in cost.lines if line.get_label() == "top-K")
    expected = rows[rows["variant"] == "top-K"].sort_values("x")["gmacs_mean"].to_numpy()
    assert np.asarray(line.get_ydata()) == pytest.approx(expected)
    assert accuracy.get_xlabel().startswith("K ") and cost.get_ylabel() == style.GMACS


def test_placements_run_from_first_to_last_block_then_sets(results: Results) -> None:
    rows = spec(results, "stage_placement")
    figure = draw(placement.placement, rows)
    accuracy, cost = figure.axes
    ticks = [tick.get_text() for tick in cost.get_xticklabels()]
    assert ticks == ["0", "1", "3", "5", "6", "9", "3, 6, 9", "3-11"]
    assert 1 <= len(Facts(rows).placement_levels) <= PLACED
    assert all("GMACs" in name for name in curves(accuracy)) and cost.get_ylim()[0] == 0
    assert any("% of dense" in name for name in legend(figure))


def test_class_token_figure_shows_how_often_it_was_dropped(results: Results, looks: Looks) -> None:
    rows = spec(results, "class_token")
    accuracy, dropped = draw(class_token.class_token, rows, looks).axes
    assert list(curves(accuracy)) == ["class token kept", "class token sampled"]
    lines = {str(line.get_label()): line for line in dropped.lines}
    assert np.all(np.asarray(lines["class token kept"].get_ydata()) == 0)
    expected = rows[rows["variant"] == "class token sampled"].sort_values("gmacs_mean")
    shares = 100 * (1 - expected["class_kept"].to_numpy())
    assert np.asarray(lines["class token sampled"].get_ydata()) == pytest.approx(shares)


def test_stacks_are_set_against_their_base_with_the_same_budget(results: Results, looks: Looks) -> None:
    rows = spec(results, "evit_stacking")
    assert Facts(rows).base == "EViT"
    found = Facts(rows).gains
    assert len(found) == 10 and {gain.variant for gain in found} == {
        "ATS chooses, EViT fuses",
        "EViT then ATS",
    }
    gain = next(g for g in found if g.variant == "EViT then ATS" and g.x == 0.7)
    a = rows[(rows["variant"] == "EViT then ATS") & (rows["x"] == 0.7)].iloc[0]
    b = rows[(rows["variant"] == "EViT") & (rows["x"] == 0.7)].iloc[0]
    assert gain.saved == pytest.approx(1 - a["gmacs_mean"] / b["gmacs_mean"])
    assert gain.paired is not None and gain.paired.difference == pytest.approx(a["top1"] - b["top1"])
    change = draw(stacking.stacking, rows, looks).axes[1]
    assert len(curves(change)) == 2 and "points" in change.get_ylabel()


def test_tokens_per_block_has_a_line_a_method_and_bands_where_images_differ(results: Results, looks: Looks) -> None:
    rows = overview(results.finished)
    assert set(rows["spec"]) == {"methods"} and rows["variant"].is_unique and not rows["dense"].any()
    figure = tokens.tokens_per_block(rows, results.images, looks=looks, **WORDS)
    axes = figure.axes[0]
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.lines}
    assert lines["ATS"] == pytest.approx(rows.set_index("variant").loc["ATS", "tokens"])
    assert len(axes.collections) == 1  # of five methods only ATS adapts
    assert axes.get_xticklabels()[-1].get_text() == "out" and axes.get_ylim()[0] == 0


def test_where_a_table_is_missing_every_band_is_a_standard_deviation_and_says_so(
    results: Results, looks: Looks
) -> None:
    rows = overview(results.finished)
    figure = tokens.tokens_per_block(rows, {}, looks=looks, **WORDS)
    assert len(figure.axes[0].collections) == 1
    assert tokens.SPREAD in legend(figure) and tokens.SPREAD in tokens.caption(rows, {}, "x")
    ats = rows.set_index("variant").loc["ATS"]
    heights = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(np.min(np.subtract(ats["tokens"], ats["tokens_std"])))
    whole = tokens.tokens_per_block(rows, results.images, looks=looks, **WORDS)
    assert tokens.MIDDLE in legend(whole) and tokens.MIDDLE in tokens.caption(rows, results.images, "x")


def test_adaptivity_states_the_rank_correlation(results: Results, looks: Looks) -> None:
    rows = adaptivity.adaptive(overview(results.finished), results.images)
    assert rows["variant"].tolist() == ["ATS"]
    figure = adaptivity.adaptivity(rows, results.images, looks=looks, **WORDS)
    rho = adaptivity.correlation(results.images[rows["key"].iloc[0]], adaptivity.counted_in(rows, results.images))
    assert rho.low > 0.5  # the synthetic images were made so
    assert f"rho = {rho.value:.2f}" in legend(figure)[0]
    _, (_, y) = next(iter(curves(figure.axes[1]).items()))
    assert len(y) == 10 and y[-1] > y[0]


def test_bins_hold_equally_many_of_the_values_that_can_occur() -> None:
    """One stage at block 3 of 12: the mean over blocks goes in steps of 8/12, and every mean is as frequent."""
    one_stage = (4 * 65 + 8 * np.repeat(np.arange(17, 62), 20)) / 12
    bins = adaptivity.fair_bins([one_stage, np.arange(31, 63, 1 / 12)])
    inside = np.histogram(one_stage, bins)[0][1:-2]
    assert np.ptp(np.diff(bins[:-1])) < 1e-9 and set(inside) == {60}
    assert bins[-2] < 63 <= bins[-1] == np.arange(31, 63, 1 / 12).max() + 0.5
    assert np.diff(adaptivity.fair_bins([np.arange(20.0, 40.0)])).tolist() == [1.0] * 20


def test_adaptivity_without_clutter_is_one_panel(results: Results, looks: Looks) -> None:
    rows = adaptivity.adaptive(overview(results.finished), results.images)
    blind = {key: results.images[key].assign(clutter=None) for key in rows["key"]}
    assert len(adaptivity.adaptivity(rows, blind, looks=looks, **WORDS).axes) == 1


def test_coverage_is_in_percent_with_intervals(results: Results, looks: Looks) -> None:
    rows = spec(results, "methods")
    drawn = curves(coverage.coverage(rows, results.images, looks=looks, **WORDS).axes[0])
    expected = rows[rows["variant"] == "ToMe"].sort_values("gmacs_mean")["coverage"].to_numpy()
    assert drawn["ToMe"][1] == pytest.approx(100 * expected)


def test_samples_show_the_input_then_each_stage_of_each_method(results: Results) -> None:
    rows = pictured_methods(overview(results.finished), results.images)
    assert len(rows) == 3 and rows["variant"].iloc[0] == "ATS"
    pictures = read_samples(results.folder / "samples")
    figure = samples.samples(rows, results.images, pictures, **WORDS)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == len(pictures) * (1 + 3 * 3)
    titles = [axes.get_title().strip() for axes in figure.axes if axes.get_title()]
    assert titles[:4] == ["input", "block 3", "block 6", "block 9"]
    row = samples.find_row(results.images[rows["key"].iloc[0]], pictures[0])
    assert row is not None and results.images[rows["key"].iloc[0]]["image"].iloc[row] == pictures[0].image
    bits = results.images.kept(rows["key"].iloc[0])
    assert bits is not None
    kept = samples.kept_patches(bits[row, 9], pictures[0].grid)
    texts = [text.get_text() for axes in shown for text in axes.texts]
    assert any(text.startswith(f"{int(kept.sum())} ") and text[-1] in "\u2713\u2717" for text in texts)


def test_kept_bits_are_read_in_order_and_the_rest_is_greyed() -> None:
    mask = np.zeros((2, 3), dtype=bool)
    mask[0, 1] = mask[1, 2] = True
    assert np.array_equal(samples.kept_patches(np.packbits(mask.ravel()), (2, 3)), mask)
    pixels = np.full((4, 6, 3), 255, dtype=np.uint8)
    shown = samples.darken(pixels, mask)
    assert (shown[:2, 2:4] == 255).all() and (shown[:2, :2] < 200).all() and shown.dtype == np.uint8
    assert samples.stages(range(3, 12)) == [3, 7, 11] and samples.stages([3]) == [3]


def test_same_series_same_look_everywhere_and_no_two_alike_in_a_figure(results: Results, looks: Looks) -> None:
    for _, rows in results.finished.groupby("spec"):
        seen = [looks[name] for name in rows.loc[~rows["dense"], "variant"].unique()]
        assert len(set(seen)) == len(seen)
        assert len({(look.marker, look.colour) for look in seen}) == len(seen)
    many = pd.DataFrame({"spec": "s", "variant": [f"v{i}" for i in range(25)]})
    assert len(set(style.assign_looks(many).values())) == 25


def test_the_same_reducers_look_the_same_under_another_name() -> None:
    maker = Maker(images=20)
    for spec_name, name in (("methods", "top-K"), ("methods", "ATS (block 3)"), ("k_values", "ATS")):
        reducer = [{"name": "topk" if name == "top-K" else "ats"}]
        maker.add(spec_name, name, reducer=reducer, blocks=[3], keep=0.5, accuracy=0.8)
    found = style.assign_looks(tidy(maker.frame()), order=["methods"])
    assert found["ATS"] == found["ATS (block 3)"] != found["top-K"]


@pytest.mark.parametrize(
    ("images", "weights", "words"), [(150, "hub", "ONLY 150 IMAGES"), (5000, "random", "RANDOM WEIGHTS")]
)
def test_a_title_says_when_not_to_believe_it(images: int, weights: str, words: str, looks: Looks) -> None:
    maker = Maker(images=images, weights=weights)
    maker.add("s", "ATS", reducer=[{"name": "ats"}], blocks=[3], keep=0.5, accuracy=0.8)
    rows = tidy(maker.frame())
    setting = Results(Path("nowhere"), rows).settings()[0]
    figure = draw(tradeoff, rows, looks, subtitle=style.describe(setting, rows))
    assert words in figure.get_suptitle().replace("\n", " ")
    assert f"{images:,} images, off the shelf" in figure.get_suptitle().replace("\n", " ")


def test_what_was_trained_from_random_weights_is_no_mere_trial_run() -> None:
    maker = Maker(images=5000, weights="random")
    maker.add("s", "HVT", reducer=[{"name": "hvt_pool"}], blocks=[3], keep=0.5, accuracy=0.8, finetuned=True)
    maker.add("s", "HVT-0", reducer=[{"name": "identity"}], blocks=[0], keep=1.0, accuracy=0.9, finetuned=True)
    rows = tidy(maker.frame())
    assert not rows["dense"].any(), "what was trained without reduction is compared like the others"
    said = style.describe(Results(Path("nowhere"), rows).settings()[0], rows)
    assert said.endswith("5,000 images, trained from random weights")


def test_one_series_without_a_dense_row_is_still_a_figure(looks: Looks) -> None:
    maker = Maker(images=30)
    row = {"dense_top1": None, "dense_gmacs": None, "top1_low": None, "top1_high": None}
    maker.add("odd spec", "only", reducer=[{"name": "new"}], blocks=[2], keep=0.5, accuracy=0.8, **row)
    figure = draw(tradeoff, tidy(maker.frame()), {})
    assert list(curves(figure.axes[0])) == ["only"] and "dense model" not in legend(figure)


@pytest.mark.parametrize("third", shared_out(range(3), of=3))
def test_no_text_of_any_figure_overlaps_another(drawn: list[Drawn], third: int) -> None:
    assert len(drawn) == len({one.name for one in drawn}) >= 30
    assert [(one.name, pair) for one in drawn[third::3] for pair in overlapping_texts(one.figure)] == []


@pytest.mark.parametrize("left", [1, 2, 3, 4])
def test_no_text_overlaps_where_few_panels_are_left_for_the_last_figure(left: int) -> None:
    maker, count = Maker(images=40), TOO_MANY + left
    for number in range(count):
        maker.add("methods", f"method {number}", reducer=[{"name": "topk"}], blocks=[3], keep=0.4, accuracy=0.7)
    rows = tidy(maker.frame())
    words = {"title": "Coverage: do the surviving patches lie on the object? (2 of 2)", "subtitle": "digit pairs"}
    figure = coverage.coverage(rows, maker.images, looks=style.assign_looks(rows), page=1, **words)
    assert len(figure.axes) == left and overlapping_texts(figure) == []


def test_figures_do_not_change_the_frames_they_draw(results: Results, looks: Looks) -> None:
    rows = spec(results, "score_functions")
    before = rows.copy(deep=True)
    draw(tradeoff, rows, looks)
    merge_seeds(rows)
    pd.testing.assert_frame_equal(rows, before)
