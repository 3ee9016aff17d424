"""Facts of trials, asked for answers, figures, and lines beside print, as the report asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.facts.spec import Facts
from analysis.plots import Drawn, Scene
from analysis.questions import Question, question_of
from analysis.questions.beside import beside
from analysis.style import Look
from analysis.words import Finding

WORDS = {"title": "A title", "subtitle": "cluttered digits, some_model, 400 images, off the shelf"}


def question(trials: pd.DataFrame) -> Question:
    return question_of(Facts(trials).kind)


def answers(trials: pd.DataFrame) -> list[Finding]:
    return question(trials).answers(Facts(trials))


def beside_print(trials: pd.DataFrame, *, patches: int | None = None) -> pd.DataFrame:
    return beside(question(trials), Facts(trials), patches=patches)


def draw(
    figure: Callable[[Facts, Scene, str], Figure],
    trials: pd.DataFrame,
    looks: Mapping[str, Look] | None = None,
    *,
    subtitle: str = WORDS["subtitle"],
    imagenet: bool = False,
) -> Figure:
    return figure(Facts(trials), Scene(looks or {}, subtitle, imagenet=imagenet), WORDS["title"])


def figures(trials: pd.DataFrame, images: Mapping[str, pd.DataFrame], title: str, scene: Scene) -> list[Drawn]:
    return question(trials).figures(Facts(trials, images), title, scene)
