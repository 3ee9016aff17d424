"""The figures made for one question each: the numbers in their axes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import plots, published, stats, style
from analysis.facts import agreement as facts_agreement
from analysis.facts import kept, matching
from analysis.facts import tokens as facts_tokens
from analysis.facts.clips import ClipGrid
from analysis.facts.comparison import versus, versus_curve
from analysis.facts.matching import merge_seeds
from analysis.facts.outcomes import with_answers
from analysis.facts.overview import Overview, overview, staged_trial
from analysis.facts.spec import Facts
from analysis.facts.transfer import trained_at
from analysis.frame import Results, tidy
from analysis.page import read_samples
from analysis.plots import (
    agreement,
    clutter,
    coverage,
    difference,
    extremes,
    finetuning,
    panels,
    pareto,
    published_points,
    runtime,
    sampling,
    scaling,
    single_multi,
    stages,
    tradeoff,
    transfer,
)
from analysis.plots.shared import shared_figures
from tests.analysis.asked import WORDS, draw
from tests.analysis.synthetic import DENSE_GMACS, Maker
from tests.analysis.test_plots import curves, legend, overlapping_texts

Looks = Mapping[str, style.Look]


def spec(answered: pd.DataFrame, name: str) -> pd.DataFrame:
    return answered[answered["spec"] == name]


def test_differences_are_paired_and_say_which_are_told_apart(answered: pd.DataFrame, looks: Looks) -> None:
    rows = spec(answered, "sampling_method")
    found = Facts(rows).versus
    assert {one.reference for one in found} == {"inverse transform (paper)"} and len(found) == 6
    one = next(f for f in found if f.name == "top-K" and f.level == pytest.approx(0.5 * DENSE_GMACS))
    pair = [rows[(rows["variant"] == name) & (rows["x"] == 0.5)].iloc[0] for name in ("top-K", one.reference)]
    assert one.paired.difference == pytest.approx(pair[0]["top1"] - pair[1]["top1"])
    assert one.p_holm == pytest.approx(
        dict(zip(map(id, found), stats.holm([f.paired.p_value for f in found]), strict=True))[id(one)]
    )
    axes = draw(difference.difference, rows, looks).axes[0]
    drawn = curves(axes)
    assert sorted(drawn["top-K"][1]) == pytest.approx(
        sorted(100 * f.paired.difference for f in found if f.name == "top-K")
    )
    filled = sum(line.get_gid() == "apart" for line in axes.lines)
    assert filled == sum(f.told_apart for f in found) and filled >= 3
    table = difference.table(Facts(rows))
    assert len(table) == 6 and all(len(key) == 16 for keys in table["keys"] for key in keys.split(" "))


def test_an_uncalibrated_stack_meets_the_curve_of_its_base_at_its_own_cost(answered: pd.DataFrame) -> None:
    rows = merge_seeds(spec(answered, "evit_stacking"))
    found = versus_curve(rows, "EViT", by="variant")
    assert found and {one.how for one in found} <= {matching.INTERPOLATED, matching.NEARBY}
    curve = rows[rows["variant"] == "EViT"].sort_values("gmacs_mean")
    one = next(f for f in found if f.how == matching.INTERPOLATED)
    own = rows[rows["key"] == one.keys[0]].iloc[0]
    expected = np.interp(own["gmacs_mean"], curve["gmacs_mean"], curve["top1"])
    assert one.paired.difference == pytest.approx(own["top1"] - expected) and one.paired.test == "paired bootstrap"
    assert versus(rows, "unheard of", by="variant") == []


def test_many_series_get_a_panel_each(looks: Looks) -> None:
    maker = Maker(images=40)
    for i in range(panels.TOO_MANY + 4):
        for share in (0.4, 0.6):
            maker.add(
                "methods", f"m{i}", reducer=[{"name": f"m{i}"}], blocks=[3], keep=share, accuracy=0.8, target=share
            )
    rows = with_answers(tidy(maker.frame()), maker.images)
    own = style.assign_looks(rows)
    assert len({(look.colour, look.marker) for look in own.values()}) == 13
    facts, scene = Facts(rows), plots.Scene(own, "")
    first, more = (one.figure for one in tradeoff.PLOT.drawn(facts, "A title", scene))
    assert [axes.get_title() for axes in [*first.axes, *more.axes]] == list(facts.lacks)
    assert len(first.axes) == 9 and "A title: accuracy against cost (2 of 2)" in more.get_suptitle()
    axes = first.axes[2]
    name = axes.get_title()
    line = next(line for line in axes.lines if line.get_label() == name)
    expected = rows[rows["variant"] == name].sort_values("gmacs_mean")
    assert np.asarray(line.get_ydata()) == pytest.approx(100 * expected["top1"].to_numpy())
    assert sum(line.get_gid() == "others" for line in axes.lines) == 12
    assert len(style.assign_looks(pd.DataFrame({"spec": "s", "variant": [f"v{i}" for i in range(32)]}))) == 32


def test_labels_are_spread_as_little_as_it_takes() -> None:
    assert panels.spread([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])
    found = panels.spread([0.5, 0.52, 0.1], 0.2)
    assert found[1] - found[0] == pytest.approx(0.2) and found[:2].mean() == pytest.approx(0.51) and found[2] == 0.1


def test_the_front_holds_what_no_cheaper_trial_equals(answered: pd.DataFrame, looks: Looks) -> None:
    rows = merge_seeds(spec(answered, "methods"))
    edge = Facts(spec(answered, "methods")).front
    for row in rows[~rows["dense"]].to_dict("records"):
        beaten = ((edge["gmacs_mean"] <= row["gmacs_mean"]) & (edge["top1"] >= row["top1"])).any()
        assert beaten or row["key"] in set(edge["key"])
    assert edge["top1"].is_monotonic_increasing and edge["gmacs_mean"].is_monotonic_increasing
    axes = draw(pareto.pareto, spec(answered, "methods"), looks).axes[0]
    step = next(line for line in axes.lines if line.get_gid() == "front")
    assert np.asarray(step.get_ydata())[:-1] == pytest.approx(100 * edge["top1"].to_numpy())
    names = [text.get_text() for text in axes.texts if text.get_gid() == "name"]
    assert set(edge["variant"]) <= set(names) and len(names) == len(axes.collections) <= 5  # bands
    dots = next(line for line in axes.lines if line.get_gid() == "all")
    assert len(dots.get_xdata()) == len(rows[~rows["dense"]])


def test_a_method_below_the_axis_is_told_in_words_and_has_no_name_on_the_front() -> None:
    maker = Maker(images=200)
    for i, name in enumerate(("A", "B", "C", "D", "E", "F")):
        for share in (0.4, 0.5, 0.6, 0.7):
            maker.add(
                "methods", name, reducer=[{"name": name}], blocks=[3], keep=share, x=share, accuracy=0.85 - 0.005 * i
            )
    maker.add("methods", "pooling", reducer=[{"name": "hvt"}], blocks=[0], keep=0.05, accuracy=0.15)
    rows = with_answers(tidy(maker.frame()), maker.images)
    facts, (one,) = Facts(rows), pareto.PLOT.drawn(Facts(rows), "A title", plots.Scene(style.assign_looks(rows), ""))
    axes = one.figure.axes[0]
    names = {text.get_text() for text in axes.texts if text.get_gid() == "name"}
    assert len(names) == 5 and "pooling" in set(facts.front["variant"]) - names
    assert axes.get_ylim()[0] > 60 and re.search(r"Below the axis: pooling \(down to 1\d\.\d %\)\.", one.caption)
    assert overlapping_texts(one.figure) == []
    of_clips = plots.Scene(style.assign_looks(rows), "", clip=ClipGrid(4, 3, 5))
    for plot in (pareto.PLOT, tradeoff.PLOT):
        for found, inputs, others in ((of_clips, "clips", "images"), (replace(of_clips, clip=None), "images", "clips")):
            one = plot.drawn(facts, "A title", found)[0]
            legend = one.figure.legends[0].get_texts()
            assert f"95 % interval over {inputs}" in [text.get_text() for text in legend]
            assert inputs in one.caption and others not in one.caption


def test_one_comparison_is_no_figure(answered: pd.DataFrame) -> None:
    rows = spec(answered, "sampling_method")
    rows = rows[rows["target"].eq(0.5) & rows["variant"].isin(["top-K", "inverse transform (paper)"])]
    assert len(Facts(rows).versus) == 1 and not difference.PLOT.needs(Facts(rows))
    assert difference.PLOT.needs(Facts(spec(answered, "sampling_method")))


def test_single_seeds_stand_beside_their_mean(answered: pd.DataFrame, looks: Looks) -> None:
    rows = spec(answered, "score_functions")
    axes = draw(tradeoff.tradeoff, rows, looks).axes[0]
    dots = next(line for line in axes.lines if line.get_gid() == "seeds")
    expected = 100 * rows.loc[rows["variant"] == "random", "top1"]
    assert sorted(dots.get_ydata()) == pytest.approx(sorted(expected)) and "single seeds" in tradeoff.caption(
        Facts(rows), plots.Scene({}, "")
    )


def test_samplers_show_both_printed_costs(answered: pd.DataFrame, looks: Looks) -> None:
    axes = draw(sampling.sampling, spec(answered, "sampling_method"), looks).axes
    assert [one.get_title() for one in axes] == ["off the shelf, set to a cost", "off the shelf, settings of their own"]
    assert list(curves(axes[1])) == ["inverse transform (official), as many points as patches"]
    lines = [float(line.get_xdata()[0]) for line in axes[0].lines if line.get_gid() == "printed"]
    assert lines == pytest.approx([2.9 / 4.6 * DENSE_GMACS, 3.4 / 4.6 * DENSE_GMACS])
    assert "inverse transform (paper)" in curves(axes[0])
    both = draw(sampling.sampling, spec(answered, "finetuning").assign(spec="sampling_method"), looks).axes
    assert [one.get_title() for one in both] == ["off the shelf", "finetuned"]


def test_one_or_many_stages_with_the_printed_saving(answered: pd.DataFrame, looks: Looks) -> None:
    axes = draw(single_multi.single_multi, spec(answered, "single_multi_stage"), looks).axes[0]
    line = next(line for line in axes.lines if line.get_gid() == "published")
    assert line.get_xdata()[0] == pytest.approx(0.63 * DENSE_GMACS)
    assert {"ATS (block 3)", "ATS (blocks 3-11)"} <= set(curves(axes))


def test_models_are_set_against_their_own_dense_accuracy(answered: pd.DataFrame) -> None:
    rows = spec(answered, "model_scaling")
    assert list(Facts(rows).models) == ["digits_vit_tiny", "digits_vit_small"]
    accuracy, loss = draw(scaling.scaling, rows).axes
    stars = {
        float(line.get_xdata()[0]): float(line.get_ydata()[0]) for line in accuracy.lines if line.get_gid() == "dense"
    }
    assert stars == pytest.approx({DENSE_GMACS / 3: 84.0, DENSE_GMACS: 90.0})
    drawn = curves(loss)["digits_vit_small | ATS (block 3)"]
    assert drawn[0] == pytest.approx([36, 50, 70]) and accuracy.get_xscale() == "log"
    part = merge_seeds(rows[rows["model"] == "digits_vit_small"]).sort_values("gmacs_mean").to_dict("records")
    assert drawn[1] == pytest.approx([100 * matching.against_dense(row).difference for row in part])  # type: ignore[union-attr]


def test_runtime_sets_the_clock_beside_the_count(answered: pd.DataFrame, looks: Looks) -> None:
    rows = spec(answered, "runtime")
    against, batches = draw(runtime.runtime, rows, looks).axes
    x, y = curves(against)["ToMe"]
    assert x.astype(float) == pytest.approx([1.67] * 3) and sorted(y) == pytest.approx(
        sorted(1.4 - 0.3 / b for b in (1, 8, 32))
    )
    star = next(line for line in against.lines if line.get_gid() == "published")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((4.6 / 2.9, 1403 / 1010))
    line = next(line for line in batches.lines if line.get_label() == "ToMe")
    assert list(line.get_xdata()) == [1, 8, 32]
    assert Facts(spec(answered, "methods")).timed.empty
    assert "cpu" in runtime.caption(Facts(rows), plots.Scene({}, ""))


def test_histograms_by_stage_hold_every_image(results: Results, answered: pd.DataFrame) -> None:
    row = staged_trial(spec(answered, "adaptivity"), results.images)
    assert row is not None and len(row["blocks"]) == 9
    table = results.images[str(row["key"])]
    figure = stages.stages(row, table, **WORDS)
    panels_drawn = [axes for axes in figure.axes if axes.patches]
    assert len(panels_drawn) == 9 and panels_drawn[0].get_title().startswith("after block 3: mean")
    total = sum(patch.get_height() for patch in panels_drawn[0].patches)
    assert total == pytest.approx(200)  # 100 % of the plainest third and of the busiest
    tokens = np.stack(table["tokens"].to_list())
    mean = next(line for line in panels_drawn[8].lines if line.get_gid() == "mean")
    assert mean.get_xdata()[0] == pytest.approx(tokens[:, 12].mean())
    blind = stages.stages(row, table.assign(clutter=None), **WORDS)
    assert sum(patch.get_height() for patch in blind.axes[0].patches) == pytest.approx(100)


def test_the_plainest_images_come_first_and_the_busiest_last(results: Results, answered: pd.DataFrame) -> None:
    row = staged_trial(spec(answered, "adaptivity"), results.images)
    assert row is not None
    table, pictures = results.images[str(row["key"])], read_samples(results.folder / "samples")
    order = extremes.ranked(table, pictures)
    assert [one[0] for one in order] == sorted(float(np.sum(table["tokens"].iloc[one[2]][:-1])) for one in order)
    figure = extremes.extremes(row, results.images, pictures, **WORDS)
    assert figure is not None
    firsts = [axes.texts[0].get_text() for axes in figure.axes if axes.texts and "mean" in axes.texts[0].get_text()]
    count = len(order)
    assert [text.split("\n")[0] for text in firsts] == [f"{i} of {count}" for i in (1, 2, count - 1, count)]
    assert firsts[0].endswith(f"mean {np.mean(table['tokens'].iloc[order[0][2]][:-1]):.0f}")
    assert extremes.extremes(row, results.images, [], **WORDS) is None


def test_rank_correlation_is_tested_for_every_method(results: Results, answered: pd.DataFrame, looks: Looks) -> None:
    rows = overview(answered)
    found, what = facts_tokens.correlations(rows, results.images)
    assert what == facts_tokens.CLUTTER and set(found["variant"]) == {"ATS", "top-K", "EViT", "ToMe", "random"}
    ats = found.set_index("variant").loc["ATS"]
    table = results.images[ats["key"]]
    rho = stats.spearman(facts_tokens.tokens_kept(table, facts_tokens.LAST), table["clutter"].to_numpy(dtype=float))
    assert (ats["rho"], ats["low"], ats["high"]) == pytest.approx((rho.value, rho.low, rho.high)) and ats["clear"]
    assert found["rho"].isna().sum() == 4 and "top-K" in clutter.caption(found, what, "at one cost")
    axes = clutter.clutter(found, what, looks=looks, **WORDS).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["ATS"]
    interval = next(line for line in axes.lines if line.get_gid() == "interval")
    assert list(interval.get_xdata()) == pytest.approx([rho.low, rho.high])


def test_without_clutter_the_plain_models_loss_stands_in(results: Results, answered: pd.DataFrame) -> None:
    rows = overview(answered)
    blind = {key: results.images[key].assign(clutter=np.nan) for key in answered["key"]}
    hard = facts_tokens.hardness(answered, blind)
    assert hard is not None and hard.index.is_unique
    found, what = facts_tokens.correlations(rows, blind, hard)
    assert what == facts_tokens.HARDNESS and found["rho"].notna().sum() == 1
    assert facts_tokens.correlations(rows, blind, None)[0].empty


def test_agreement_knows_chance_from_choice() -> None:
    random = np.random.default_rng(0)
    first = random.random((300, 64)).argsort(axis=1) < 20
    other = random.random((300, 64)).argsort(axis=1) < 32
    same, blind = kept.overlap(first, first), kept.overlap(first, other)
    assert same["jaccard"] == 1.0 and same["kappa"] == pytest.approx(1.0)
    assert blind["kappa"] == pytest.approx(0.0, abs=0.02) and blind["jaccard"] == pytest.approx(
        blind["chance"], abs=0.02
    )
    apart = kept.overlap(first, ~first)
    assert apart["jaccard"] == 0.0 and apart["kappa"] < -0.3
    assert np.isnan(kept.overlap(first, np.ones_like(first))["kappa"])


def test_agreement_is_drawn_for_every_pair(results: Results, answered: pd.DataFrame) -> None:
    rows = overview(answered)
    pairs, left = facts_agreement.matrix(rows, results.images)
    assert left == [] and len(pairs) == 15 and set(pairs["first"]) == set(rows["variant"])
    values = facts_agreement.square(pairs)
    assert np.allclose(values, values.T) and np.allclose(np.diag(values), 1)
    one = pairs[(pairs["first"] == "ATS") & (pairs["second"] == "EViT")].iloc[0]
    a, b = (kept.last_kept(results.images, key) for key in one["keys"].split(" "))
    assert a is not None and b is not None and a[0].shape == (400, 64) and a[1] == 64
    a, b = a[0], b[0]
    assert one["jaccard"] == pytest.approx(((a & b).sum(1) / (a | b).sum(1)).mean())
    axes = agreement.agreement(pairs, **WORDS).axes[0]
    shown = axes.images[0].get_array()
    assert shown.shape == (5, 5) and shown.count() == 10 and len(axes.texts) == 10
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert [int(tick.split("\u2002")[1]) for tick in ticks] == [1, 2, 3, 4, 5]  # columns bear the numbers of the rows
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3", "4", "5"]


def test_agreement_without_the_spec_of_all_methods_takes_every_spec_once(
    results: Results, answered: pd.DataFrame
) -> None:
    trials = answered[(answered["spec"] != "methods") & (answered["model"] == "digits_vit_small")]
    rows = overview(trials)
    both = facts_agreement.across_specs(trials, rows)
    assert set(rows["key"]) <= set(both["key"]) and both["spec"].nunique() > 1 and both["variant"].is_unique
    assert not both.duplicated(["reducer", "placement"]).any()
    assert (both["gmacs_mean"] - rows["gmacs_mean"].median()).abs().max() <= 0.06 * DENSE_GMACS
    scene = plots.Scene({}, "subtitle", [], "digits_vit_small", count=400)
    drawn = next(one for one in shared_figures(Overview(trials, results.images), scene) if one.name == "agreement")
    assert overlapping_texts(drawn.figure) == []


def test_methods_are_shown_at_a_cost_at_which_they_have_trials_and_not_at_one_between(answered: pd.DataFrame) -> None:
    """As the specs of clips: all methods at 0.5 and 0.7 of the dense cost, one of them at 0.6 as well."""
    row, rows = answered[~answered["dense"]].iloc[0], []
    for number in range(5):
        for share in (0.5, 0.6, 0.7) if number == 0 else (0.5, 0.7):
            cost = share * row["dense_gmacs"]
            rows.append({**row, "spec": "methods", "variant": f"method {number}", "key": f"{number}/{share}",
                         "reducer": str(number), "gmacs_mean": cost, "target_gmacs": cost})  # fmt: skip
    shown = overview(pd.DataFrame(rows))
    assert list(shown["variant"]) == [f"method {number}" for number in range(5)]
    assert shown["gmacs_mean"].nunique() == 1 and "0.6" not in str(list(shown["key"]))


def test_agreement_leaves_out_specs_that_have_nothing_near(answered: pd.DataFrame) -> None:
    trials = answered[(answered["spec"] != "methods") & (answered["model"] == "digits_vit_small")]
    rows = overview(trials)
    others = trials["spec"] != rows["spec"].iloc[0]
    far = trials.assign(gmacs_mean=trials["gmacs_mean"].where(~others, 100 * DENSE_GMACS))
    assert list(facts_agreement.across_specs(far, rows)["key"]) == list(rows["key"])


def test_a_smaller_input_has_patches_of_its_own(results: Results, answered: pd.DataFrame) -> None:
    rows = overview(answered)
    small = rows.assign(tokens=[[40, 40] if name == "ToMe" else list(row) for name, row in zip(
        rows["variant"], rows["tokens"], strict=True)])  # fmt: skip
    pairs, left = facts_agreement.matrix(small, results.images)
    assert left == ["ToMe"] and "ToMe" not in set(pairs["first"])
    assert "Not here, because its patches are not those of the full image: ToMe." in coverage.caption(small)


def test_a_method_that_reduces_in_the_first_block_is_compared_on_the_full_grid() -> None:
    maker = Maker(images=50)
    for name, blocks in (("early", [0]), ("late", [3])):
        maker.add("methods", name, reducer=[{"name": name}], blocks=blocks, keep=0.4, accuracy=0.8, target=0.5)
    pairs, left = facts_agreement.matrix(merge_seeds(tidy(maker.frame())), maker.images)
    assert left == [] and len(pairs) == 3  # each with itself, and with the other
    other = pairs[pairs["first"] != pairs["second"]].iloc[0]
    assert other["kappa"] == pytest.approx(0.0, abs=0.05) and other["chance"] == pytest.approx(0.25, abs=0.02)
    missing = pairs[pairs["first"] == pairs["second"]]
    assert np.isnan(facts_agreement.square(missing).loc["early", "late"])  # not known is not zero


def test_finetuned_rows_are_set_against_the_same_off_the_shelf(answered: pd.DataFrame, looks: Looks) -> None:
    rows = spec(answered, "finetuning")
    found = Facts(rows).recovered
    assert len(found) == 4 and {one.name for one in found} == {"ATS", "top-K"}
    accuracy, change = draw(finetuning.finetuning, rows, looks).axes
    assert set(curves(accuracy)) == {"ATS", "ATS (finetuned)", "top-K", "top-K (finetuned)"}
    tuned = merge_seeds(rows[rows["finetuned"] & (rows["variant"] == "ATS (finetuned)")]).sort_values("gmacs_mean")
    assert curves(accuracy)["ATS (finetuned)"][1] == pytest.approx(100 * tuned["top1"].to_numpy())
    assert tuned["seeds"].tolist() == [3, 3] and (tuned["top1_sd"] > 0).all()
    assert sum(line.get_gid() == "seeds" for line in accuracy.lines) == 2
    y = sorted(100 * one.paired.difference for one in found if one.name == "ATS")
    assert sorted(curves(change)["ATS"][1]) == pytest.approx(y) and min(y) > 0


def test_budget_transfer_has_a_curve_for_each_training(answered: pd.DataFrame) -> None:
    rows = spec(answered, "budget_transfer")
    named = Facts(rows).trainings
    assert set(named["trained"]) == {"K = 16", "K = 32"} and named["home"].sum() == 4
    ats, topk = draw(transfer.transfer, rows).axes
    assert (ats.get_title(), topk.get_title()) == ("ats", "topk") and set(curves(ats)) == {"K = 16", "K = 32"}
    home = [line for line in ats.lines if line.get_gid() == "home"]
    own = named[named["home"] & (named["method"] == "ats")]
    assert sorted(float(line.get_ydata()[0]) for line in home) == pytest.approx(sorted(100 * own["top1"]))
    assert "finetuned at K = 16" in legend(draw(transfer.transfer, rows))


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ("", "off the shelf"),
        (json.dumps({"stages": [{"at": [3], "stack": [{"name": "ats", "budget": {"count": 108}}]}]}), "K = 108"),
        (json.dumps({"stages": [{"at": [3], "stack": [{"name": "evit", "budget": {"ratio": 0.7}}]}]}), "keep 0.7"),
        (json.dumps({"stages": [{"stack": [{"name": "topk", "budget": {"ratio": "24/49"}}]}]}), "keep 0.49"),
        (json.dumps({"stages": [], "epochs": 3}), "dense"),
        (json.dumps({"stages": [], "target": 0.5}), "target 50 %"),
        ("not JSON", "not JSON"),
    ],
)
def test_the_budget_of_a_training_in_words(training: str, words: str) -> None:
    assert trained_at(training) == words


def test_table_one_stands_as_printed_beside_ours(answered: pd.DataFrame) -> None:
    rows = spec(answered, "methods")
    printed = published_points.printed_pairs(published_points.table_one())
    assert len(printed) == 7 and printed.set_index("model").loc["DeiT-S", "dense_top1"] == 79.8
    absolute, relative = draw(published_points.published_points, rows, imagenet=True).axes
    dots = next(line for line in absolute.lines if line.get_gid() == "published")
    table = published.load()
    table = table[table["source"].str.startswith("ATS") & (table["table"] == "Table 1")]
    assert len(dots.get_xdata()) == (table["method"] != "ATS").sum()
    pairs = next(line for line in relative.lines if line.get_gid() == "published-ats")
    saved = dict(zip(np.round(pairs.get_xdata(), 1), np.round(pairs.get_ydata(), 1), strict=True))
    assert saved[37.0] == -0.1  # DeiT-S: 4.6 -> 2.9, 79.8 -> 79.7
    front = Facts(rows).front
    ours = next(line for line in absolute.lines if line.get_gid() == "ours")
    assert np.asarray(ours.get_ydata()) == pytest.approx(100 * front["top1"].to_numpy())
    assert len(draw(published_points.published_points, rows, imagenet=False).axes) == 1


def test_bits_of_a_table_in_memory_are_read_alike(results: Results) -> None:
    maker = Maker(images=10)
    key = maker.add("s", "v", reducer=[{"name": "ats"}], blocks=[3], keep=0.5, accuracy=0.8)["key"]
    bits = kept.packed(maker.images, key)
    assert bits is not None and bits.shape == (10, 12, 8) and kept.packed(maker.images, "missing") is None
