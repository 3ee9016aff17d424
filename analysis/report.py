"""The whole analysis of one output folder: figures, tables, and the answers that open the report."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pandas as pd

from ablations.records import names
from ablations.records.kinds import KINDS
from ablations.records.storage import FULL
from analysis import caveats, findings, page, published, style, tables
from analysis.facts.clips import ClipGrid
from analysis.facts.outcomes import with_answers
from analysis.facts.overview import MANY, Overview
from analysis.facts.spec import Facts
from analysis.features import feature_tables
from analysis.frame import AnalysisError, Results, Setting
from analysis.page import read_samples, safe
from analysis.plots import Drawn, Scene
from analysis.plots.opening import opening
from analysis.plots.shared import shared_figures
from analysis.questions import question_of
from analysis.questions.beside import beside
from analysis.words import Finding

log = logging.getLogger(__name__)

REFUSED = {  # why a folder does not take a report, all of which another folder mends
    *(errno.EACCES, errno.EPERM, errno.EROFS, *FULL),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE),
}


@dataclass(frozen=True)
class Written:
    """What an analysis produced: the report, the files beside it, and what it had to leave out."""

    report: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]
    skipped_specs: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """One spec in the report: its verdict and a few rows, and everything behind them."""

    name: str
    anchor: str
    title: str
    question: str
    about: str
    findings: list[Finding]
    figures: list[dict[str, Any]]
    verdict: str
    few: pd.DataFrame
    table: pd.DataFrame
    reasons: list[str]  # a row of the table each: why it missed its target, or ""
    beside: pd.DataFrame | None
    published: pd.DataFrame | None
    note: str
    caveats: list[str]
    failed: int
    rows: list[dict[str, Any]]  # of the table of all methods


@dataclass(frozen=True)
class Part:
    """One setting in the report: its sections and the figures that belong to all of them."""

    heading: str
    anchor: str
    cautions: list[str]
    limits: list[str]
    sections: list[Section]
    shared: list[dict[str, Any]]
    everything: list[dict[str, Any]]
    shared_findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _Desk:
    """Where the parts of one report are written."""

    results: Results
    looks: Mapping[str, style.Look]
    folders: Mapping[str, Path]
    files: dict[str, list[Path]]

    def data(self, setting: Setting) -> str:
        """The image folder's own name: where it lies is nobody's business."""
        data = self.results.run.get("data")
        return Path(data).name if isinstance(data, str) and setting.workload == "imagefolder" else ""

    def embed(self, drawn: list[Drawn], prefix: str) -> list[dict[str, Any]]:
        return [page.embed(one, prefix, self.folders, self.files) for one in drawn]


def write_analysis(results: Results, to: Path | None = None) -> Written:
    """Write figures/, tables/ and report.html into a folder: by default the one that the results came from.
    AnalysisError, before anything is drawn where that can be known, if nothing can be written there.
    """
    home = results.folder if to is None else to
    try:
        return _write(results, home)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise AnalysisError(
            f"the report cannot be written to {home} ({error}); write it elsewhere: "
            f"python -m analysis {results.folder} --to FOLDER"
        ) from error


def _write(results: Results, home: Path) -> Written:
    folders = {name: home / name for name in (names.FIGURES, names.TABLES)}
    for folder in (home, *folders.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # drawing takes minutes: is it to be had for nothing?
            pass
    trials = results.finished
    looks = style.assign_looks(trials, order=list(dict.fromkeys(trials.loc[trials["kind"].isin(MANY), "spec"])))
    desk = _Desk(results, looks, folders, {name: [] for name in folders})
    everything = {setting: with_answers(results.of(setting), results.images) for setting in results.settings()}
    main = [setting for setting in everything if not _aside(setting, everything, results)]
    main, others = _of_last_run(main, results)
    parts = []
    for number, setting in enumerate(main):
        prefix = f"{setting.slug}-" if len(main) > 1 else ""  # one setting, the usual case: plain file names
        parts.append(_part(desk, setting, everything, prefix, f"p{number + 1}"))
    features = feature_tables(results)
    for one in features:
        path = folders[names.TABLES] / f"{one.anchor}.csv"
        path.write_text(one.numbers.to_csv(index=False), encoding="utf-8")
        desk.files[names.TABLES].append(path)
    told = {*results.finished["spec"], *results.features["spec"]}
    skipped = tuple(name for name in results.specs if name not in told)
    for name in skipped:
        log.warning("spec %s has no finished trial: no figure and no table", name)
    out = home / names.REPORT
    left = results.left()
    said = [*(_named(setting, results) for setting in others), *(_named(setting, left) for setting in left.settings())]
    out.write_text(page.render(results, parts, skipped, said, features), encoding="utf-8")
    return Written(out, tuple(desk.files[names.FIGURES]), tuple(desk.files[names.TABLES]), skipped)


def write_opening(results: Results, path: Path) -> None:
    """The figure that opens a README, as a PNG file: of the spec of many methods, in the setting of the last run.
    AnalysisError if there is none, or the file cannot be written.
    """
    main, _ = _of_last_run(results.settings(), results)
    for setting in main:
        trials = with_answers(results.of(setting), results.images)
        rows = trials[trials["kind"] == "front"]
        if rows.empty:
            continue
        looks = style.assign_looks(results.finished, order=list(dict.fromkeys(rows["spec"])))
        pictures = read_samples(results.folder / names.SAMPLES)
        figure = opening(
            Facts(rows, results.images), Scene(looks, style.describe(setting, rows), pictures, setting.model)
        )
        try:
            figure.savefig(path, format="png", dpi=120)
        except OSError as error:
            raise AnalysisError(f"the figure cannot be written to {path} ({error}); name another file") from error
        return
    raise AnalysisError("no spec of many methods was run last (the spec `methods` is one): there is no opening figure")


def _of_last_run(main: list[Setting], results: Results) -> tuple[list[Setting], list[Setting]]:
    """The settings of the run that was last, and the others: by its record, else by which trial finished last."""
    models = results.run.get("models")
    about = [one for one in models if isinstance(one, Mapping)] if isinstance(models, list) else []
    last = {(one.get("weights_digest"), one.get("data_digest")) for one in about}
    own = [one for one in main if (one.weights_digest, one.data_digest) in last]
    if not own and main:
        created = {setting: max(results.of(setting)["created"]) for setting in main}
        own = [one for one in main if created[one] == max(created.values())]
    return own, [one for one in main if one not in own]


def _named(setting: Setting, results: Results) -> str:
    """A setting that is not shown, in words."""
    trials = results.of(setting)
    count = f"{len(trials)} trial{'s' if len(trials) > 1 else ''}"
    return f"{style.describe(setting, trials).splitlines()[0]} ({count})"


def across_models(results: Results) -> set[str]:
    """Specs that ask about several models at once: by their kind, or because the run says that they take them all."""
    kinds = results.trials.drop_duplicates("spec").set_index("spec")["kind"]
    about = results.about_specs.items()
    return {
        *(str(name) for name, kind in kinds.items() if question_of(kind).across),
        *(name for name, words in about if words.get("models") == "all"),
    }


def _siblings(setting: Setting, everything: Mapping[Setting, pd.DataFrame]) -> list[Setting]:
    """The settings on the same images, other models included; the setting itself first."""
    same = [s for s in everything if (s.workload, s.images, s.data_digest) == (
        setting.workload, setting.images, setting.data_digest)]  # fmt: skip
    return [setting, *(one for one in same if one != setting)]


def _aside(setting: Setting, everything: Mapping[Setting, pd.DataFrame], results: Results) -> bool:
    """Whether a setting is only the other side of a comparison of models that another setting's part shows."""
    across = across_models(results)
    own = set(everything[setting]["spec"])
    others = [set(everything[one]["spec"]) for one in _siblings(setting, everything)[1:]]
    return own <= across and any(own <= specs and not specs <= across for specs in others)


