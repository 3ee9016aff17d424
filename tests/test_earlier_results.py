"""Results of an earlier version (tests/data/out_3d191f9) go on being read: by status, by log, and by the analysis."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ablations.cli.main import main
from analysis import tables
from analysis.__main__ import main as analyse
from analysis.facts.spec import Facts
from analysis.frame import read_results

KEPT = Path(__file__).parent / "data" / "out_3d191f9"
LARGEST = 200_000  # bytes of all its files


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A copy of the results: whatever reads them may index, draw and write there."""
    return Path(shutil.copytree(KEPT, tmp_path / "out"))


def rows() -> list[dict[str, Any]]:
    """The rows as pyarrow alone reads them."""
    return pq.read_table(KEPT / "results.parquet").to_pylist()


def test_what_is_kept_is_small_and_names_no_place_of_a_machine() -> None:
    files = [path for path in KEPT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST
    places = re.compile(rb"/(home|root|tmp|work|Users|mnt)/|[A-Z]:\\\\")
    assert [path.name for path in files if places.search(path.read_bytes())] == []
    assert {path.stem for path in files if path.suffix == ".log"} == {row["key"] for row in rows()}, (
        "logs are no litter"
    )


def test_status_counts_what_is_finished_failed_and_waiting(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(out)]) == 0
    said = capsys.readouterr().out
    planned = json.loads((KEPT / "run.json").read_text())["specs"]
    for name, about in planned.items():
        mine = [row["status"] for row in rows() if row["spec"] == name]
        finished, failed = mine.count("ok"), len(mine) - mine.count("ok")
        total = len(about["trials"])
        assert re.search(
            rf"^{name} +{total} +{finished} +{failed} +{total - finished - failed} +0$", said, re.MULTILINE
        )
    assert "4 of 12 trials finished" in said
    (failure,) = (row for row in rows() if row["status"] != "ok")
    assert failure["key"] in said and failure["error"] in said


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["key"])
def test_log_shows_the_row_and_what_was_said(
    row: dict[str, Any], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["log", str(out), row["key"][:6]]) == 0
    said = capsys.readouterr().out
    for name in ("spec", "variant", "status", "placement", "created"):
        assert str(row[name]) in said, name
    for line in (KEPT / "logs" / f"{row['key']}.log").read_text().splitlines():
        assert line in said


@pytest.mark.parametrize("compacted", [True, False], ids=["compacted", "stopped before it compacted"])
def test_the_analysis_reads_the_numbers_that_pyarrow_reads(out: Path, compacted: bool) -> None:
    if not compacted:
        (out / "results.parquet").unlink()
    results = read_results(out)
    expected = {row["key"]: row for row in rows()}
    assert set(results.trials["key"]) == set(expected) and len(results.finished) == 4
    for found in results.finished.to_dict("records"):
        row = expected[found["key"]]
        for name in ("top1", "top1_low", "top1_high", "gmacs_mean", "gmacs_std", "x", "target_gmacs", "speedup"):
            assert found[name] == row[name] or (found[name] != found[name] and row[name] is None), name
        images = pq.read_table(KEPT / "images" / f"{row['key']}.parquet").to_pandas()
        read = results.images[row["key"]]
        assert read["correct"].tolist() == images["correct"].tolist()
        assert images["correct"].mean() == pytest.approx(row["top1"])
    assert list(results.failed["error"]) == [row["error"] for row in rows() if row["error"]]
    assert results.specs == ["small", "runtime"]
    assert results.about_specs["small"]["title"] == "A small question of an earlier version"


def test_its_tables_hold_the_measured_rows(out: Path) -> None:
    results = read_results(out)
    (setting,) = results.settings()
    table = tables.measured(Facts(results.of(setting, "small"))).set_index("keys")
    for row in rows():
        if row["spec"] == "small" and row["status"] == "ok":
            found = table.loc[row["key"]]
            assert (found["top1"], found["gmacs"]) == (row["top1"], row["gmacs_mean"])
            assert found["variant"] == row["variant"]


@pytest.mark.slow
def test_its_report_is_drawn_with_figures_tables_and_words(out: Path) -> None:
    assert analyse([str(out)]) == 0
    report = (out / "report.html").read_text()
    assert "4 finished trials, 1 failed" in re.sub("<[^>]+>", "", report)
    for row in rows():
        assert row["key"][:8] in report
    assert {path.stem for path in (out / "figures").glob("*.png")} >= {"small", "runtime", "tokens_per_block"}
