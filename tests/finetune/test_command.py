"""``python -m ablations.measure.finetune``: what it tells is what a run of the weights it wrote would give."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from ablations.measure.evaluate import run_trial
from ablations.measure.finetune.__main__ import main
from ablations.measure.opening import open_context, open_subject
from ablations.trial.stages import Stages
from ablations.workloads import ImageSource
from reducers import Placement, placement_from
from reducers.placement_file import placement_text
from tests.finetune.conftest import ATS as STAGE
from tests.finetune.conftest import CPU


@pytest.mark.usefixtures("few_scenes")
def test_what_is_told_is_what_a_run_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path), "--model", "pairs_vit_tiny", "--limit", "12", "--device", "cpu", "--workers", "0"]
    recipe = ["epochs=1", "images=8", "batch=4", "holdout=0"]
    assert main([*words, "--stages", json.dumps([STAGE]), "--set", *recipe]) == 0
    told = json.loads((tmp_path / "finetune.json").read_text())["evaluation"]
    assert len(capsys.readouterr().out.splitlines()) == 4
    for moment, weights in (("before", None), ("after", str(tmp_path / "finetuned.safetensors"))):
        subject = open_subject(ImageSource(limit=12), "pairs_vit_tiny", weights=weights, batch=64)
        context = open_context(subject, CPU, cache=tmp_path / "cache")
        for what, placement in (("dense", Placement()), ("reduced", placement_from([STAGE], depth=12))):
            trial = subject.target.trial(
                spec="s", variant=what, x=None, stages=Stages.of_placement(placement), seed=0, calibrated=False
            )
            row = run_trial(trial, context).row
            assert told[moment][what] == [row["top1"], row["gmacs_mean"]]
        assert told[moment]["dense"] == pytest.approx([context.dense.top1, context.dense.gmacs], rel=1e-12)


def test_a_budget_that_is_not_known_is_refused_before_anything_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"at": [3], "stack": [{"name": "topk", "budget": {"ratio": "auto"}}]}
    words = ["--out", str(tmp_path), "--model", "pairs_vit_tiny", "--limit", "2", "--set", "target=0.5"]
    assert main([*words, "--stages", json.dumps([stage])]) == 2
    assert "write a number here" in capsys.readouterr().err
    assert list((tmp_path / "cache").glob("dense-*")) == []


@pytest.mark.usefixtures("few_scenes")
def test_a_placement_file_says_what_is_active_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "0.50.yaml"
    about = {"model": "pairs_vit_tiny", "depth": 12, "patches": 64}
    file.write_text(placement_text(placement_from([STAGE], depth=12), about, name="found", title="Found"))
    words = ["--out", str(tmp_path / "out"), "--model", "pairs_vit_tiny", "--limit", "4", "--device", "cpu"]
    recipe = ["epochs=1", "images=8", "batch=4", "holdout=0"]
    assert main([*words, "--workers", "0", "--no-evaluation", "--stages", str(file), "--set", *recipe]) == 0
    trained = json.loads((tmp_path / "out/finetune.json").read_text())["recipe"]["stages"]
    assert trained == Stages.of_placement(placement_from([STAGE], depth=12)).plain()
    file.write_text("name: x")
    assert main([*words, "--stages", str(file)]) == 2
    assert "is no placement file" in capsys.readouterr().err


def test_the_old_command_works_and_names_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune", "--out", str(tmp_path), "--limit", "2", "--reducer", "{}"])
    words = "python -m ablations.finetune is now python -m ablations.measure.finetune"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DeprecationWarning)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("ablations.finetune", run_name="__main__")
    assert words in [str(warning.message) for warning in told]
    assert ended.value.code == 2 and "--at and --reducer belong together" in capsys.readouterr().err
