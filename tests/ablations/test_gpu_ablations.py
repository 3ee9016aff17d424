"""The ablations from a folder, for a GPU with little beside it: tried on a CPU, whose predictions come out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu_ablations import PLAN, PREDICTIONS, SPECS, main
from tests.ablations.runs import SPEC
from tests.without import run_without

LACKING = (
    "ray", "fvcore", "pydantic", "optuna", "pyarrow", "yaml", "pandas", "rich", "sklearn", "scipy", "matplotlib",
    "seaborn", "jinja2",
)  # fmt: skip


def elsewhere(folder: Path) -> str:
    """The program of a machine that has torch and timm alone."""
    return f"from benchmarks.gpu_ablations import main\nsys.exit(main(['run', {str(folder)!r}, '--device', 'cpu']))\n"


@pytest.mark.slow
def test_the_ablations_run_from_a_folder_with_torch_and_timm_alone(tmp_path: Path) -> None:
    spec, made = tmp_path / "tiny.yaml", tmp_path / "made"
    spec.write_text(SPEC)
    words = ["--results", str(tmp_path / "results"), "--specs", str(spec), "k_values", "--limit", "12"]
    assert main(["prepare", "--out", str(made), *words]) == 0
    folder = tmp_path / "there"
    shutil.move(made, folder)  # nothing in it says where it was made
    shutil.rmtree(tmp_path / "results")
    done = run_without(LACKING, elsewhere(folder), timeout=1500)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "found" / "cpu.json").read_text())
    trials = json.loads((folder / PLAN).read_text())["trials"]
    assert sum(spec["trials"] for spec in summary["specs"]) == len(trials) == 4 + 16
    assert summary["failed"] == summary["code_changed"] == 0 and summary["device"].startswith("cpu")
    for spec_found in summary["specs"]:
        assert spec_found["agreement_lowest"] == 1 and spec_found["alike"] == spec_found["trials"]
        assert spec_found["top1_furthest"] == spec_found["gmacs_furthest"] == 0
        assert spec_found["minutes"] > 0
    assert "| k_values | 16 | 100.000 |" in done.stdout and "on the CPU" in done.stdout

    with np.load(folder / PREDICTIONS) as arrays:
        changed = {name: np.array(arrays[name]) for name in arrays.files}
    first = next(iter(changed))
    changed[first][:3] = (changed[first][:3] + 1) % 10
    np.savez(folder / PREDICTIONS, **changed)
    again = run_without(LACKING, elsewhere(folder), timeout=1500)
    assert again.returncode == 0, again.stderr
    summary = json.loads((folder / "found" / "cpu.json").read_text())
    assert min(spec["agreement_lowest"] for spec in summary["specs"]) == pytest.approx(9 / 12), "and it is told"
    assert sum(spec["alike"] for spec in summary["specs"]) == 19
    assert "trials" not in again.stderr, "nothing was computed again"


def test_the_specs_that_are_promised_are_those_that_run() -> None:
    assert SPECS == ("score_functions", "stage_placement", "class_token", "k_values")