def _part(desk: _Desk, setting: Setting, everything: Mapping[Setting, pd.DataFrame], prefix: str, anchor: str) -> Part:
    """Figures, tables and findings of one setting."""
    results, trials = desk.results, everything[setting]
    embedded = style.scenes(setting.workload, setting.model, setting.weights)
    scene = Scene(
        desk.looks,
        style.describe(setting, trials, data=desk.data(setting)),
        read_samples(results.folder / names.SAMPLES),
        setting.model,
        imagenet=not embedded and results.run.get("classes", 1000) == 1000,
        patches=_whole(results.run.get("patches")),
        count=setting.images,
        clip=_clip_grid(setting, results),
    )
    kinds = trials.drop_duplicates("spec").set_index("spec")["kind"]
    sections = []
    for spec in sorted((one for one in results.specs if one in kinds), key=lambda one: KINDS.index(kinds[one])):
        rows = trials[trials["spec"] == spec]
        if spec in across_models(results):
            rest = [everything[one][everything[one]["spec"] == spec] for one in _siblings(setting, everything)[1:]]
            rows = pd.concat([rows, *(part for part in rest if len(part))])
        sections.append(_section(desk, setting, Facts(rows, results.images), scene, prefix))
    together = Overview(trials, results.images)
    shared = desk.embed(shared_figures(together, scene), prefix)
    return Part(
        scene.subtitle.split("\n")[0],
        anchor,
        style.caution(setting, trials),
        findings.limits(setting, trials),
        sections,
        shared,
        [{"spec": section.title, **row} for section in sections for row in section.rows],
        findings.adaptivity(together),
    )


