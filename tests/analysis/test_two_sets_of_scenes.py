"""An OUT that holds trials on both sets of embedded scenes: those of the last run are drawn, the others named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ablations.cli.main import main as ablate
from ablations.workloads.embedded import name_of
from analysis import style
from analysis.frame import read_results
from analysis.report import write_analysis

EARLIER = Path(__file__).parents[1] / "data" / "out_3d191f9"  # four finished trials on cluttered digits
SPEC = """\
name: small
title: A small question
arms:
  - {variant: top-K, stages: [{at: 3, stack: [{name: topk, budget: {count: 20}}]}]}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an earlier version left under ``embedded``, and a run on the digit pairs of today into the same folder."""
    folder = tmp_path_factory.mktemp("both")
    shutil.copytree(EARLIER, folder / "out")
    (folder / "small.yaml").write_text(SPEC)
    words = ["--limit", "24", "--specs", str(folder / "small.yaml")]
    assert ablate(["run", "--serial", "--out", str(folder / "out"), *words]) == 0
    return folder / "out"


@pytest.mark.slow
def test_the_scenes_of_the_last_run_are_drawn_and_the_others_named(out: Path, tmp_path: Path) -> None:
    results = read_results(out)
    held = [*results.settings(), *results.left().settings()]
    assert [setting.model for setting in held] == ["pairs_vit_tiny", "digits_vit_tiny"]
    assert len({setting.data_digest for setting in held}) == 2
    text = write_analysis(results, tmp_path / "pairs").report.read_text()
    assert "digit pairs, pairs_vit_tiny, 24 images" in text
    assert text.count("cluttered digits, digits_vit_tiny, 24 images") == 1, "named, not drawn"
    for name in ("run.json", "results.parquet"):  # the earlier run was the last
        (out / name).write_bytes((EARLIER / name).read_bytes())
    text = write_analysis(read_results(out), tmp_path / "cluttered").report.read_text()
    assert "cluttered digits, digits_vit_tiny, 24 images" in text
    assert text.count("digit pairs, pairs_vit_tiny, 24 images") == 1, "named, not drawn"


def test_the_earlier_run_is_known_by_its_weights_and_its_digest() -> None:
    run = json.loads((EARLIER / "run.json").read_text())
    assert style.scenes(run["workload"], run["model"], run["weights"]) == "cluttered digits"
    assert name_of(run["workload"], run["images"], run["data_digest"]) == "embedded:v1"
    assert style.scenes("embedded", "pairs_vit_tiny", "embedded") == "digit pairs"
    assert style.scenes("embedded:v1", "digits_vit_tiny", "random") == "cluttered digits"
    assert style.scenes("imagefolder", "digits_vit_tiny", "embedded") == ""
