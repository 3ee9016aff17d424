"""What a reader of one experiment must know before believing its numbers, drawn from the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis import published, style
from analysis.facts.matching import dense_cost
from analysis.frame import Setting
from analysis.questions.base import Question

EASIER = 2.0  # points above print from which the images are said to be easier


def caveats(
    question: Question, setting: Setting, trials: pd.DataFrame, run: Mapping[str, Any] | None = None
) -> list[str]:
    """Sentences on calibration, data, model and training; ``run`` is the run's record."""
    said = _chance(setting, run or {})
    said += _calibration(trials)
    said += _data(setting, trials)
    if trials["model"].nunique() == 1 and question.in_print and setting.model != "deit_small_patch16_224":
        said.append(
            f"In print: {question.printed_on}; here: {published.model_name(setting.model)}. Changes to the dense "
            "model at a share of its cost compare better than accuracies, and neither is the same experiment."
        )
    tuned = trials.loc[~trials["dense"], "finetuned"]
    if question.finetuned_in_print and len(tuned) and not tuned.any():
        said.append("Everything here is off the shelf, without training; the published rows are finetuned.")
    shared = trials["interval"] if "interval" in trials else pd.Series(dtype=str)
    if (shared == "as recorded").any():
        said.append(
            f"{int((shared == 'as recorded').sum())} trials left no per-image table: their interval is Wilson's, and "
            "they take part in no paired test."
        )
    return said


def _chance(setting: Setting, run: Mapping[str, Any]) -> list[str]:
    """What the record says of the dense model, where it knows nothing of these images."""
    models = run.get("models")
    for about in models if isinstance(models, list) else []:
        plain = about.get("plain") if isinstance(about, Mapping) else None
        if not isinstance(plain, Mapping) or plain.get("at_chance") is not True:
            continue
        if (about.get("weights_digest"), about.get("data_digest")) == (setting.weights_digest, setting.data_digest):
            return [
                f"The dense model itself is at chance level here ({100 * float(plain['top1']):.2f} % right, "
                f"{100 * float(plain['chance']):.2f} % by chance): its weights are random, or the labels are not in "
                "the order of its head. No accuracy on this page says anything about a method."
            ]
    return []


def _calibration(trials: pd.DataFrame) -> list[str]:
    rows = trials[~trials["dense"]]
    aimed = rows[rows["target_gmacs"].notna()]
    if aimed.empty:
        return []
    count = aimed["calibration_images"].dropna()
    images = f"{int(count.iloc[0]):,} images" if len(count) else "other images of the same data"
    said = [f"Settings were calibrated to their target on {images}, by cost alone, and evaluated on others."]
    missed = aimed[[value is False for value in aimed["target_reached"]]]
    if len(missed):
        off = 100 * (missed["gmacs_mean"] - missed["target_gmacs"]).abs() / dense_cost(trials)
        far = "" if off.isna().all() else f" (up to {off.max():.1f} % of the dense cost away, marked * in the table)"
        said.append(
            f"{len(missed)} of {len(aimed)} targets could not be reached{far}: those trials are compared where their "
            "own curve passes a target, or not at all."
        )
    return said


def _data(setting: Setting, trials: pd.DataFrame) -> list[str]:
    if scene := style.scenes(setting.workload, setting.model, setting.weights):
        return [
            f"{scene.capitalize()} and a small model of the project's own: "
            "what holds here need not hold on photographs."
        ]
    known, print_value = trials["dense_top1"].dropna(), published.dense_top1(published.model_name(setting.model))
    if len(known) and print_value is not None and 100 * known.iloc[0] > print_value + EASIER:
        return [
            f"These {setting.images:,} images are easier than the whole validation set: the dense model has "
            f"{100 * known.iloc[0]:.1f} % here and {print_value:g} % in print."
        ]
    return []
