"""How tokens are drawn from their scores (Table A.3 of the ATS paper)."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pandas as pd

from analysis.facts.spec import Facts
from analysis.frame import records_of
from analysis.plots import difference, sampling
from analysis.published import ats_costs, of_ats
from analysis.questions.base import Question
from analysis.questions.beside import samplers
from analysis.words import Finding, spoken

LIKE_PRINTED = 0.03  # of the dense cost: up to here a share is near one in print; the two in print lie 0.11 apart


def _in_print() -> dict[str, float]:
    """What ATS costs, in words, as a share of the dense model."""
    (paper, dense), (release, _) = ats_costs().values()
    return {
        f"the {100 * paper / dense:.0f} % in print ({paper} of {dense} GFLOPs, DeiT-S)": paper / dense,
        f"the {100 * release / dense:.0f} % that a user measured with the release ({release} of {dense})": release
        / dense,
    }


def found(facts: Facts) -> list[Finding]:
    """What ATS costs as released, with as many points as patches, beside what is in print."""
    said, printed = [], _in_print()
    for row in records_of(facts.rows[facts.rows["target_gmacs"].isna()]):
        sampler = _ats_variant(row["reducer"])
        share, counted = (value / facts.dense for value in (row["gmacs_mean"], row["reference_gmacs_mean"]))
        if sampler is None or pd.isna(counted):  # what was executed is not the published order of work
            continue
        apart = {words: abs(counted - known) for words, known in printed.items()}
        near = min(apart, key=lambda words: apart[words])
        verdict = f"near {near}" if apart[near] <= LIKE_PRINTED else f"near neither {' nor '.join(printed)}"
        budget = f", {row['budget']}" if row["budget"] else ""
        text = (
            f"{spoken(row['variant'])} (sampler {sampler}, {row['placement']}{budget}, not calibrated) costs "
            f"{100 * share:.0f} % of dense, {100 * counted:.0f} % in the published order of work: "
            f"{verdict}."
        )
        said.append(Finding(text, keys=tuple(row["keys"]), headline=sampler == "official"))
    return said


def _ats_variant(reducer: str) -> str | None:
    """The sampler of a single ATS stage: "paper", "official", ...; None for anything else."""
    try:
        stages = json.loads(reducer)
        parts = [part for stage in stages for part in stage["stack"]]
    except (TypeError, ValueError, KeyError):
        return None
    if len(parts) != 1 or not isinstance(parts[0], Mapping) or parts[0].get("name") != "ats":
        return None
    return str(parts[0].get("variant", "paper"))


QUESTION = Question(
    noun="sampler",
    found=found,
    plots=(sampling.PLOT, difference.PLOT),
    printed=of_ats("Table A.3"),
    claims=samplers,
    finetuned_in_print=True,
)
