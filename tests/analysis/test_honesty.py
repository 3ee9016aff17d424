"""The report claims no more than the tests behind it, names every mark, and says what it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis import page, plots, published, style, tables
from analysis.facts import tokens
from analysis.facts.comparison import Comparison, comparisons, versus
from analysis.facts.matching import merge_seeds
from analysis.facts.outcomes import with_answers
from analysis.facts.spec import Facts
from analysis.frame import Results, read_results, tidy
from analysis.plots import Scene, clutter, coverage, difference, labels, pareto, placement
from analysis.questions import beside, front, stacking, stages
from analysis.report import write_analysis
from analysis.words import natural, tally
from tests.analysis.asked import answers, beside_print, draw, figures
from tests.analysis.synthetic import DENSE_GMACS, Maker
from tests.analysis.test_plots import legend, overlapping_texts


def rows_of(maker: Maker) -> pd.DataFrame:
    return with_answers(tidy(maker.frame()), maker.images)


def test_a_dearer_trial_does_not_stand_in_at_a_target_it_was_not_set_to() -> None:
    maker = Maker(images=500)
    for name, shares in (("A", (0.33, 0.5)), ("B", (0.33, 0.5)), ("late", (0.355, 0.5))):
        for share in shares:
            target = share if share != 0.355 else 0.36
            maker.add("s", name, reducer=[{"name": name}], blocks=[3], keep=share, accuracy=0.5 + share, target=target)
    rows = merge_seeds(rows_of(maker))
    cheap = 0.33 * DENSE_GMACS
    assert "late" not in {one.name for one in versus(rows, "A", by="variant") if one.level == pytest.approx(cheap)}
    first = comparisons(rows, by="variant")[0]
    assert first.level == pytest.approx(cheap) and "late" in [name for name, _ in first.left_out]


def test_being_clear_is_said_of_the_leader_that_is() -> None:
    def one(first: str, second: str, standing: str) -> Comparison:
        rows = pd.DataFrame({"variant": [first, second], "keys": [["a"], ["b"]], "top1": [0.8, 0.7]})
        return Comparison(1.0, rows, "variant", (standing,))

    head = tally([one("ATS", "top-K", "worse"), one("ATS", "top-K", "same"), one("top-K", "ATS", "same")], "series")
    assert head is not None and head.keys == ("a", "b")
    assert "ATS has the highest top-1 at 2 of 3 costs (clear of every other at 1); top-K" in head.text
    assert "top-K has the highest top-1 at 1 of 3 costs. " in head.text
    none = tally([one("ATS", "top-K", "same")], "series")
    assert none is not None and "; at none clear of every other" in none.text


@pytest.mark.parametrize(
    ("better", "worse", "words"),
    [
        (5, 0, "pays"),
        (1, 0, "helps in 1 of 8 cases and is not distinguishable in the others"),
        (0, 1, "harms in 1 of 8 cases and is not distinguishable in the others"),
        (0, 6, "does not pay"),
        (2, 2, "pays at some costs and not at others"),
        (0, 0, "is not distinguishable from a smaller budget"),
    ],
)
def test_one_clear_difference_of_many_is_not_a_verdict(better: int, worse: int, words: str) -> None:
    assert stacking._pays(better, worse, 8) == words


def test_a_claim_about_ats_in_print_is_not_laid_on_others(results: Results, answered: pd.DataFrame) -> None:
    rows = answered[answered["spec"] == "single_multi_stage"]
    assert all("ATS" in what for what in beside_print(rows)["what"])
    for said in stages.found(Facts(rows)):
        assert ("in print" in said.text) == said.text.startswith("ATS")


def test_trials_at_settings_of_their_own_are_named_once(answered: pd.DataFrame) -> None:
    rows = answered[answered["spec"] == "sampling_method"]
    said = answers(rows)
    name = "inverse transform (official), as many points as patches"
    assert sum(name in one.detail for one in said) == 0
    assert sum(one.text.startswith("Run at settings of their own") and name in one.text for one in said) == 1
    assert natural([]) is None


def test_printed_values_stand_beside_ours_as_the_papers_print_them() -> None:
    """Typed from the papers, DeiT-S; the code reads them from the reference table."""
    methods = {
        "IA-RED2": (78.6, 2.9), "DynamicViT": (79.3, 2.9), "EViT": (79.5, 3.0), "ATS": (79.7, 2.9),
        "ToMe": (79.36, 2.7),
    }  # fmt: skip
    assert {name: values(*where) for name, (_, where, _) in front.KNOWN.items()} == methods
    assert {name: values("Table A.3", method) for name, (_, method) in beside.SAMPLERS.items()} == {
        "top-K": (78.9, 2.9), "inverse transform": (79.7, 2.9),
    }  # fmt: skip
    stacked = [values("Table A.5", f"EViT (30 epochs){more}") for more in ("", " + ATS")]
    assert stacked == [(79.5, 3.0), (79.5, 2.5)] and values("Table 1", "") == (79.8, 4.6)
    placed = [row.top1 for row in published.printed_rows("Table A.4")]
    assert placed == [73.1, 78.5, 77.4, 79.2], "at block 0, 3, 6 and 3-11"


def values(table: str, method: str) -> tuple[float, float]:
    row = published.printed(table, method)
    return row.top1, row.gflops


def test_an_order_of_numbers_says_which_are_told_apart(answered: pd.DataFrame) -> None:
    found = beside_print(answered[answered["spec"] == "class_token"])
    assert len(found) == 1 and "told apart from the first (Holm): " in found["measured here"].iloc[0]


def test_trained_methods_are_held_against_random_drop_trained_as_long() -> None:
    """At each one's own cost; what is cheaper than any random drop is named with the nearest, and not tested."""
    maker = Maker(images=400)

    def add(variant: str, share: float, accuracy: float, *, trained: bool = True) -> None:
        about = {"epochs": 3, "train_images": 5000, "train_seconds": 61.0, "finetuned": True} if trained else {}
        maker.add("trained_methods", variant, reducer=[{"name": variant.split(",")[0]}], blocks=[3, 6, 9], keep=share,
                  target=share, x=share, accuracy=accuracy, **about)  # fmt: skip

    for share, accuracy in ((0.4, 0.6), (0.5, 0.7), (0.6, 0.75)):
        add("random, trained as long", share, accuracy)
        add("random, off the shelf", share, accuracy - 0.2, trained=False)
    for variant, share, accuracy in (("A", 0.5, 0.85), ("B", 0.5, 0.5), ("C", 0.5, 0.7), ("D", 0.2, 0.65)):
        add(variant, share, accuracy)
    rows = with_answers(tidy(maker.frame()), maker.images)
    head, alone, *_ = answers(rows)
    assert head.headline and head.text.startswith("Against random drop trained as long, in points")
    _, better, worse, same = head.text.split(". ")
    assert "Clearly better: A +1" in better and "Clearly worse: B −1" in worse and ": C " in same
    assert "off the shelf" not in head.text and "D" not in head.text
    assert alone.text.startswith("D came to") and "no random drop to compare with: the nearest has" in alone.text
    shown = tables.display(tables.measured(Facts(rows)))
    assert set(shown["trained"]) == {"", "5,000 images in 3 epochs, 61 s"}


