"""Every example runs, is short, and prints what it shows."""

from __future__ import annotations

import os
import runpy
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
    sys.argv = [path]
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


QUICK = [path for path in EXAMPLES if path not in DEAR]


@pytest.mark.parametrize("example", QUICK, ids=lambda path: path.stem)
def test_an_example_runs(
    example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a script, though in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [str(example)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert any(word in printed for word in SHOWN), printed


@pytest.mark.slow
def test_the_examples_run_from_elsewhere() -> None:
    printed = run(QUICK)
    assert len(printed) == len(QUICK)
    assert all(any(word in text for word in SHOWN) for text in printed), printed


@pytest.mark.slow
@pytest.mark.parametrize("example", DEAR, ids=lambda path: path.stem)
def test_an_example_that_exports_runs(example: Path) -> None:
    (printed,) = run([example])
    assert any(word in printed for word in SHOWN)


def test_the_examples_are_short() -> None:
    assert [path.name for path in EXAMPLES if len(path.read_text().splitlines()) >= 40] == []
    assert len(QUICK) >= 3
