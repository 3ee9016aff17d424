"""One benchmark from its settings to its files."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ablations.precision import has_bfloat16
from benchmarks import allocator, figures, machine, memory, models, report, scaling, speed
from benchmarks.counts import Counts
from benchmarks.profiling import Marked, profile_ops, profile_table, wrapped
from benchmarks.subjects import Subject, compiled_ones, most_telling, subjects
from reducers import reduce_tokens

log = logging.getLogger(__name__)

Say = Callable[[str], None]


Lineup = Literal["all", "telling", "compiled"]


@dataclass
class Kept:
    """What has been measured of one table so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where weights, images and results lie, and on what is measured."""

    device: torch.device
    out: Path
    weights: Path | None = None
    data: Path | None = None
    say: Say = log.info
    until: float = math.inf  # by time.monotonic: nothing is begun later


@dataclass(frozen=True)
class Scenario:
    """One model at one size, in one precision."""

    model: str
    batches: tuple[int, ...]
    size: int | None = None  # pixels; None: the model's own
    dtype: str = "float32"
    effort: speed.Effort = field(default_factory=speed.Effort)
    contrast: bool = True  # padded and masked runs of the same decisions
    reference: bool = False  # ToMe's reference algorithm
    profiled: bool = False  # a table of the ops that take longest, at the largest batch
    only: tuple[str, ...] = ()  # measure the variants whose name holds one of these; none: all
    lineup: Lineup = "all"  # which variants there are
    compiler: str | None = None  # a backend of torch.compile that every model goes through first, the dense one too


@dataclass(frozen=True)
class Ready:
    """The model and what is needed to time it."""

    model: Any
    size: int
    counts: Counts | None  # replayed by ATS; None where its own are real
    notes: list[str]

    def images(self, count: int, source: Source) -> Tensor:
        loaded = models.images(count, size=self.size, data=source.data)
        return loaded.to(source.device, next(self.model.parameters()).dtype)


def prepare(name: str, size: int | None, dtype: str, source: Source) -> Ready:
    """Model and notes on what is real about the measurement."""
    model, trained = models.create(name, size=size, weights=source.weights)
    models.check_fused(model)
    model = model.to(source.device, getattr(torch, dtype))
    real = trained and source.data is not None
    counts = None if real else Counts.load()
    images = "random images" if source.data is None else "real images"
    weights = "trained weights" if trained else "random weights"
    kept = "ATS's own counts" if counts is None else f"ATS's counts replayed: {counts.origin}"
    notes = [f"{weights.capitalize()}, {images}; {kept}."]
    if dtype == "bfloat16" and not has_bfloat16(source.device):
        notes.append("This device has no units for bfloat16, so that it is slower than float32 here.")
        source.say(f"{name}: {notes[-1]}")
    return Ready(model, model.patch_embed.img_size[0], counts, notes)


def run_speed(scenario: Scenario, source: Source, kept: Kept | None = None) -> list[dict[str, Any]]:
    """Measure one scenario and write its files; the rows. ``kept``: what is in the same table already, and grows."""
    kept = Kept() if kept is None else kept
    ready = prepare(scenario.model, scenario.size, scenario.dtype, source)
    listed = _variants(scenario, ready)
    rows: list[dict[str, Any]] = []
    images = ready.images(max(max(scenario.batches), 8), source)
    for batch in sorted(scenario.batches):
        if time.monotonic() > source.until:
            source.say(f"{scenario.model}, batch {batch}: not measured, the time was up")
            continue
        source.say(f"{scenario.model}, {ready.size} px, {scenario.dtype}, batch {batch}: {len(listed) + 1} variants")
        # a training step of one image is nobody's; the largest batch that holds the wanted one has it
        training = scenario.effort.training_batch if batch == max(scenario.batches) else None
        effort = replace(scenario.effort, training_batch=training)
        table = speed.compare(
            ready.model, listed, images, batch=batch, effort=effort, wrap=_wrapper(scenario), until=source.until
        )
        rows += speed.records(table)
        _tidy(source.device)
    kept.rows += rows
    if scenario.profiled and rows:
        kept.profiles |= _profiles(ready, listed, images[: max(scenario.batches)], source)
    if kept.rows:
        _write_speed(scenario, ready, source, kept.rows, kept.profiles)
    return rows


def _variants(scenario: Scenario, ready: Ready) -> list[Subject]:
    """What is measured beside the dense model."""
    match scenario.lineup:
        case "all":
            listed = subjects(ready.model, ready.counts, contrast=scenario.contrast, reference=scenario.reference)
        case "telling":
            listed = most_telling(ready.model, ready.counts)
        case "compiled":
            listed = compiled_ones(ready.model, ready.counts)
    if scenario.only:
        listed = [subject for subject in listed if any(part in subject.name for part in scenario.only)]
    return listed


def _wrapper(scenario: Scenario) -> speed.Wrap | None:
    return None if scenario.compiler is None else partial(torch.compile, fullgraph=True, backend=scenario.compiler)


def _profiles(ready: Ready, listed: Sequence[Subject], images: Tensor, source: Source) -> dict[str, dict[str, Any]]:
    runs = {speed.DENSE: ready.model} | {
        subject.name: _marked(subject, ready.model) for subject in listed if subject.kind != "masked"
    }
    profiles = {}
    with torch.inference_mode():
        for name, run in runs.items():
            if time.monotonic() > source.until:
                source.say(f"no profile of {name}: the time was up")
                continue
            try:
                profiles[name] = {"batch": len(images), **profile_ops(partial(run, images), source.device)}
            except torch.OutOfMemoryError:
                source.say(f"no profile of {name}: out of memory at batch {len(images)}")
    return profiles


def _marked(subject: Subject, model: Any) -> nn.Module:
    """The variant with its decisions told apart in a profile, where it is the project's own."""
    if subject.kind != "packed":
        return subject.build(model, 0).eval()
    return reduce_tokens(model, wrapped(subject.place(0), Marked), attention=subject.attention).eval()