@pytest.mark.usefixtures("plain_figures")
def test_why_a_target_was_missed_stands_beside_its_row(tmp_path: Path) -> None:
    maker = Maker(images=60)
    why = "out of reach: this method costs 0.77 to 1 of the dense model here"
    maker.add("s", "ATS", reducer=[{"name": "ats"}], blocks=[3], keep=0.5, accuracy=0.8, target=0.5)
    late = maker.add("s", "late", reducer=[{"name": "ats"}], blocks=[9], keep=0.5, accuracy=0.8, target=0.5,
                     reached=False, target_note=why)  # fmt: skip
    results = read_results(maker.save(tmp_path))
    table = tables.measured(Facts(results.finished))
    assert [text for text in tables.reasons(table) if text] == [why]
    written = write_analysis(results)
    text = written.report.read_text(encoding="utf-8")
    assert f'<tr class="why"><td colspan="{tables.display(table).shape[1]}">* {why}</td></tr>' in text
    assert f"{late['key'][:8]}, block 9, target" in (tmp_path / "tables" / "s.md").read_text(encoding="utf-8")
    assert why in set(pd.read_csv(tmp_path / "tables" / "s.csv")["target_note"].dropna())


def test_how_a_model_was_driven_stands_in_the_table_where_it_varies_and_is_no_seed(tmp_path: Path) -> None:
    for fills in (("last", "zero"), ("zero", "zero")):
        maker = Maker(images=60)
        for seed, (fill, accuracy) in enumerate(zip(fills, (0.8, 0.6), strict=True)):
            maker.add("s", "ATS", reducer=[{"name": "ats"}], blocks=[3], keep=0.5, accuracy=accuracy, seed=seed,
                      fill=fill, spread="mass")  # fmt: skip
        shown = tables.display(tables.measured(Facts(tidy(maker.frame()))))
        assert "spread" not in shown and ("fill" in shown) == (len(set(fills)) > 1)
        if "fill" in shown:
            assert dict(zip(shown["fill"], shown["variant"], strict=True)) == {
                "": "dense",
                "last": "ATS",
                "zero": "ATS",
            }
        assert len(shown) == 1 + len(set(fills))


