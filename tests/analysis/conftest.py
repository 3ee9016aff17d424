"""Synthetic results shared by the tests of the analysis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest

from analysis import style
from analysis.frame import Results, read_results
from analysis.outcomes import with_answers
from analysis.report import Written, write_analysis
from tests.analysis.runs import whole_run
from tests.analysis.synthetic import Maker


@pytest.fixture(autouse=True)
def no_settings_leak() -> Iterator[None]:
    """A figure must leave matplotlib's settings as it found them."""
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(Maker()).save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def results(out: Path) -> Results:
    return read_results(out)


@pytest.fixture(scope="session")
def written(results: Results) -> Written:
    return write_analysis(results)


@pytest.fixture(scope="session")
def looks(results: Results) -> dict[str, style.Look]:
    return style.assign_looks(results.finished, order=["methods"])


@pytest.fixture(scope="session")
def answered(results: Results) -> pd.DataFrame:
    """The finished trials with the answers of every image."""
    return with_answers(results.finished, results.images)
