"""Every example runs, is short, and prints what it shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DEAR = [path for path in EXAMPLES if "onnx" in path.stem]
SHOWN = ("GMACs", "tokens")  # one of them, in every example
IN_TURN = """
import runpy, sys
for path in sys.argv[1:]:
    print("<<<", path)
    runpy.run_path(path, run_name="__main__")
"""


def run(examples: list[Path]) -> list[str]:
    """What each example prints; one process for all, as importing torch takes longer than most of them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, *examples],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("<<<")[1:]


def test_the_examples_run() -> None:
    examples = [path for path in EXAMPLES if path not in DEAR]
    printed = run(examples)
    assert len(printed) == len(examples) >= 3
    assert all(any(word in text for word in SHOWN) for text in printed), printed


@pytest.mark.slow
def test_the_example_that_exports_runs() -> None:
    (printed,) = run(DEAR)
    assert any(word in printed for word in SHOWN)


def test_the_examples_are_short() -> None:
    assert [path.name for path in EXAMPLES if len(path.read_text().splitlines()) >= 40] == []