def test_the_plain_models_numbers_say_where_they_come_from(tmp_path: Path) -> None:
    maker = Maker(images=60)
    maker.add("s", "ATS", reducer=[{"name": "ats"}], blocks=[3], keep=0.5, accuracy=0.8)
    shown = tables.display(tables.measured(Facts(tidy(maker.frame()))))
    assert shown.loc[shown["variant"] == "dense", "trial"].tolist() == ["every trial"]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (
            ["run", "--data", "/srv/data/imagenet-val", "--out", "results/a"],
            "run --data …/imagenet-val --out results/a",
        ),
        ("run --weights=/srv/data/deit.safetensors --seed 1/2", "run --weights=…/deit.safetensors --seed 1/2"),
        ("run --specs 'methods k_values' ~/x/y ./a/b", "run --specs 'methods k_values' ~/x/y ./a/b"),
        (None, ""),
    ],
)
def test_the_command_does_not_say_where_files_lie_on_a_machine(command: object, shown: str) -> None:
    assert page._command(command) == shown


def test_sets_of_blocks_have_room_for_their_names_and_marks_are_explained() -> None:
    maker = Maker(images=60)
    sets = ([0, 4, 8], [3, 6, 9], list(range(3, 12)), [4, 7, 10])
    for blocks in (*([b] for b in range(12)), *sets):
        for share in (0.36, 0.5, 0.6, 0.7):
            if blocks != [5] or share != 0.5:  # a gap between neighbours
                maker.add("stage_placement", "p", reducer=[{"name": "ats"}], blocks=blocks, keep=share, accuracy=0.8,
                          target=share, x=share)  # fmt: skip
    figure = draw(placement.placement, rows_of(maker))
    assert overlapping_texts(figure) == []
    assert {"95 % interval over images", "dense model"} <= set(legend(figure))
    assert "interpolated between neighbours" in legend(figure)  # block 5 has 0.36 and 0.6 on either side of 0.5
    accuracy = figure.axes[0]
    joined = [line for line in accuracy.lines if line.get_linestyle() == "-" and len(np.asarray(line.get_xdata())) > 2]
    assert joined and all(np.diff(np.asarray(line.get_xdata(), dtype=float)).max() < 1.01 for line in joined)


def test_lines_do_not_cross_blocks_that_were_not_measured() -> None:
    maker = Maker(images=60)
    for block in (0, 1, 3, 6):
        maker.add("stage_placement", "p", reducer=[{"name": "ats"}], blocks=[block], keep=0.5, accuracy=0.8, target=0.5)
    accuracy = draw(placement.placement, rows_of(maker)).axes[0]
    drawn = [c.lines[0] for c in accuracy.containers]
    assert sorted(len(np.asarray(line.get_xdata())) for line in drawn) == [1, 1, 2]


def test_a_cross_and_the_bars_are_in_the_legend_of_differences(answered: pd.DataFrame) -> None:
    rows = answered[answered["spec"] == "evit_stacking"]
    found = Facts(rows).versus
    figure = draw(difference.difference, rows, style.assign_looks(rows))
    crossed = any(one.how == "interpolated" for one in found)
    assert ("interpolated between neighbours" in legend(figure)) == crossed
    assert "paired 95 % interval" in legend(figure)


