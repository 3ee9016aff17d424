"""Same key, same machine: same numbers, bit for bit, in any order and however many trials run at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablations.store.store import Store
from tests.ablations.runs import PATIENCE, assert_same_results, run

QUESTIONS = ("methods", "score_functions", "evit_stacking")  # calibrated, adaptive, random, stacked
SMALL = ("--model", "pairs_vit_tiny", "--limit", "60", "--batch", "16")


@pytest.mark.slow
def test_four_workers_find_what_one_process_finds_in_the_opposite_order(tmp_path: Path) -> None:
    """Shipped specs, so that twenty methods and their calibration take part."""
    one, four = tmp_path / "one", tmp_path / "four"
    for words in (("--serial", "--out", one, "--specs", *QUESTIONS),
                  ("--workers", "4", "--out", four, "--specs", *reversed(QUESTIONS))):  # fmt: skip
        status, printed = run("run", *SMALL, *words, patience=3 * PATIENCE)
        assert status == 0, printed
    keys = Store(one).finished()
    assert len(keys) > 150 and keys == Store(four).finished()
    assert_same_results(four, one, keys)
