"""What one trial is: a frozen description with a content key, and the row its result becomes.

The lowest layer of the experiments: standard library and ``reducers`` only, so that a machine with nothing but torch
and timm can run a trial. How a trial is evaluated stands in ``evaluate``, where its result is kept in ``store``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from reducers import Placement, TokenReducer, build, placement_from

RESULT_VERSION = 1
"""Part of every key: raise it whenever the code computes other numbers for the same trial."""

Stages = list[dict[str, Any]]  # [{"at": [3], "stack": [{"name": "ats", "budget": {...}}]}, ...]

_METRICS = (
    "target_gmacs", "probes", "top1", "top1_low", "top1_high", "top5", "agreement", "gmacs_mean", "gmacs_std",
    "reference_gmacs_mean", "reducer_gmacs_mean", "dense_gmacs", "tokens", "tokens_std", "coverage", "class_kept",
    "images_per_second", "dense_images_per_second", "peak_memory_mb", "dense_top1",
)  # fmt: skip


class TrialError(ValueError):
    """A trial that cannot give a result, with the reason a person needs."""


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model without holding it."""

    name: str
    weights: str  # "embedded" | "hub" | "file" | "random"
    weights_digest: str
    params_m: float  # millions of parameters
    depth: int  # blocks
    patches: int  # patch tokens before any reduction
    grid: tuple[int, int]  # rows, columns of patches
    width: int
    classes: int
    class_token: bool


@dataclass(frozen=True)
class Trial:
    """One cell of an ablation: a placement of reducers, evaluated on all images of a workload with one model.

    ``stages`` is canonical JSON (see ``canonical_stages``). ``variant`` and ``x`` say where the result belongs in the
    spec's figure; ``seed`` seeds every source of randomness that the stages do not seed themselves.
    """

    spec: str
    variant: str
    x: float | None
    stages: str
    model: str
    weights: str
    weights_digest: str
    workload: str
    data_digest: str
    images: int
    batch: int
    seed: int

    @property
    def key(self) -> str:
        """16 hexadecimal digits that change with every field, and with nothing else."""
        return _digest(dataclasses.asdict(self))

    @property
    def computation(self) -> str:
        """The key without the labels: trials that share it differ in name only and are computed once."""
        labels = {"spec", "variant", "x"}
        return _digest({name: value for name, value in dataclasses.asdict(self).items() if name not in labels})

    def stage_list(self) -> Stages:
        """The stages as data again."""
        stages: Stages = json.loads(self.stages)
        return stages

    def placement(self, depth: int) -> Placement:
        """The stages as ``reducers`` carries them out."""
        return placement_from(self.stage_list(), depth=depth)


@dataclass(frozen=True)
class TrialResult:
    """A finished or failed trial: one row of ``results.parquet`` and the columns of its per-image file."""

    row: dict[str, Any]
    images: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return str(self.row["key"])

    @property
    def ok(self) -> bool:
        return self.row["status"] == "ok"


def _digest(content: Mapping[str, Any]) -> str:
    text = canonical_json({"version": RESULT_VERSION, **content})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical_json(value: object) -> str:
    """One text for one content: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_stages(placement: Placement) -> str:
    """A placement as it describes itself, so that no spelling of blocks, defaults or fractions can change a key."""
    return canonical_json(placement.spec())


# --- labels -----------------------------------------------------------------------------------------------------------


def blocks_of(stages: Stages) -> list[int]:
    """Every block at which something reduces, ascending."""
    return sorted({block for stage in stages for block in stage["at"]})


def placement_label(blocks: Sequence[int]) -> str:
    """``block 3``, ``blocks 3-11``, ``blocks 3, 6, 9``; runs of three or more are written as a range."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(parts)}" if blocks else "no block"


def resolve_count(ratio: float | str, total: int, rounding: str = "nearest") -> int:
    """How many of ``total`` tokens a ratio keeps; halves round up, and ``"48/196"`` is taken exactly."""
    exact = Fraction(ratio if isinstance(ratio, str) else str(ratio)) * total
    if rounding == "floor":
        return math.floor(exact)
    return math.ceil(exact) if rounding == "ceil" else math.floor(exact + Fraction(1, 2))


