"""The format of results has one owner each: statistics, columns, names."""

from __future__ import annotations

import pandas as pd
import pytest
from scipy.stats import binom, binomtest, norm

from ablations.records import columns
from ablations.records.paired import bonett_price, holm, mcnemar
from ablations.records.wilson import Z95, wilson
from ablations.run.reproduce import MAY_DIFFER
from analysis import frame, tables


@pytest.mark.parametrize(
    ("first", "second"), [(0, 0), (0, 1), (0, 7), (3, 3), (20, 9), (9, 20), (300, 250), (6000, 6200), (25_000, 24_000)]
)
def test_mcnemars_test_is_scipys_binomial_test(first: int, second: int) -> None:
    p, mid = mcnemar(first, second)
    count, less = first + second, min(first, second)
    assert p == pytest.approx(float(binomtest(first, count).pvalue) if count else 1.0, rel=1e-10)
    assert mid == pytest.approx(
        min(1.0, float(2 * binom.cdf(less, count, 0.5) - binom.pmf(less, count, 0.5))), rel=1e-10
    )


def test_the_intervals_that_rows_record_are_those_of_95_percent() -> None:
    """8 of 10, as scipy has it; 15 and 5 of 100 images that one side alone gets right, by hand."""
    assert norm.ppf(0.975) == pytest.approx(Z95, rel=1e-15)
    assert wilson(8, 10) == pytest.approx((0.4901624715, 0.9433178485), abs=1e-9)
    first, second = 16 / 102, 6 / 102
    half = 1.959963984540054 * ((first + second - (first - second) ** 2) / 102) ** 0.5
    assert bonett_price(15, 5, 100) == pytest.approx((10 / 102 - half, 10 / 102 + half), abs=1e-12)
    assert bonett_price(15, 5, 100) == pytest.approx((0.0099424, 0.1861360), abs=1e-7)
    assert bonett_price(0, 0, 1) == pytest.approx((-0.9239359, 0.9239359), abs=1e-7), "no more than all images"
    assert bonett_price(3, 0, 3)[1] == 1.0 and bonett_price(0, 3, 3)[0] == -1.0


@pytest.mark.parametrize("images", [*range(1, 120), 928, 49_999, 50_000])
def test_no_rounding_pushes_an_interval_past_its_share(images: int) -> None:
    assert wilson(0, images)[0] == 0.0 and wilson(images, images)[1] == 1.0
    for right in {0, 1, images // 3, images // 2, images - 1, images}:
        low, high = wilson(right, images)
        assert low <= right / images <= high and low < high


def test_holms_correction_by_hand() -> None:
    """The smallest counts as often as there are tests, the next once less; none is below one before, none above 1."""
    assert holm([0.022, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.01, 0.6, 0.02]) == pytest.approx([1.0, 0.04, 1.0, 0.06])
    assert holm([0.7]) == [0.7] and holm([1.0, 1.0]) == [1.0, 1.0]


def test_of_very_many_disagreements_the_test_needs_no_number_that_a_float_cannot_hold() -> None:
    assert mcnemar(5000, 0)[0] == 0.0 and 0 < mcnemar(1000, 0)[0] < 1e-300


def test_the_analysis_takes_every_column_of_a_row_as_what_it_holds() -> None:
    taken = [*frame.REQUIRED, *frame.NUMBERS, *frame.WORDS, *frame.FLAGS, *frame.LISTS, frame.FINETUNED]
    assert sorted(taken) == sorted(columns.ROW)
    row = dict.fromkeys(frame.REQUIRED, "s")
    assert set(frame.tidy(pd.DataFrame([row]))) >= set(columns.ROW)


def test_whoever_names_columns_of_a_row_names_columns_that_it_has() -> None:
    assert {*tables.COPIED, *MAY_DIFFER, *frame.REQUIRED} <= columns.ROW.keys()