def _section(desk: _Desk, setting: Setting, facts: Facts, scene: Scene, prefix: str) -> Section:
    """One spec: its figures drawn, its tables written, its answers found."""
    spec, rows, question = facts.name, facts.trials, question_of(facts.kind)
    about = desk.results.about_specs.get(spec, {})
    title = str(about.get("title") or spec.replace("_", " "))
    scene = replace(scene, subtitle=style.describe(setting, rows, data=desk.data(setting)))
    table = pd.concat([tables.measured(part) for part in _by_model(facts)], ignore_index=True)
    printed, note = published.published_rows(question.printed, setting), question.note
    sided = beside(question, facts, patches=scene.patches)
    desk.files[names.TABLES] += tables.write(
        desk.folders[names.TABLES],
        f"{prefix}{safe(spec)}",
        title=title,
        subtitle=scene.subtitle,
        ours=table,
        published=printed,
        beside=sided,
        note=note,
    )
    shown = tables.display(table)
    if rows["model"].nunique() > 1:
        shown.insert(0, "model", table["model"].to_list())
    return Section(
        spec,
        f"{prefix}{safe(spec)}",
        title,
        str(about.get("question") or ""),
        str(about.get("caption") or about.get("description") or ""),
        question.answers(facts),
        desk.embed(question.figures(facts, title, scene), prefix),
        question.verdict(facts),
        question.few(facts),
        shown,
        tables.reasons(table),
        sided if len(sided) else None,
        tables.display_published(printed) if len(printed) else None,
        note,
        caveats.caveats(question, setting, rows, desk.results.run),
        int((desk.results.failed["spec"] == spec).sum()),
        tables.listed(table),
    )


def _by_model(facts: Facts) -> list[Facts]:
    """The facts of each model, in the order of the trials."""
    names = list(facts.trials["model"].unique())
    return [facts] if len(names) == 1 else [facts.models[name] for name in names]


def _clip_grid(setting: Setting, results: Results) -> ClipGrid | None:
    """How the patches of a clip lie, as the run recorded it of the model."""
    models = results.run.get("models")
    for one in models if isinstance(models, list) else []:
        if isinstance(one, Mapping) and one.get("weights_digest") == setting.weights_digest:
            grid = one.get("clip_grid")
            if isinstance(grid, list) and len(grid) == 3 and all(isinstance(each, int) and each > 0 for each in grid):
                return ClipGrid(*grid)
    return None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