def budget_number(budget: Mapping[str, Any], patches: int) -> float:
    """The number a reader knows a budget by: patches kept (K), tokens removed (r) or the keep rate."""
    if "ratio" not in budget:
        return float(budget.get("count", budget.get("drop", 0)))
    if budget.get("of", "current") == "initial":
        return float(resolve_count(budget["ratio"], patches, budget.get("rounding", "nearest")))
    return float(Fraction(str(budget["ratio"])))


def budget_label(budget: Mapping[str, Any], patches: int) -> str:
    """``K = 98``, ``r = 13`` or ``keep 0.7``."""
    number = budget_number(budget, patches)
    if "drop" in budget:
        return f"r = {number:g}"
    return f"K = {number:g}" if "count" in budget or budget.get("of") == "initial" else f"keep {number:.3g}"


def _nested(reducer: TokenReducer) -> Iterable[TokenReducer]:
    """A reducer and those inside it: the choosing half of an EViT, the members of a stack."""
    yield reducer
    for member in (getattr(reducer, "select", None), *getattr(reducer, "members", ())):
        if isinstance(member, TokenReducer):
            yield from _nested(member)


def labels_of(stages: Stages, patches: int) -> dict[str, str | None]:
    """The columns ``score`` and ``budget``: what decides and how much stays, several joined in order."""
    scores: dict[str, None] = {}
    budgets: dict[str, None] = {}
    for spec in (reducer for stage in stages for reducer in stage["stack"]):
        inner = list(_nested(build(spec)))
        chooser = inner[-1] if len(inner) > 1 else inner[0]
        score = getattr(chooser, "score", None)
        if isinstance(score, str):
            scores[score] = None
        if isinstance(spec.get("budget"), Mapping):
            budgets[budget_label(spec["budget"], patches)] = None
    return {"score": " + ".join(scores) or None, "budget": " + ".join(budgets) or None}


def estimated_cost(stages: Stages, facts: ModelFacts) -> float:
    """Rough multiply-adds per image: enough to start the longest trials first and to tell the time left."""
    at_block: dict[int, list[Mapping[str, Any]]] = {}
    for stage in stages:
        for block in stage["at"]:
            at_block.setdefault(block, []).extend(r["budget"] for r in stage["stack"] if r.get("budget"))
    tokens, cost = float(facts.patches), 0.0
    for block in range(facts.depth):
        entering = tokens
        for budget in at_block.get(block, ()):
            number = budget_number(budget, facts.patches)
            if "drop" in budget:
                tokens = max(1.0, tokens - number)
            else:
                relative = "ratio" in budget and budget.get("of", "current") == "current"
                tokens = tokens * number if relative else min(tokens, number)
        mean = (entering + tokens) / 2
        cost += 12 * mean * facts.width**2 + 2 * entering * mean * facts.width
    return cost


# --- rows -------------------------------------------------------------------------------------------------------------


def base_row(trial: Trial, facts: ModelFacts) -> dict[str, Any]:
    """Every column of a row, the metrics still null."""
    stages = trial.stage_list()
    blocks = blocks_of(stages)
    return {
        "spec": trial.spec, "key": trial.key, "status": "failed", "error": None,
        "model": trial.model, "params_m": facts.params_m, "weights": trial.weights, "workload": trial.workload,
        "images": trial.images, "batch": trial.batch, "seed": trial.seed, "finetuned": False,
        "placement": placement_label(blocks), "blocks": blocks, "reducer": trial.stages,
        "variant": trial.variant, "x": trial.x, **labels_of(stages, facts.patches), "calibrated": False,
        **dict.fromkeys(_METRICS),
        "seconds": 0.0, "device": "", "versions": "{}",
        "data_digest": trial.data_digest, "weights_digest": trial.weights_digest,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def failed(trial: Trial, facts: ModelFacts, error: BaseException | str, *, seconds: float = 0.0) -> TrialResult:
    """The record of a trial that gave no result; it is run again next time."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return TrialResult({**base_row(trial, facts), "error": reason[:4000], "seconds": seconds})


def relabel(result: TrialResult, trial: Trial, facts: ModelFacts) -> TrialResult:
    """The same computation under another trial's name: spec, variant, x and key change, nothing else."""
    fresh = base_row(trial, facts)
    labels = {name: fresh[name] for name in ("spec", "key", "variant", "x")}
    return dataclasses.replace(result, row={**result.row, **labels})


def answers(result: TrialResult, trials: Sequence[Trial], facts: ModelFacts) -> list[TrialResult]:
    """One computed result as the result of every trial that shares its computation."""
    return [relabel(result, trial, facts) for trial in trials]