def _write_speed(
    scenario: Scenario, ready: Ready, source: Source, rows: list[dict[str, Any]], profiles: dict[str, dict[str, Any]]
) -> None:
    known = machine.facts(source.device)
    title = f"{scenario.model}, {ready.size} px, {scenario.dtype}"
    notes = [
        f"On {machine.sentence(known)}.",
        *ready.notes,
        how_timed(scenario.effort.rounds),
        f"Peak memory: ratio to the dense model's, beyond weights and images ({memory.HOW[source.device.type]}).",
    ]
    if any(row["kind"] in ("padded", "masked") for row in rows):
        notes.append(
            "*masked*: the same decisions with tokens zeroed in place and hidden by a key mask; *padded*: cut to the "
            "batch's longest image. Their GMACs are the packed run's: what the decisions would save."
        )
    if any(row.get("folded_gmacs") is not None for row in rows):
        notes.append(
            "Sizes of merged tokens come into attention by a mask, or folded into two more columns of its products. "
            "GMACs never depend on that; what the wider products add stands beside them."
        )
    if scenario.compiler is not None:
        title += ", compiled"
        notes.append(f"Every model went through torch.compile ({scenario.compiler}) first, the dense one too.")
    stem = f"{table_of(scenario, ready.size)}-{source.device.type}{allocator.suffix()}"
    write_speed(source.out, stem, title=title, notes=notes, known=known, rows=rows, profiles=profiles, say=source.say)


def table_of(scenario: Scenario, size: int | None) -> str:
    """The name of the table that a scenario belongs to, but for the device."""
    compiled = "" if scenario.compiler is None else "-compiled"
    return f"speed-{scenario.model}-{size}-{scenario.dtype}{compiled}"


