"""The parts of the images: disjoint, by what images show, and fixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from ablations.search.errors import SearchError
from ablations.search.parts import difference_seen, images_needed, part, workload_of
from ablations.workloads.base import Workload
from tests.search.conftest import paired


def workload(images: int, *, seed: int = 0, pixels: np.ndarray | None = None) -> Workload:
    drawn = np.random.default_rng(seed).integers(0, 256, (images, 4, 4, 1), dtype=np.uint8)
    return Workload(
        name="drawn", pixels=drawn if pixels is None else pixels, labels=np.zeros(images, np.int64),
        ids=tuple(f"{seed}/{number}" for number in range(images)), mean=(0.5,), std=(0.5,), classes=2, digest=str(seed),
    )  # fmt: skip


def test_parts_are_disjoint_nested_and_together_all_images() -> None:
    parts = part(workload(1000), None)
    assert [len(rung) for rung in parts.rungs] == [64, 192, 144] and len(parts.confirmation) == 600
    assert sorted((*parts.search, *parts.confirmation)) == list(range(1000))


def test_parts_depend_on_what_images_show_alone() -> None:
    images = workload(300)
    order = np.random.default_rng(1).permutation(300)
    shuffled = Workload(
        **{**vars(images), "pixels": images.pixels[order], "ids": tuple(f"other {number}" for number in range(300))}
    )
    search = {images.pixels[row].tobytes() for row in part(images, None).search}
    assert search == {shuffled.pixels[row].tobytes() for row in part(shuffled, None).search}


def test_copies_of_a_picture_lie_on_one_side_and_what_calibrates_on_none() -> None:
    pixels = workload(300).pixels.copy()
    pixels[150:] = pixels[:150]
    images, calibration = workload(300, pixels=pixels), workload(40, pixels=pixels[:40])
    parts = part(images, calibration)
    shown = [{pixels[row].tobytes() for row in rows} for rows in (parts.search, parts.confirmation)]
    assert shown[0] and shown[1] and not shown[0] & shown[1]
    assert not {pixels[row].tobytes() for row in range(40)} & (shown[0] | shown[1])


def test_too_few_images_are_refused_with_how_many_would_do() -> None:
    with pytest.raises(SearchError, match=r"60 images leave 36 .* about 118 tell ten points apart, 2944 two"):
        part(workload(60), None)


def test_a_part_is_a_workload_of_its_own() -> None:
    images = workload(300)
    parts = part(images, None)
    found = [workload_of(images, rows) for rows in parts.all]
    assert len({one.digest for one in found}) == len(found)
    assert found[0].ids == tuple(images.ids[row] for row in parts.rungs[0])


def test_so_many_images_tell_a_difference_apart_four_times_in_five() -> None:
    """The power of the exact test, summed over what can be drawn: 15 % disagree, 5 points lie between them."""
    images, disagree, difference = images_needed(0.05), 0.15, 0.05
    assert images == math.ceil(0.15 * (2.8015805 / 0.05) ** 2)
    assert difference_seen(images) == pytest.approx(0.05, rel=1e-2)
    better = (disagree + difference) / 2 / disagree
    power = 0.0
    for count in range(images + 1):
        chance = float(binom.pmf(count, images, disagree))
        if chance < 1e-6:
            continue
        wins = np.arange(count + 1)
        told = np.array([paired_p(int(win), count - int(win)) < 0.05 for win in wins])
        power += chance * float(binom.pmf(wins, count, better)[told].sum())
    assert power == pytest.approx(0.8, abs=0.05)


def paired_p(first: int, second: int) -> float:
    one = np.array([1.0] * first + [0.0] * second)
    return paired(one, 1.0 - one)
