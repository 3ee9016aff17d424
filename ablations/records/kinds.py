"""What a spec asks, by the kind of its answer: the words that ``answers:`` of a spec may be. Standard library alone.

The record of a run holds the kind of each of its specs, and the analysis has a file for each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Answer = Literal[
    "front",  # which of many methods to take at which cost
    "scores",  # what decides which tokens are kept
    "placement",  # in which blocks
    "stages",  # in one stage or in several
    "counts",  # how many tokens are kept, as ``x``
    "samplers",  # how tokens are drawn from their scores
    "dropping",  # whether the class token may go
    "stacking",  # whether a second reducer on top of another pays
    "tokens",  # how many tokens different images keep
    "sizes",  # a reduced large model or a whole small one
    "speed",  # what the clock says
    "recovery",  # what training with the reduction gives back
    "transfer",  # one training for many budgets
    "trained",  # what methods with a training of their own are worth
    "scratch",  # models trained with the reduction from their first update on
    "backbones",  # one method on the backbones it was published on, at the published costs
    "clips",  # which method, or which way of counting, to take on clips
    "clip_placement",  # in which blocks of a video model
    "clip_scores",  # what decides which tokens of a frame are kept
    "ranking",  # who leads at equal cost; of a spec that says nothing else
]
KINDS: tuple[Answer, ...] = get_args(Answer)
"""In the order in which a reader meets them."""
ANSWERS = "answers"
"""The word in a spec and in the record of a run."""

_SHIPPED: dict[str, Answer] = {  # the shipped specs of the time before records said it
    "score_functions": "scores", "k_values": "counts", "stage_placement": "placement", "class_token": "dropping",
    "evit_stacking": "stacking", "stacks": "stacking", "sampling_method": "samplers", "single_multi_stage": "stages",
    "model_scaling": "sizes", "runtime": "speed", "adaptivity": "tokens", "finetuning": "recovery",
    "finetuning_short": "recovery", "budget_transfer": "transfer", "trained_methods": "trained", "methods": "front",
    "hvt": "scratch", "paper_backbones": "backbones",
}  # fmt: skip


def kind_of(spec: str, about: Mapping[str, Any] | None = None) -> Answer:
    """The kind of a spec's answer, by what the record of a run says about it (``about``).

    Records of earlier versions say nothing of it: the shipped specs are known by their names. A kind that this version
    does not know is a ranking.
    """
    if about is None or ANSWERS not in about:
        return _SHIPPED.get(spec, "ranking")
    return next((kind for kind in KINDS if kind == about[ANSWERS]), "ranking")
