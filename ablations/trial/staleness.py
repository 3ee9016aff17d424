"""Which results on disk are no answer any more, and why: another model, other data, other code, or another plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa

from ablations.trial.code import changed_parts, code_of
from ablations.trial.trial import RESULT_VERSION, Trial, TrialError, trial_from

UNTOLD = "written before results said which code they come from"


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
    try:
        now = code_of(trial)
    except KeyError as error:  # a method that is no longer registered
        return f"no method {error}"
    return ", ".join(changed_parts(trial.code, now))


def reasons(rows: pa.Table, run: Mapping[str, Any], *, planned: Collection[str]) -> list[tuple[str, int]]:
    """Why rows are not part of the plan, and how many there are for each reason, the most frequent first."""
    keys = set(planned)
    pairs = zip(rows["key"].to_pylist(), rows["trial"].to_pylist(), strict=True)
    return Counter(reason(trial_or_none(text), run) for key, text in pairs if key not in keys).most_common()


def reason(trial: Trial | None, run: Mapping[str, Any]) -> str:
    """Why a trial's result is not part of the plan that ``run.json`` records."""
    if trial is None:
        return UNTOLD
    models = {
        about["model"]: about
        for about in _listed(run.get("models"))
        if isinstance(about, dict) and isinstance(about.get("model"), str)
    }
    about = models.get(trial.model)
    if about is None:
        return f"another model ({trial.model})"
    if trial.weights_digest != about.get("weights_digest"):
        return f"other weights of {trial.model}"
    if trial.data_digest != about.get("data_digest"):
        return "other images"
    if run.get("result_version") != RESULT_VERSION:
        return "another version of the results"
    if changed := changed_code(trial):
        return f"another version of the code ({changed})"
    if not trial.measure and trial.batch != run.get("batch"):
        return f"another batch ({trial.batch})"
    return "no longer asked for by a spec"


def trial_or_none(text: str | None) -> Trial | None:
    """The trial that a row records; None in rows of earlier versions."""
    try:
        return None if text is None else trial_from(text)
    except TrialError:
        return None


def _listed(value: object) -> Iterable[Any]:
    return value if isinstance(value, list) else []
