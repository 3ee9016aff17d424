"""Several models in one run: for specs that compare them, and for no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ablations.run.session import Settings, preview

BOTH = ("--workload", "embedded:v1", "--model", "digits_vit_tiny digits_vit_small")

SCALING = """\
name: scaling
title: Two sizes
models: all
arms:
  - {variant: ATS, stages: [{at: 3, stack: [{name: ats, budget: {count: 20}}]}]}
"""


@pytest.fixture
def scaling(tmp_path: Path) -> Path:
    path = tmp_path / "scaling.yaml"
    path.write_text(SCALING)
    return path


def test_models_all_takes_each_and_other_specs_the_first(
    ablate: Callable[..., int], scaling: Path, spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("run", "--specs", f"{scaling} {spec_path}", *BOTH) == 0
    assert "digits_vit_small as well" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    models = {spec: [row["model"] for row in rows if row["spec"] == spec] for spec in ("scaling", "tiny")}
    assert models == {"scaling": ["digits_vit_tiny", "digits_vit_small"], "tiny": ["digits_vit_tiny"] * 4}
    small, large = (row for row in rows if row["spec"] == "scaling")
    assert small["weights_digest"] != large["weights_digest"] and small["dense_gmacs"] < large["dense_gmacs"]
    assert small["params_m"] < large["params_m"]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["model"] == "digits_vit_tiny" and [about["model"] for about in run["models"]] == BOTH[-1].split()
    assert run["calibration_images"] == 128


def test_a_second_model_that_no_spec_asks_for_is_not_opened(
    ablate: Callable[..., int], spec_path: Path, tmp_path: Path
) -> None:
    assert ablate("run", "--specs", spec_path, *BOTH) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [about["model"] for about in run["models"]] == ["digits_vit_tiny"]


def test_the_embedded_workloads_have_models_of_their_own(scaling: Path) -> None:
    trials = preview(Settings(workload="embedded:v1", specs=(str(scaling),))).trials["scaling"]
    assert [trial.model for trial in trials] == ["digits_vit_small", "digits_vit_tiny"]
    assert Settings(workload="embedded:v1").model_name == "digits_vit_small"
    assert Settings().model_name == "pairs_vit_tiny"
    assert Settings(workload="imagefolder").model_name == "deit_tiny_patch16_224"


def test_each_model_has_its_weights() -> None:
    assert Settings(model="a b", weights="x y").chosen() == [("a", "x"), ("b", "y")]
    assert Settings(model="a b").chosen() == [("a", None), ("b", None)]
    assert Settings(model="a b", weights="random").chosen() == [("a", "random"), ("b", "random")]
    assert Settings(model="a", weights="my weights.safetensors").chosen() == [("a", "my weights.safetensors")]
    assert Settings(weights="mine.safetensors").chosen() == [("pairs_vit_tiny", "mine.safetensors")]


@pytest.mark.parametrize(
    ("model", "weights", "expected"),
    [("a a", None, "twice"), ("a b", "x", "1 files for the 2 models"), ("a b", "x y z", "3 files for the 2 models")],
)
def test_models_and_weights_that_do_not_fit_are_refused(model: str, weights: str | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Settings(model=model, weights=weights)
