"""The figure that opens the README: what it names, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.facts.spec import Facts
from analysis.frame import AnalysisError, Results, reducer_names
from analysis.plots import opening
from analysis.report import write_opening


@pytest.fixture
def facts(results: Results, answered: pd.DataFrame) -> Facts:
    return Facts(answered[answered["kind"] == "front"], results.images)


def test_each_method_is_the_series_in_which_it_acts_alone_and_does_best_at_the_pictured_cost(facts: Facts) -> None:
    found = opening.variants(facts)
    assert "ats" in found and len(found) > 2
    near = facts.rows.assign(off=(facts.rows["gmacs_mean"] / facts.dense - opening.AT).abs())
    near = near[near["off"] < opening.NEAR].sort_values("off", kind="stable").drop_duplicates("variant")
    for name, variant in found.items():
        rows = near[near["variant"] == variant]
        assert len(rows), "there is a trial of it near the pictured cost"
        assert not name or set(map(tuple, map(reducer_names, rows["reducer"]))) == {(name,)}
    rivals = near[near["reducer"].map(reducer_names).map(tuple) == ("ats",)]
    assert rivals.loc[rivals["top1"].idxmax(), "variant"] == found["ats"]


def test_the_figure_is_written(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "opening.png"
    write_opening(results, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AnalysisError, match="cannot be written to"):
        write_opening(results, tmp_path / "none" / "opening.png")


def test_without_a_spec_of_many_methods_it_is_refused(results: Results, tmp_path: Path) -> None:
    few = replace(results, trials=results.trials[results.trials["kind"] != "front"])
    with pytest.raises(AnalysisError, match="spec `methods`"):
        write_opening(few, tmp_path / "no.png")