def test_a_trial_that_removes_nothing_tells_how_hard_images_are() -> None:
    maker = Maker(images=60)
    maker.add("s", "K = all", reducer=[{"name": "topk"}], blocks=[3], keep=1.0, accuracy=0.8)
    rows = tidy(maker.frame())
    key = rows["key"].iloc[0]
    maker.images[key]["correct"] = maker.images[key]["dense_correct"]
    hard = tokens.hardness(rows, maker.images)
    assert hard is not None and len(hard) == 60
    maker.images[key]["correct"] = ~maker.images[key]["dense_correct"]
    assert tokens.hardness(rows, maker.images) is None
    assert clutter.question(tokens.HARDNESS) != clutter.question(tokens.CLUTTER)


def test_text_is_as_wide_in_the_file_as_it_was_laid_out() -> None:
    with style.theme():
        inches = []
        for dpi in (72, 100, page.PNG_DPI):
            figure = Figure(dpi=dpi)
            canvas = FigureCanvasAgg(figure)
            text = figure.text(0.1, 0.5, "inverse transform (unsorted)  15", fontsize=7.5)
            inches.append(text.get_window_extent(canvas.get_renderer()).width / dpi)
    assert inches == pytest.approx([inches[0]] * 3, rel=0.01)


def test_pictures_say_that_only_stored_thumbnails_were_ranked(results: Results, answered: pd.DataFrame) -> None:
    pictures = page.read_samples(results.folder / "samples")
    scene = plots.Scene({}, "subtitle", pictures, "digits_vit_small", count=400)
    drawn = figures(answered[answered["spec"] == "adaptivity"], results.images, "Adaptivity", scene)
    caption = next(one.caption for one in drawn if one.name == "adaptivity_extremes")
    assert f"Only the {len(pictures)} images whose thumbnails the run stored are ranked, not all 400" in caption


def test_an_oracle_is_drawn_and_listed_and_nobodys_choice(tmp_path: Path) -> None:
    maker = Maker(images=200)
    for name, accuracy in (("back_tracking", 0.95), ("tome", 0.8), ("random", 0.5)):
        for keep in (0.4, 0.6, 0.8):
            maker.add("s", name, reducer=[{"name": name}], blocks=[3], keep=keep, accuracy=accuracy)
    results = read_results(maker.save(tmp_path))
    facts = Facts(with_answers(results.finished, results.images), results.images)
    assert "back_tracking" in facts.series
    assert facts.comparisons and all(one.rows["variant"].iloc[0] == "tome" for one in facts.comparisons)
    assert "back_tracking" not in set(facts.front["variant"]) and "back_tracking" not in pareto.shown(facts)
    assert "(an oracle)" in pareto.PLOT.caption(facts, Scene({}, ""))


def test_a_series_wholly_below_the_axis_has_no_panel_of_its_own_and_is_named_in_words(tmp_path: Path) -> None:
    maker, tops = Maker(images=20), {0.4: 0.80, 0.6: 0.82, 0.8: 0.84}
    for i in range(12):
        for keep in tops:
            maker.add("s", f"series {i}", reducer=[{"name": "topk"}], blocks=[3], keep=keep, accuracy=0.5, x=keep)
    maker.add("s", "broken", reducer=[{"name": "hvt_pool"}], blocks=[3], keep=0.5, accuracy=0.5)
    trials = read_results(maker.save(tmp_path)).finished
    facts = Facts(
        trials.assign(
            top1=[0.05 if v == "broken" else tops[x] for v, x in zip(trials["variant"], trials["x"], strict=True)]
        )
    )
    assert "broken" not in labels.seen(facts) and len(labels.seen(facts)) == 12
    assert "Below the axis: broken (down to 5.0 %)" in labels.below(facts)


def test_what_leaves_no_patch_has_no_curve_of_coverage_and_the_caption_says_so() -> None:
    rows = pd.DataFrame(
        {"variant": ["topk", "none"], "dense": False, "coverage": [0.7, 0.0], "tokens": [[65, 30], [65, 1]]}
    )
    assert coverage.series(rows) == ["topk"]
    assert "Not here, because no patch leaves its last block: none." in coverage.caption(rows)