def how_timed(rounds: int, processes: int = 1) -> str:
    """The note that tells how the speed-ups of a table came about."""
    where, over = "in one process", ""
    if processes > 1:
        where = f"in each of {processes} processes, started one after the other"
        over = (
            " over all processes; beside the efficiency stand the lowest and the highest that one process gave. Peak "
            "memory and the training step were measured in the first"
        )
    return (
        f"All variants took turns {where}, {rounds} rounds ({speed.AT_BATCH_1} times as many at batch 1), each round "
        "in another order; each turn is a pair, the variant and timm's own forward on fused attention one right after "
        "the other, each run twice of which the second counts. Efficiency = speed-up / GMACs ratio. Speed-ups are "
        f"medians and quartiles of the ratios within a pair{over}. Only ratios within a table mean anything."
    )


def write_speed(
    out: Path, stem: str, *, title: str, notes: Sequence[str], known: dict[str, Any], rows: list[dict[str, Any]],
    profiles: dict[str, dict[str, Any]], say: Say,
) -> None:  # fmt: skip
    """Keep a measured table as text, data and figure, and say it."""
    text = report.speed_table(rows)
    if profiles:
        batch = next(iter(profiles.values()))["batch"]
        text += f"\n## Where the time goes, batch {batch}\n\n{profile_table(profiles)}"
    written = report.keep(
        out,
        stem,
        title=title,
        notes=notes,
        data={"machine": known, "rows": rows, "profiles": profiles},
        text=text,
        draw=lambda file: figures.speed_figure(rows, f"{title}, {known.get('gpu', known['cpu'])}", file),
    )
    say(f"{text}\nwritten: {', '.join(map(str, written))}")


def run_scaling(
    model: str,
    sizes: Sequence[int],
    batches: Sequence[int],
    dtype: str,
    source: Source,
    *,
    batch: int = 1,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Time and memory against tokens (at ``batch`` images) and against the batch (at the smallest size)."""
    points: list[dict[str, Any]] = []
    plan = [("tokens", size, batch) for size in sorted(sizes)] + [("batch", min(sizes), own) for own in sorted(batches)]
    ready: Ready | None = None
    counts = Counts.load()
    for series, size, own in plan:
        source.say(f"{model}, {size} px, {dtype}, batch {own}")
        if ready is None or ready.size != size:
            ready = prepare(model, size, dtype, replace(source, weights=None, data=None))
        try:
            measured = scaling.measure(ready.model, counts, ready.images(own, source), rounds=rounds)
        except torch.OutOfMemoryError as error:
            tokens = ready.model.patch_embed.num_patches
            measured = [scaling.Point(speed.DENSE, size, tokens, own, error=f"out of memory: {error}".splitlines()[0])]
        points += [{"series": series, **point} for point in scaling.records(measured)]
        _tidy(source.device)
    _write_scaling(model, dtype, source, points, counts)
    return points


def _write_scaling(model: str, dtype: str, source: Source, points: list[dict[str, Any]], counts: Counts) -> None:
    known = machine.facts(source.device)
    title = f"{model}, {dtype}: growth with tokens and batch"
    notes = [
        f"On {machine.sentence(known)}.",
        "Random weights and images. ToMe merges in every block, EViT 0.7 reduces three times, ATS in the last three "
        f"quarters of the blocks; r, K and ATS's replayed counts grow with the tokens ({counts.origin}).",
        "Deciding: the share of a reduced model's own time that is saved when its decisions are known beforehand, "
        "measured in turn with the rest.",
        f"Peak memory beyond weights and images: {memory.HOW[source.device.type]}; the ratio is to the dense model's.",
    ]
    series = {"Against tokens": "tokens", "Against the batch": "batch"}
    text = "\n".join(
        f"## {heading}\n\n{report.scaling_table([p for p in points if p['series'] == name])}"
        for heading, name in series.items()
    )
    written = report.keep(
        source.out,
        f"scaling-{model}-{dtype}-{source.device.type}",
        title=title,
        notes=notes,
        data={"machine": known, "points": points},
        text=text,
        draw=lambda file: figures.scaling_figure(points, f"{title}, {known.get('gpu', known['cpu'])}", file),
    )
    source.say(f"{text}\nwritten: {', '.join(map(str, written))}")


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
