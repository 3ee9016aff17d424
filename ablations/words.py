"""Tables for the terminal: the trials of a plan, the reducers and their settings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ablations.trial.trial import Trial

_CELL = 44  # characters: longer cells are wrapped, so that a terminal of 120 columns holds a row
REDUCER_COLUMNS = ["name", "settings", "count", "weights", "stacks", "site", "what it does", "source"]


def in_words(variant: str, x: float | None) -> str:
    """A trial as a person knows it: its series, and where it stands on it."""
    return variant if x is None else f"{variant} (x = {x:g})"


def trial_rows(trials: Sequence[Trial], patches: int) -> list[list[str]]:
    """Variant, x, placement, budget and seed of each trial; ``patches`` is what the model starts with."""
    from ablations.trial.labels import blocks_of, placement_label

    return [
        [
            trial.variant,
            "" if trial.x is None else f"{trial.x:g}",
            placement_label(blocks_of(trial.stage_list())),
            _budget(trial, patches),
            str(trial.seed),
        ]
        for trial in trials
    ]


def _budget(trial: Trial, patches: int) -> str:
    """``K = 48``, ``0.50 of dense: K = auto``, and what else is done with the trial."""
    from ablations.trial.labels import labels_of, target_label

    budget = labels_of(trial.stage_list(), patches)["budget"] or ""
    parts = [budget if trial.target is None else f"{target_label(trial.target)}: {budget}"]
    if trial.training:
        parts.append("finetuned")
    if trial.measure:
        parts.append(f"{trial.measure} at batch {trial.batch}")
    return ", ".join(part for part in parts if part)


def reducer_rows() -> list[list[str]]:
    """Every registered reducer: name, settings, properties, summary and source; ``REDUCER_COLUMNS`` names them."""
    from ablations.catalogue.methods import properties

    return [
        [about.name, about.settings, about.count, about.weights, "yes" if about.stacks else "no", about.site,
         about.summary, about.source]
        for about in properties()
    ]  # fmt: skip


def table(header: list[str], rows: list[list[str]], *, indent: str = "") -> str:
    """Aligned columns, a rule under the header."""
    cells = [[textwrap.wrap(cell, _CELL) or [""] for cell in row] for row in [header, *rows]]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        for line in range(max(len(cell) for cell in row)):
            texts = [cell[line] if line < len(cell) else "" for cell in row]
            padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
            lines.append((indent + "  ".join(padded)).rstrip())
        if number == 0:
            lines.append(indent + "  ".join("-" * width for width in widths))
    return "\n".join(lines)
