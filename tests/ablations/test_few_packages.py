"""What runs where few packages are installed, and what says which one it lacks (docs/deployment.md)."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.ablations.runs import SPEC, TINY
from tests.without import command_without

PICTURES = ("pandas", "scipy", "seaborn", "matplotlib", "jinja2")
RUN = ("run", "--serial", *TINY)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


@pytest.mark.slow
def test_a_spec_runs_without_ray_rich_and_what_draws(spec: Path, tmp_path: Path) -> None:
    lacking = ("ray", "rich", "fvcore", *(name for name in PICTURES if name != "scipy"))  # scikit-learn needs scipy
    done = command_without(lacking, *RUN, "--specs", spec, "--out", tmp_path / "out", timeout=300)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "out" / "results.parquet")["status"].to_pylist() == ["ok"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pydantic", "pyarrow", "yaml"])
def test_without_what_reads_specs_or_writes_results_a_run_says_what_to_install(
    package: str, spec: Path, tmp_path: Path
) -> None:
    done = command_without([package], *RUN, "--specs", spec, "--out", tmp_path / "out", timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    name = {"yaml": "pyyaml"}.get(package, package)
    assert f"error: this command needs {package}, which is not installed: `pip install {name}`" in done.stderr
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_a_command_says_which_package_it_lacks(tmp_path: Path) -> None:
    done = command_without(["pyarrow"], "status", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: this command needs pyarrow, which is not installed: `pip install pyarrow`\n"


@pytest.mark.slow
def test_a_method_is_trained_and_compared_without_pydantic_and_pyarrow(tmp_path: Path) -> None:
    lacking = ("ray", "pydantic", "pyarrow", "pandas", "rich", "fvcore")
    recipe = ("--set", "epochs=1", "images=8", "batch=4", "holdout=0", "warmup=0")
    words = ("train", "evit", "--model", "pairs_vit_tiny", "--limit", "6", "--out", tmp_path / "out", *recipe)
    done = command_without(lacking, *words, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "train").glob("*/train.json"))) == 1
