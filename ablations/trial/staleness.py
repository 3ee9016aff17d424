"""Which results on disk are no answer any more, and why: another model, other data, other code, or another plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ablations.trial.code import changed_parts, code_of, is_task
from ablations.trial.trial import CLASSIFY, RESULT_VERSION, Trial, TrialError, trial_from

UNTOLD = "written before results said which code they come from"
_CODE = "another version of the code"
_OTHER_CODE = {UNTOLD: "no run asks", _CODE: "that code alone asks"}


@dataclass(frozen=True)
class Stale:
    """Results that are stale for one reason."""

    reason: str
    count: int
    planned: int  # of these, answers to what the plan asks: the next run computes them again
    asked: str  # what asks for the others, so that they count again

    @property
    def remedy(self) -> str:
        """What becomes of them, and what a person can do."""
        if not self.planned:
            return f"{self.asked} for them"
        again = f"the next run computes {self.planned} again"
        return again if self.planned == self.count else f"{again}; {self.asked} for the others"


def outdated(rows: pa.Table, *, keys: Collection[str]) -> dict[str, str]:
    """Of these keys, those whose row was computed by other code than there is now, with the parts that changed.

    ``rows`` has the columns ``key`` and ``trial``.
    """
    wanted = set(keys)
    found: dict[str, str] = {}
    for key, text in zip(rows["key"].to_pylist(), rows["trial"].to_pylist(), strict=True):
        if key in wanted and (changed := changed_code(trial_or_none(text))):
            found[key] = changed
    return found


def changed_code(trial: Trial | None) -> str:
    """What changed in the code that the trial was computed with: "evaluation, timing"; "" for nothing."""
    if trial is None or not trial.code:
        return UNTOLD
    if not is_task(trial.task):
        return f"no task {trial.task!r}"
    try:
        now = code_of(trial)
    except KeyError as error:  # a method that is no longer registered
        return f"no method {error}"
    return ", ".join(changed_parts(trial.code, now))


def account(rows: pa.Table, run: Mapping[str, Any], *, planned: Collection[str]) -> list[Stale]:
    """Every result that is stale, counted under one reason: those that are no part of the plan, and those of the plan
    that other code computed. The most frequent reason first.
    """
    keys = set(planned)
    counts: Counter[tuple[str, str]] = Counter()
    again: Counter[str] = Counter()  # of the plan
    parts: Counter[str] = Counter()
    for key, text in zip(rows["key"].to_pylist(), rows["trial"].to_pylist(), strict=True):
        trial = trial_or_none(text)
        changed = changed_code(trial)
        if key in keys and not changed:
            continue
        why = UNTOLD if changed == UNTOLD else _CODE if changed else ""
        if why == _CODE:
            parts.update(changed.split(", "))
        why, asked = (why, _OTHER_CODE[why]) if why else reason(trial, run)
        counts[why, asked] += 1
        again[why] += key in keys
    return [
        Stale(f"{why} ({_in_short(parts, count)})" if why == _CODE else why, count, again[why], asked)
        for (why, asked), count in counts.most_common()
    ]


def _in_short(parts: Counter[str], total: int) -> str:
    """``evaluation``, or how many each part of the code made stale: ``evaluation 5, timing 2``."""
    if all(count == total for count in parts.values()):
        return ", ".join(sorted(parts))
    return ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))


def reason(trial: Trial | None, run: Mapping[str, Any]) -> tuple[str, str]:
    """Why a trial's result, computed by the code there is, is not part of the plan that ``run.json`` records;
    and what asks for it.
    """
    assert trial is not None, "a row that names no trial names no code"
    models = {
        about["model"]: about
        for about in _listed(run.get("models"))
        if isinstance(about, dict) and isinstance(about.get("model"), str)
    }
    if run.get("result_version") != RESULT_VERSION:
        return "another version of the results", "that version alone asks"
    if trial.task != run.get("task", CLASSIFY):
        return f"another task ({trial.task})", f"`--task {trial.task}` asks"
    about = models.get(trial.model)
    if about is None:
        return f"another model ({trial.model})", f"`--model {trial.model}` asks"
    if trial.weights_digest != about.get("weights_digest"):
        return f"other weights of {trial.model}", "the --weights they came from ask"
    if trial.data_digest != about.get("data_digest"):
        return "other images", "the --workload, --data and --limit they came from ask"
    if not trial.measure and trial.batch != run.get("batch"):
        return f"another batch ({trial.batch})", f"`--batch {trial.batch}` asks"
    return "no longer asked for by a spec", "naming their spec in --specs, as it was, asks"


def trial_or_none(text: str | None) -> Trial | None:
    """The trial that a row records; None in rows of earlier versions."""
    try:
        return None if text is None else trial_from(text)
    except TrialError:
        return None


def _listed(value: object) -> Iterable[Any]:
    return value if isinstance(value, list) else []
