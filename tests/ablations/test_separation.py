"""What the embedded workload is for: ordinary methods, off the shelf and at equal cost, differ on it."""

from __future__ import annotations

import numpy as np
import pytest

from ablations.measure.separation import METHODS, ORACLE, PAIRED, SHARES, Separation, measure, table
from ablations.records.paired import ALPHA


def made(**right: list[bool]) -> Separation:
    """The same answers at every share; methods that are not named are never right."""
    wrong = np.zeros(40, dtype=bool)
    answers = {(name, share): np.array(right.get(name, wrong)) for name in (*METHODS, ORACLE) for share in SHARES}
    return Separation("embedded", "some_vit", ~wrong, answers, dict.fromkeys(answers, 0.5))


def test_pairs_are_told_apart_by_the_scenes_on_which_they_disagree() -> None:
    half, most = [True] * 20 + [False] * 20, [True] * 36 + [False] * 4
    found = made(ATS=half, ToMe=half, EViT=most)
    pairs = found.pairs(0.5)
    assert len(pairs) == 6 and pairs["ATS", "ToMe"] == 1
    assert pairs["ATS", "EViT"] < ALPHA and pairs["top-K", "EViT"] < pairs["ATS", "EViT"]
    assert found.span(0.6) == pytest.approx(0.9)
    text = "\n".join(table(found))
    assert "| EViT | 90.0 (76.9 to 96.0) at 0.500 | 90.0" in text and "5 are told apart" in text.replace("\n", " ")


@pytest.mark.slow
def test_the_digit_pairs_tell_methods_apart_and_the_cluttered_digits_hardly() -> None:
    found, before = measure("embedded", limit=960), measure("embedded:v1", model="digits_vit_tiny", limit=360)
    told = {share: sum(p < ALPHA for p in found.pairs(share).values()) for share in SHARES}
    assert max(told.values()) >= 3 and sum(p < ALPHA for p in before.pairs(0.5).values()) <= 1
    for share in SHARES:
        assert found.span(share) >= 0.15
        assert found.correct[ORACLE, share].mean() >= found.dense.mean() - 0.04
        assert all(abs(found.cost[name, share] - share) < 0.02 for name in PAIRED)
