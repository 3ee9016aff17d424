"""Reading result files, and setting trials side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import matching
from analysis.frame import AnalysisError, Results, read_results, reducer_names, tidy
from tests.analysis.synthetic import Maker


def test_every_trial_is_read_and_split_by_status(results: Results) -> None:
    assert len(results.trials) == len(results.finished) + len(results.failed)
    assert results.failed["error"].tolist() == ["ReducerError: r = 40 of 64 tokens: at most half can merge"]
    assert results.specs[0] == "score_functions" and "methods" in results.specs
    assert len(results.settings()) == 1


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


def test_levels_are_costs_that_several_series_reach(results: Results) -> None:
    rows = matching.merge_seeds(results.finished[results.finished["spec"] == "methods"])
    levels = matching.cost_levels(rows, by="variant", count=6)
    assert levels == sorted(levels) and len(levels) >= 3
    for level in levels:
        part = matching.at_cost(rows, level, by="variant")
        assert part["variant"].is_unique and len(part) >= 2 and "dense" not in set(part["variant"])
        assert ((part["gmacs_mean"] - level).abs() <= matching.MATCH * 0.160 + 1e-12).all()
    assert matching.cost_levels(rows[rows["variant"] == "ATS"], by="variant") == []
