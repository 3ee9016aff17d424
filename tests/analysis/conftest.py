"""Synthetic results shared by the tests of the analysis."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from PIL import Image

from analysis import page, plots, style
from analysis.facts.outcomes import with_answers
from analysis.facts.overview import Overview
from analysis.facts.spec import Facts
from analysis.frame import Results, read_results
from analysis.plots import Drawn
from analysis.plots.shared import shared_figures
from analysis.questions import question_of
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


def plainly(drawn: Drawn, folder: Path, name: str) -> tuple[list[Path], str]:
    """In place of ``page.save_figure``: small files of the same names, at a hundredth of the time."""
    text = f'<svg xmlns="http://www.w3.org/2000/svg"><title>{escape(drawn.title)}</title></svg>'
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    Image.new("RGB", (1, 1)).save(png)
    svg.write_text(text, encoding="utf-8")
    return [png, svg], text


@pytest.fixture
def plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a report says: figures are made, but not laid out and written; that has tests of its own."""
    monkeypatch.setattr(page, "save_figure", plainly)


@pytest.fixture(scope="session")
def written(results: Results) -> Written:
    """The report of the whole run, its figures plain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "save_figure", plainly)
        return write_analysis(results)


@pytest.fixture(scope="session")
def drawn(results: Results, answered: pd.DataFrame, looks: dict[str, style.Look]) -> list[Drawn]:
    """Every figure of the whole run, under a title as long as they get."""
    subtitle = "cluttered digits, some_model, 400 images, off the shelf\nONLY 48 IMAGES: too few to rank methods"
    pictures = page.read_samples(results.folder / "samples")
    scene = plots.Scene(looks, subtitle, pictures, "digits_vit_small", imagenet=True, count=400)
    found = shared_figures(Overview(answered[answered["model"] == "digits_vit_small"], results.images), scene)
    for _, rows in answered.groupby("spec", sort=False):
        facts = Facts(rows, results.images)
        found += question_of(facts.kind).figures(facts, "A title", scene)
    return found


@pytest.fixture(scope="session")
def looks(results: Results) -> dict[str, style.Look]:
    return style.assign_looks(results.finished, order=["methods"])


@pytest.fixture(scope="session")
def answered(results: Results) -> pd.DataFrame:
    """The finished trials with the answers of every image."""
    return with_answers(results.finished, results.images)
