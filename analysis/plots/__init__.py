"""The figures: one a file, each a pure function from data frames to a matplotlib ``Figure``; here, which ones a spec
gets.

Every spec gets accuracy against GMACs, whatever its name, and paired differences at equal cost where its series meet;
some get figures made for their question. A new figure is one file here and one line in ``SPECIAL``, or in ``shared``
where it belongs to no single spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from analysis.plots import class_token as _class_token
from analysis.plots import difference as _difference
from analysis.plots import finetuning as _finetuning
from analysis.plots import k_effect as _k_effect
from analysis.plots import pareto as _pareto
from analysis.plots import placement as _placement
from analysis.plots import published_points as _published
from analysis.plots import runtime as _runtime
from analysis.plots import sampling as _sampling
from analysis.plots import scaling as _scaling
from analysis.plots import single_multi as _single_multi
from analysis.plots import stacking as _stacking
from analysis.plots import tradeoff as _tradeoff
from analysis.plots import transfer as _transfer
from analysis.plots.base import Drawn, Sample, Scene
from analysis.plots.shared import overview, shared_figures, spec_adaptivity

Maker = Callable[[str, str, pd.DataFrame, Scene], list[Drawn]]


def _tradeoff_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    heading = f"{title}: accuracy against cost"
    figure = _tradeoff.tradeoff(trials, looks=scene.looks, title=heading, subtitle=scene.subtitle)
    return [Drawn(name, heading, _tradeoff.caption(trials), figure)]


def _difference_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    found = _difference.find(trials, _stacking.base_variant(trials) if name == "evit_stacking" else None)
    if not found:
        return []
    title = f"{title}: differences at equal cost"
    figure = _difference.difference(found, trials, looks=scene.looks, title=title, subtitle=scene.subtitle)
    text, table = _difference.caption(found, trials), _difference.table(found)
    return [Drawn(f"{name}_difference", title, text, figure, table)]


def _k_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    counts = trials.loc[~trials["dense"], "x"].dropna()
    if counts.nunique() < 2 or (counts % 1 != 0).any() or (counts < 1).any():  # a share is no K
        return []
    title = f"{title}: accuracy and cost against K"
    figure = _k_effect.k_effect(trials, looks=scene.looks, title=title, subtitle=scene.subtitle)
    return [Drawn(f"{name}_effect", title, _k_effect.CAPTION, figure)]


def _placement_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if trials.loc[~trials["dense"], "placement"].nunique() < 2:
        return []
    title = f"{title}: accuracy by placement at equal cost"
    figure = _placement.placement(trials, title=title, subtitle=scene.subtitle)
    return [Drawn(f"{name}_by_block", title, _placement.caption(trials), figure)]


def _class_token_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if trials.loc[~trials["dense"], "class_kept"].dropna().empty:
        return []
    title = f"{title}: accuracy, and how often it was dropped"
    figure = _class_token.class_token(trials, looks=scene.looks, title=title, subtitle=scene.subtitle)
    return [Drawn(f"{name}_dropped", title, _class_token.CAPTION, figure)]


def _stacking_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    base = _stacking.base_variant(trials)
    if base is None or not _stacking.gains(trials):
        return []
    title = f"{title}: what the stack changes"
    figure = _stacking.stacking(trials, looks=scene.looks, title=title, subtitle=scene.subtitle)
    return [Drawn(f"{name}_gain", title, _stacking.CAPTION.format(base=base), figure)]


def _pareto_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if trials.loc[~trials["dense"], "variant"].nunique() < 2:
        return []
    title = f"{title}: the Pareto front"
    figure = _pareto.pareto(trials, looks=scene.looks, title=title, subtitle=scene.subtitle)
    return [Drawn(f"{name}_pareto", title, _pareto.CAPTION, figure)]


def _sampling_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if trials[~trials["dense"]].empty:
        return []
    heading = f"{title}: accuracy against cost"
    figure = _sampling.sampling(trials, looks=scene.looks, title=heading, subtitle=scene.subtitle)
    return [Drawn(name, heading, _sampling.caption(trials), figure)]


def _single_multi_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    heading = f"{title}: accuracy against cost"
    figure = _single_multi.single_multi(trials, looks=scene.looks, title=heading, subtitle=scene.subtitle)
    return [Drawn(name, heading, _single_multi.CAPTION, figure)]


def _scaling_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if trials["model"].nunique() < 2:
        return _tradeoff_figure(name, title, trials, scene)
    heading = f"{title}: one reduction, several models"
    names = _scaling.models(trials)
    figure = _scaling.scaling(trials, title=heading, subtitle=scene.subtitle.replace(scene.model, ", ".join(names), 1))
    return [Drawn(name, heading, _scaling.CAPTION, figure)]


def _published_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if trials[~trials["dense"]].empty or not trials["dense_top1"].notna().any():
        return []
    title, same = "Table 1 of the ATS paper, and ours beside it", scene.imagenet
    figure = _published.published_points(trials, same_data=same, title=title, subtitle=scene.subtitle)
    text = _published.caption(trials, same_data=same, model=scene.model, images=scene.count)
    return [Drawn(f"{name}_published", title, text, figure)]


def _runtime_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if _runtime.timed(trials).empty:
        return []
    title = f"{title}: the clock against the count"
    figure = _runtime.runtime(trials, looks=scene.looks, title=title, subtitle=scene.subtitle)
    return [Drawn(f"{name}_speed", title, _runtime.caption(trials), figure)]


def _finetuning_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if trials[~trials["dense"]].empty:
        return _tradeoff_figure(name, title, trials, scene)
    heading = f"{title}: finetuned and off the shelf"
    figure = _finetuning.finetuning(trials, looks=scene.looks, title=heading, subtitle=scene.subtitle)
    return [Drawn(name, heading, _finetuning.CAPTION, figure)]


def _transfer_figure(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    if trials[~trials["dense"]].empty:
        return _tradeoff_figure(name, title, trials, scene)
    heading = f"{title}: finetuned at one budget, evaluated at others"
    figure = _transfer.transfer(trials, title=heading, subtitle=scene.subtitle)
    return [Drawn(name, heading, _transfer.CAPTION, figure)]


GENERAL: tuple[Maker, ...] = (_tradeoff_figure, _difference_figure)
SPECIAL: Mapping[str, tuple[Maker, ...]] = {
    "k_values": (_tradeoff_figure, _k_figure, _difference_figure),
    "sampling_method": (_sampling_figure, _difference_figure),
    "class_token": (_class_token_figure, _difference_figure),
    "stage_placement": (_placement_figure, _tradeoff_figure),
    "single_multi_stage": (_single_multi_figure, _difference_figure),
    "evit_stacking": (_stacking_figure, _difference_figure),
    "model_scaling": (_scaling_figure,),
    "runtime": (_runtime_figure, _tradeoff_figure),
    "adaptivity": (_tradeoff_figure, spec_adaptivity),
    "methods": (_pareto_figure, _tradeoff_figure, _difference_figure, _published_figure),
    "finetuning": (_finetuning_figure, _difference_figure),
    "budget_transfer": (_transfer_figure,),
}


def spec_figures(name: str, title: str, trials: pd.DataFrame, scene: Scene) -> list[Drawn]:
    """The figures of a spec for which the data are there, the one that answers its question first."""
    return [drawn for make in SPECIAL.get(name, GENERAL) for drawn in make(name, title, trials, scene)]


__all__ = ["Drawn", "Sample", "Scene", "overview", "shared_figures", "spec_figures"]
