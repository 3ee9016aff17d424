"""What one trial is: a frozen description with a content key, and the row its result becomes.

The lowest layer of the experiments: standard library, the names of columns and ``reducers`` only, so that a machine
with nothing but torch and timm can run a trial, and nothing but the standard library to read one. How a trial is
evaluated stands in ``measure.evaluate``, where its result is kept in ``store``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from ablations.records import columns
from ablations.trial.free_settings import StageList
from ablations.trial.labels import blocks_of, budget_number, labels_of, placement_label
from ablations.trial.random import random_seed
from ablations.trial.stages import AS_USUAL, OFF_THE_SHELF, Canonical, HostOptions, Stages, Training, canonical_json

RESULT_VERSION = 1
"""Part of every key: raise it whenever the code computes other numbers for the same trial."""

CLASSIFY = "classify"
"""What is asked of a model where nothing else is said: the name of a task (``ablations.tasks``)."""

DENSE = "dense"
"""The task that reads a map of all patches, and so asks for a rule of ``reducers.restore``."""

LAST = "last"
"""The rule of ``reducers.restore`` by which dense maps are put together where nothing else is said."""

_ADDED_LATER = {  # fields, and what says nothing
    "target": None, "training": "", "measure": "", "calibration": "", "code": "", "task": CLASSIFY,
    "host": "", "restore": LAST,
}  # fmt: skip


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
    first_free: int = 0  # the first block at which a reducer may act
    map_grid: tuple[int, int] | None = None  # of the map that leaves the last block; None: the same
    closed: tuple[int, ...] = ()  # later blocks that take none
    windows: bool = False  # blocks form units of their own, in which not every method acts
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of its host: values, the default first
    units: int = 1  # of a sample, each with such a grid: frames that attend by themselves


@dataclass(frozen=True)
class Trial:
    """One cell of an ablation: a placement of reducers, evaluated on all images of a workload with one model.

    ``variant`` and ``x`` say where the result belongs in the spec's figure; ``seed`` seeds every source of randomness
    that the stages do not seed themselves.

    With a ``target``, one kind of budget in the stages is ``auto``: the setting that meets this share of the dense
    model's multiply-adds is sought on the calibration images (``calibrate``) and stands in the result.
    """

    spec: str
    variant: str
    x: float | None
    stages: Stages
    model: str
    weights: str
    weights_digest: str
    workload: str
    data_digest: str
    images: int
    batch: int
    seed: int
    target: float | None = None  # share of the dense model's multiply-adds: 0.5 is half
    training: Training = OFF_THE_SHELF  # how the weights are finetuned first
    measure: str = ""  # "speed": timed alone on its device
    calibration: str = ""  # digest of the images a target is met on
    code: str = ""  # digests of the code it uses (``code.code_of``)
    task: str = CLASSIFY  # what is asked of the model
    host: HostOptions = AS_USUAL  # how the model is driven, where that is not its default
    restore: str = LAST  # by which rule tokens are put back in their places, where the task reads a dense map

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that change with every field, and with nothing else."""
        return _digest(self._content())

    @cached_property
    def computation(self) -> str:
        """The key without the labels: trials that share it differ in name only and are computed once."""
        labels = {"spec", "variant", "x"}
        return _digest({name: value for name, value in self._content().items() if name not in labels})

    @property
    def family(self) -> str:
        """What a cost depends on beside the free setting: trials that share it can share what they tried."""
        unrelated = {"spec", "variant", "x", "target", "measure", "batch", "images", "data_digest", "task", "restore"}
        content = dataclasses.replace(self, code=_untimed(self.code))._content()
        return _digest({name: value for name, value in content.items() if name not in unrelated})

    @cached_property
    def random_seed(self) -> int:
        """What every draw begins with that the stages do not seed themselves: see ``random``."""
        return random_seed(self._plain())

    def evaluated(self, batch: int) -> Trial:
        """The trial whose evaluation a timed one shares with others: not timed, in batches of the run's size."""
        return dataclasses.replace(self, measure="", batch=batch, code=_untimed(self.code))

    @property
    def description(self) -> str:
        """Canonical JSON of every field: what the key is a digest of. ``trial_from`` reads it back."""
        return canonical_json(self._content())

    def resolved(self, stages: Stages) -> Trial:
        """The trial one would have written with these stages and no target: its ``computation`` is that of every
        other target that came to the same setting.
        """
        return dataclasses.replace(self, stages=stages, target=None, calibration="")

    def _content(self) -> dict[str, Any]:
        """Every field but those that were added later and say nothing: results on disk keep their keys."""
        fields = self._plain().items()
        return {name: value for name, value in fields if name not in _ADDED_LATER or value != _ADDED_LATER[name]}

    def _plain(self) -> dict[str, Any]:
        """Every field as records hold it: stages and training as their text."""
        fields = ((name, getattr(self, name)) for name in _FIELDS)
        return {name: value.text if isinstance(value, Canonical) else value for name, value in fields}


