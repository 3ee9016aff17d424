"""The format of results has one owner each: statistics, columns, names."""

from __future__ import annotations

import pandas as pd
import pytest
from scipy.stats import binom, binomtest

from ablations.records import columns
from ablations.records.paired import mcnemar
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


def test_of_very_many_disagreements_the_test_needs_no_number_that_a_float_cannot_hold() -> None:
    assert mcnemar(5000, 0)[0] == 0.0 and 0 < mcnemar(1000, 0)[0] < 1e-300


def test_the_analysis_takes_every_column_of_a_row_as_what_it_holds() -> None:
    taken = [*frame.REQUIRED, *frame.NUMBERS, *frame.WORDS, *frame.FLAGS, *frame.LISTS, frame.FINETUNED]
    assert sorted(taken) == sorted(columns.ROW)
    row = dict.fromkeys(frame.REQUIRED, "s")
    assert set(frame.tidy(pd.DataFrame([row]))) >= set(columns.ROW)


def test_whoever_names_columns_of_a_row_names_columns_that_it_has() -> None:
    assert {*tables.COPIED, *MAY_DIFFER, *frame.REQUIRED} <= columns.ROW.keys()
