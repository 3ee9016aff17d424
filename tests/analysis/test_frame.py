"""Reading result files, and setting trials side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import stats
from analysis.facts import matching
from analysis.facts.outcomes import with_answers
from analysis.frame import AnalysisError, Results, read_results, records_of, reducer_names, tidy
from tests.analysis.synthetic import DENSE_GMACS, Maker


def test_every_trial_is_read_and_split_by_status(results: Results) -> None:
    assert len(results.trials) == len(results.finished) + len(results.failed)
    assert results.failed["error"].tolist() == ["ReducerError: r = 40 of 64 tokens: at most half can merge"]
    assert results.specs[0] == "score_functions" and "methods" in results.specs
    assert [setting.model for setting in results.settings()] == ["digits_vit_small", "digits_vit_tiny"]


def test_lists_come_back_as_lists_and_nulls_as_nothing(results: Results) -> None:
    row = results.finished.iloc[0]
    assert isinstance(row["tokens"], list) and len(row["tokens"]) == 13 and isinstance(row["blocks"], list)
    assert results.failed.iloc[0]["tokens"] == []
    assert np.isnan(results.failed.iloc[0]["top1"]) and results.failed.iloc[0]["budget"] == ""


def test_missing_columns_and_nulls_do_not_matter() -> None:
    rows = tidy(pd.DataFrame([{"spec": "s", "key": "k", "status": "ok", "variant": None, "top1": None}]))
    assert rows.loc[0, "variant"] == "s"
    assert rows.loc[0, "tokens"] == [] and not rows.loc[0, "finetuned"] and not rows.loc[0, "dense"]


def test_the_plain_model_is_recognised(results: Results) -> None:
    assert results.finished.loc[results.finished["dense"], "variant"].tolist() == ["dense"]
    base = {"spec": "s", "key": "k", "status": "ok", "variant": "nothing done"}
    identity = json.dumps([{"at": [3], "stack": [{"name": "identity"}]}])
    assert tidy(pd.DataFrame([{**base, "reducer": identity}])).loc[0, "dense"]
    assert not tidy(pd.DataFrame([{**base, "reducer": "not JSON"}])).loc[0, "dense"]


def test_reducers_are_named_through_stacks_and_selections() -> None:
    nested = [{"at": [3], "stack": [{"name": "evit", "select": {"name": "ats"}}, {"name": "tome"}]}]
    assert reducer_names(json.dumps(nested)) == ["evit", "ats", "tome"]
    assert reducer_names("[]") == []


@pytest.mark.parametrize("kind", ["missing", "empty", "no rows", "damaged", "columns"])
def test_a_folder_that_cannot_be_used_names_the_remedy(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind != "missing":
        out.mkdir()
    if kind == "no rows":
        pq.write_table(pa.table({"spec": pa.array([], pa.string())}), out / "results.parquet")
    if kind == "damaged":
        (out / "results.parquet").write_bytes(b"PAR1 not really")
    if kind == "columns":
        pq.write_table(pa.table({"spec": ["s"]}), out / "results.parquet")
    with pytest.raises(AnalysisError, match="make ablations"):
        read_results(out)


def test_a_run_that_never_compacted_is_read_from_its_trials(tmp_path: Path, results: Results) -> None:
    maker = Maker(images=20)
    row = maker.add("s", "ATS", reducer=[{"name": "ats"}], blocks=[3], keep=0.5, accuracy=0.8)
    (tmp_path / "trials").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "trials" / f"{row['key']}.parquet")
    assert read_results(tmp_path).finished["key"].tolist() == [row["key"]]


def test_a_damaged_record_or_image_table_is_done_without(tmp_path: Path) -> None:
    maker = Maker(images=20)
    row = maker.add("s", "ATS", reducer=[{"name": "ats"}], blocks=[3], keep=0.5, accuracy=0.8)
    maker.save(tmp_path)
    (tmp_path / "run.json").write_text("{half")
    (tmp_path / "images" / f"{row['key']}.parquet").write_bytes(b"half")
    found = read_results(tmp_path)
    assert found.run == {} and row["key"] not in found.images and found.specs == ["s"]


@pytest.mark.parametrize("compacted", [True, False])
def test_a_flipped_bit_among_the_rows_is_no_result(compacted: bool, tmp_path: Path) -> None:
    rows = pa.table(
        {name: [f"{name} {number}" for number in range(50)] for name in ("spec", "key", "status", "variant")}
    )
    (tmp_path / "trials").mkdir()
    path = tmp_path / ("results.parquet" if compacted else "trials/a.parquet")
    pq.write_table(rows, path, write_page_checksum=True, compression="none")
    content = bytearray(path.read_bytes())
    content[content.index(b"key 31")] ^= 0x01
    path.write_bytes(content)
    with pytest.raises(AnalysisError, match=f"{path.name}.*delete the damaged file"):
        read_results(tmp_path)


def test_skipped_images_are_read_in_either_form() -> None:
    run = {"skipped": [["a.jpg", "truncated"], {"file": "b.jpg", "reason": "not an image"}, "c.jpg"]}
    found = Results(Path(), tidy(pd.DataFrame([{"spec": "s", "key": "k", "status": "ok", "variant": "v"}])), run)
    assert [file for file, _ in found.skipped_images] == ["a.jpg", "b.jpg", "c.jpg"]
    assert found.skipped_images[0][1] == "truncated"


def test_two_settings_never_mix(tmp_path: Path) -> None:
    maker = Maker(images=20)
    for model in ("digits_vit_small", "digits_vit_tiny"):
        reducer = [{"name": "ats", "seed": len(model)}]
        maker.add("s", "ATS", reducer=reducer, blocks=[3], keep=0.5, accuracy=0.8, model=model)
    found = read_results(maker.save(tmp_path))
    assert [setting.model for setting in found.settings()] == ["digits_vit_small", "digits_vit_tiny"]
    assert all(len(found.of(setting, "s")) == 1 for setting in found.settings())
    assert len({setting.slug for setting in found.settings()}) == 2


def test_seeds_become_one_row_with_their_mean(results: Results) -> None:
    rows = results.finished[results.finished["spec"] == "score_functions"]
    merged = matching.merge_seeds(rows)
    assert len(merged) == 25 and merged["seeds"].sum() == len(rows) == 35
    one = merged[(merged["variant"] == "random") & (merged["x"] == 8)].iloc[0]
    parts = rows[(rows["variant"] == "random") & (rows["x"] == 8)]
    assert one["top1"] == pytest.approx(parts["top1"].mean()) and len(one["keys"]) == 3
    nearest = (parts["top1"] - parts["top1"].mean()).abs().idxmin()
    assert one["key"] == parts.loc[nearest, "key"]


def test_images_and_seeds_are_two_sources_of_spread(answered: pd.DataFrame) -> None:
    rows = answered[(answered["spec"] == "score_functions") & (answered["variant"] == "random") & (answered["x"] == 8)]
    one = matching.merge_seeds(rows).iloc[0]
    assert one["seeds"] == 3 and one["seed_top1"] == rows["top1"].tolist()
    assert one["top1_sd"] == pytest.approx(rows["top1"].std(ddof=1))
    mean = np.mean([answers.astype(float) for answers in rows["answers"]], axis=0)
    assert one["answers"] == pytest.approx(mean) and one["top1"] == pytest.approx(mean.mean())
    interval = stats.accuracy(mean)  # over images, of each image's mean over seeds
    assert (one["top1_low"], one["top1_high"]) == (interval.low, interval.high)


def test_answers_are_in_one_order_and_intervals_are_bootstraps(results: Results, answered: pd.DataFrame) -> None:
    row = answered[answered["variant"] == "EViT"].iloc[0]
    table = results.images[row["key"]].sort_values("image")
    assert row["answers"].tolist() == table["correct"].tolist() and row["interval"] == "bootstrap"
    found = stats.bootstrap(row["answers"].astype(float))
    assert (row["top1_low"], row["top1_high"]) == (found.low, found.high)
    wilson = stats.wilson(row["answers"].sum(), len(row["answers"]))
    assert (row["top1_low"], row["top1_high"]) == pytest.approx((wilson.low, wilson.high), abs=0.01)


def test_a_trial_without_answers_keeps_the_interval_of_its_run(caplog: pytest.LogCaptureFixture) -> None:
    maker = Maker(images=20)
    keys = [
        maker.add("s", f"v{i}", reducer=[{"name": "ats"}], blocks=[3], keep=0.5 + i / 10, accuracy=0.8)["key"]
        for i in range(3)
    ]
    del maker.images[keys[1]]
    maker.images[keys[2]] = maker.images[keys[2]].assign(image=[f"other/{i}" for i in range(20)])
    rows = with_answers(tidy(maker.frame()), maker.images)
    assert rows["interval"].tolist() == ["bootstrap", "as recorded", "as recorded"]
    assert rows["answers"].iloc[1] is None and "other images" in caplog.text
    assert rows["top1_low"].iloc[1] == maker.rows[1]["top1_low"]


def test_kept_bits_are_read_apart_from_the_rest(results: Results) -> None:
    key = results.finished["key"].iloc[0]
    assert "kept" not in results.images[key]
    bits = results.images.kept(key)
    assert bits is not None and bits.shape == (400, 12, 8) and bits.dtype == np.uint8
    counts = np.stack(results.images[key]["tokens"].to_list())[:, 1:] - 1
    assert (np.bitwise_count(bits).sum(axis=2) == counts).all()
    assert results.images.kept("missing") is None


def test_a_series_of_which_some_are_finetuned_is_two(results: Results) -> None:
    rows = results.finished
    names = set(rows.loc[rows["spec"] == "finetuning", "variant"])
    assert names == {"ATS", "ATS (finetuned)", "top-K", "top-K (finetuned)"}
    assert "ats trained at 16" in set(rows.loc[rows["spec"] == "budget_transfer", "variant"])  # all are: no need to say


def test_trials_calibrated_to_one_target_are_compared_at_it(answered: pd.DataFrame) -> None:
    rows = matching.merge_seeds(answered[answered["spec"] == "single_multi_stage"])
    levels = matching.cost_levels(rows, by="variant", count=6)
    assert levels == pytest.approx([0.36 * DENSE_GMACS, 0.5 * DENSE_GMACS, 0.7 * DENSE_GMACS])
    half = matching.cut(rows, levels[1], by="variant")
    how = dict(zip(half.rows["variant"], half.rows["how"], strict=True))
    assert half.target and how["ATS (block 3)"] == how["ATS (blocks 3-11)"] == matching.CALIBRATED
    assert [name for name, _ in half.left_out] == ["coarse", "too dear"] and "GMACs only" in half.left_out[1][1]


def test_what_misses_a_target_is_interpolated_along_its_own_curve(answered: pd.DataFrame) -> None:
    rows = matching.merge_seeds(answered[answered["spec"] == "single_multi_stage"])
    coarse = rows[rows["variant"] == "coarse"].sort_values("gmacs_mean").to_dict("records")
    assert len(coarse) == 2
    level = matching.targets(rows)[-1]
    assert coarse[0]["gmacs_mean"] < level < coarse[1]["gmacs_mean"]
    row = matching.cut(rows, level, by="variant").rows.set_index("variant").loc["coarse"]
    share = (level - coarse[0]["gmacs_mean"]) / (coarse[1]["gmacs_mean"] - coarse[0]["gmacs_mean"])
    assert row["how"] == matching.INTERPOLATED and row["gmacs_mean"] == pytest.approx(level)
    assert row["top1"] == pytest.approx((1 - share) * coarse[0]["top1"] + share * coarse[1]["top1"])
    assert dict(row["weights"]) == pytest.approx({coarse[0]["key"]: 1 - share, coarse[1]["key"]: share})
    both = (1 - share) * coarse[0]["answers"] + share * coarse[1]["answers"]
    assert row["answers"] == pytest.approx(both) and set(np.unique(row["answers"])) != {0.0, 1.0}


def test_neighbours_far_apart_or_of_several_placements_are_no_curve() -> None:
    maker = Maker(images=20)
    for blocks, keep in (([3], 0.2), ([3], 0.95), ([0], 0.4), ([9], 0.4)):
        name = "far" if blocks == [3] else "placed"
        maker.add(
            "s", name, reducer=[{"name": "ats"}], blocks=blocks, keep=keep, accuracy=0.8, target=0.5, reached=False
        )
    maker.add("s", "there", reducer=[{"name": "topk"}], blocks=[3], keep=0.5, accuracy=0.8, target=0.5)
    rows = matching.merge_seeds(tidy(maker.frame()))
    found = matching.cut(rows, 0.5 * DENSE_GMACS, by="variant")
    assert set(found.rows["how"]) <= {matching.CALIBRATED, matching.NEARBY}
    assert "far" in [name for name, _ in found.left_out] or abs(0.95 - 0.2) < matching.MAX_GAP


def test_levels_are_costs_that_several_series_reach(results: Results) -> None:
    rows = matching.merge_seeds(results.finished[results.finished["spec"] == "methods"])
    levels = matching.cost_levels(rows, by="variant", count=6)
    assert levels == sorted(levels) and len(levels) >= 3
    for level in levels:
        part = matching.at_cost(rows, level, by="variant")
        assert part["variant"].is_unique and len(part) >= 2 and "dense" not in set(part["variant"])
        assert ((part["gmacs_mean"] - level).abs() <= matching.MATCH * 0.160 + 1e-12).all()
    assert matching.cost_levels(rows[rows["variant"] == "ATS"], by="variant") == []


def test_records_are_those_of_pandas_value_for_value(results: Results) -> None:
    rows = results.finished.head(8)
    rows = rows.assign(level=np.arange(8), how=pd.Series([np.float64(0.5), None] * 4, index=rows.index, dtype=object))
    assert {"float64", "int64", "bool", "object"} <= {str(dtype) for dtype in rows.dtypes}
    for ours, theirs in zip(records_of(rows), rows.to_dict("records"), strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert type(ours[name]) is type(value), name
            assert ours[name] is value or np.array_equal(ours[name], value) or (pd.isna(value) and pd.isna(ours[name]))
    assert records_of(rows.head(0)) == []