_FIELDS = tuple(each.name for each in dataclasses.fields(Trial))


def trial_from(text: str) -> Trial:
    """A trial from its ``description``.

    Raises:
        TrialError: it is not one, or was written by a version that knew other fields.
    """
    try:
        fields = json.loads(text)
        stages, training = Stages(fields.pop("stages")), Training(fields.pop("training", ""))
        host = HostOptions(fields.pop("host", ""))
        return Trial(**fields, stages=stages, training=training, host=host)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise TrialError(f"no trial of this version: {error}") from error


def trained_together(trial: Trial) -> tuple[object, ...]:
    """What trials that are evaluated in one go have in common: weights, and how many images at once."""
    return trial.model, trial.training, trial.host if trial.training else AS_USUAL, trial.batch


def _untimed(code: str) -> str:
    """The code without the part that times: an evaluation does not use it."""
    return " ".join(part for part in code.split(" ") if not part.startswith("timing="))


@dataclass(frozen=True)
class Solution:
    """What calibration found: the stages with every free setting written in, and how near they come to the target."""

    stages: Stages  # plain data that anyone can rerun
    setting: str  # for people: "K = 57", "keep 0.613", "r = 5.37"
    target_gmacs: float  # per image
    calibration_gmacs: float  # mean over the calibration images
    probes: int  # settings whose cost was looked at
    reached: bool  # within 1 % of the target
    note: str = ""  # why not, where it was not

    @property
    def error(self) -> float:
        """Relative to the target: 0.02 is 2 % too dear."""
        return self.calibration_gmacs / self.target_gmacs - 1


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


def estimated_cost(stages: StageList, facts: ModelFacts, target: float | None = None) -> float:
    """Rough multiply-adds per image: enough to start the longest trials first and to tell the time left."""
    if target is not None:
        return target * estimated_cost((), facts)
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


def base_row(trial: Trial, facts: ModelFacts, solution: Solution | None = None) -> dict[str, Any]:
    """Every column of a row, the metrics still null. ``solution``: what calibration found for the trial's target."""
    blocks = blocks_of(trial.stages.data)
    stages = solution.stages if solution else trial.stages
    return {
        **dict.fromkeys(columns.ROW),
        "spec": trial.spec, "key": trial.key, "status": "failed",
        "model": trial.model, "params_m": facts.params_m, "weights": trial.weights, "workload": trial.workload,
        "images": trial.images, "batch": trial.batch, "seed": trial.seed,
        "finetuned": bool(trial.training), "training": trial.training.text or None,
        "placement": placement_label(blocks), "blocks": blocks, "reducer": stages.text,
        "variant": trial.variant, "x": trial.x, **labels_of(stages.data, facts.patches),
        "target": trial.target, "target_gmacs": solution.target_gmacs if solution else None,
        "calibrated": solution is not None,
        "calibration_gmacs": solution.calibration_gmacs if solution else None,
        "probes": solution.probes if solution else None,
        "target_reached": solution.reached if solution else None,
        "target_note": solution.note or None if solution else None,
        "seconds": 0.0, "device": "", "versions": "{}",
        "data_digest": trial.data_digest, "weights_digest": trial.weights_digest,
        "code": trial.code, "trial": trial.description, "task": trial.task,
        **{name: trial.host.data.get(name, values[0]) for name, values in facts.options.items()},
        "created": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),  # the clock that tests set
    }  # fmt: skip


def failed(trial: Trial, facts: ModelFacts, error: BaseException | str, *, seconds: float = 0.0) -> TrialResult:
    """The record of a trial that gave no result; it is run again next time."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    reason = reason.encode("utf-8", "backslashreplace").decode()  # names of files may be no text at all
    return TrialResult({**base_row(trial, facts), "error": reason[:4000], "seconds": seconds})


def relabel(result: TrialResult, trial: Trial, facts: ModelFacts) -> TrialResult:
    """The same computation under another trial's name: what names the trial changes, nothing else."""
    fresh = base_row(trial, facts)
    labels = {name: fresh[name] for name in ("spec", "key", "variant", "x", "code", "trial")}
    return dataclasses.replace(result, row={**result.row, **labels})


def answers(result: TrialResult, trials: Sequence[Trial], facts: ModelFacts) -> list[TrialResult]:
    """One computed result as the result of every trial that shares its computation."""
    return [relabel(result, trial, facts) for trial in trials]
