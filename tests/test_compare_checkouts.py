"""The comparison of two checkouts: the same tree agrees with itself, and one changed constant is told."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "compare_checkouts.py"
CONSTANT, OTHER = "0x94D049BB133111EB", "0x94D049BB133111ED"  # of the hash that draws random numbers


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_checkouts", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_checkouts", module)  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def compare(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the packages in which one constant is another."""
    for package in ("reducers", "ablations"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (place,) = (path for path in (tmp_path / "reducers").rglob("*.py") if CONSTANT in path.read_text(encoding="utf-8"))
    place.write_text(place.read_text(encoding="utf-8").replace(CONSTANT, OTHER), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_checkout_agrees_with_itself_and_disagrees_with_one_whose_constant_changed(
    changed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kept = tmp_path_factory.mktemp("kept")
    part = ("--only", "models", "random", "--keep", str(kept))
    same = compare(str(ROOT), str(ROOT), *part)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "quantities are the same" in same.stdout
    other = compare(str(ROOT), str(changed), *part)
    assert other.returncode == 1, other.stdout + other.stderr
    assert "random: random | class / logits: " in other.stdout, "the first that was computed"
    rows = {
        row.split()[0]: row.split()[1:4] for row in other.stdout.splitlines() if row.startswith(("models", "random"))
    }
    assert rows["models"][2] == "0" and int(rows["random"][2]) > 50
    assert " old  random" not in other.stdout, "the old side was kept"


def test_a_module_of_another_checkout_than_the_one_that_was_asked_for_is_refused(tmp_path, program) -> None:
    assert program.own("ablations", ROOT).__file__
    with pytest.raises(ImportError, match="ablations came from"):
        program.own("ablations", tmp_path)


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    for given in (str(tmp_path), "no-such-commit"):
        refused = compare(given, str(ROOT))
        assert refused.returncode == 2
        assert "could not compare" in refused.stdout


NAN = float("nan")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), ""),
        (torch.tensor([0.0]), torch.tensor([-0.0]), "zeros of another sign"),
        (torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4.5]), r"1 of 2 entries, by up to 0\.5 \(largest value 4\)"),
        (torch.tensor([1.0]), torch.tensor([NAN]), "became NaN"),
        (torch.zeros(2), torch.zeros(2, 1), r"float32 \[2\] became float32 \[2, 1\]"),
        (torch.zeros(2), torch.zeros(2).double(), r"float32 \[2\] became float64 \[2\]"),
        (torch.tensor([1, 2]), torch.tensor([2, 2]), "1 of 2 entries"),
        (torch.zeros(0, 3), torch.zeros(0, 3), ""),
        (["a", "b"], ["b", "a"], "became"),
        ("none", torch.zeros(1), "became"),
    ],
)
def test_two_quantities_are_the_same_to_the_last_bit_or_their_difference_is_told(old, new, told, program) -> None:
    found = program.difference(old, new)
    assert re.search(told, found) if told else found == ""


def test_a_quantity_on_one_side_alone_and_another_exception_differ(tmp_path: Path, program: ModuleType) -> None:
    for side, message in (("old", "ValueError: a"), ("new", "ValueError: b")):
        book = program.Book(tmp_path, "part")
        book.put("tensor", torch.ones(2))
        book.put("zero", torch.tensor(0.0 if side == "old" else -0.0))
        book.put("x / raised", message)
        book.put(f"of {side}", torch.ones(1))
        (tmp_path / side).mkdir()
        book.write(tmp_path / side)
    result = program.compared("part", tmp_path)
    assert result.quantities == 5 and result.raised == 1 and result.zeros == ["zero"]
    assert set(result.differing) == {"x / raised", "of old", "of new"}
    assert program.report([result], 1.0) == 1
