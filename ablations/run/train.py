"""One method trained, evaluated and put beside random drop at the same cost: ``sievit train``.

Random drop is what every method must beat. It is brought to the cost the method turned out to have, and evaluated off
the shelf as well as after a training of its own on as many images. Needs torch and timm alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ablations.measure.context import TrialContext
from ablations.measure.evaluate import run_trial
from ablations.measure.finetune import finetuned, parse_recipe
from ablations.measure.opening import default_batch, target_of
from ablations.records.files import atomic
from ablations.records.paired import ALPHA, bonett_price, holm, mcnemar
from ablations.spec.written import TRAINED, WrittenArm, example_stages, written_arms
from ablations.trial.free_settings import StageList, free_kinds
from ablations.trial.stages import OFF_THE_SHELF, Stages, Training
from ablations.trial.trial import Trial, TrialResult
from ablations.words import did_you_mean
from ablations.workloads import open_model
from reducers import available, build
from reducers.hosts import host_of
from reducers.placement import parse_blocks

COLUMNS = ["method", "trained", "GMACs", "top-1 %", "random, same cost", "random, trained as long", "verdict"]

_LENGTH = ("epochs", "images", "batch", "accumulate", "augment", "amp", "seed", "holdout")  # what "as long" means
_OF_REDUCERS = ("stages", "target", "reducer_lr_scale", "freeze")  # which say nothing to random drop
_BASELINES = {"random", "topk"}


class TrainError(ValueError):
    """A training that cannot be asked for; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Asked:
    """One training: a method as an arm of the spec has it, or as it is asked for on the command line."""

    method: str
    variant: str
    stages: Stages  # to evaluate; a budget may be ``auto``
    training: dict[str, Any]
    target: float | None  # share of the dense model's multiply-adds, where a budget is ``auto``


@dataclass(frozen=True)
class Compared:
    """What a training came to, and random drop at its cost."""

    asked: Asked
    method: TrialResult
    off_the_shelf: TrialResult
    trained_as_long: TrialResult
    p_holm: float | None = None  # corrected over all methods of a call; None: of this one alone

    @property
    def alone(self) -> tuple[int, int]:
        """How many images only the method gets right, and how many only random drop trained as long."""
        ours, theirs = (np.asarray(one.images["correct"], dtype=bool) for one in (self.method, self.trained_as_long))
        return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())

    @property
    def p_value(self) -> float:
        """Of the test that the report uses (``records.paired``), as far as it is corrected."""
        return mcnemar(*self.alone)[0] if self.p_holm is None else self.p_holm

    @property
    def lead(self) -> tuple[float, float, float]:
        """Accuracy over that of random drop trained as long, on the same images, with its 95 % interval."""
        (ours, theirs), images = self.alone, len(self.method.images["correct"])
        return (ours - theirs) / images, *bonett_price(ours, theirs, images)

    @property
    def beats(self) -> bool:
        return self.p_value < ALPHA and self.lead[0] > 0

    @property
    def verdict(self) -> str:
        """In words, points of accuracy."""
        gap, low, high = (100 * value for value in self.lead)
        size = f"{gap:+.1f} points [{low:+.1f}, {high:+.1f}]"
        text = "cannot be told apart from random drop"
        if self.p_value < ALPHA:
            text = "beats random drop" if self.beats else "fails: random drop is better"
        if not self.off_the_shelf.row["target_reached"]:
            return f"{text}: {size}; random drop {self.off_the_shelf.row['target_note']}"
        return f"{text}: {size}"


def corrected(all_compared: Sequence[Compared]) -> list[Compared]:
    """The comparisons of one call, their p-values corrected for having looked at all of them (Holm)."""
    plain = [replace(one, p_holm=None) for one in all_compared]
    adjusted = holm([one.p_value for one in plain])
    return [replace(one, p_holm=p) for one, p in zip(plain, adjusted, strict=True)]


# --- what is asked ----------------------------------------------------------------------------------------------------


def asked_for(
    method: str,
    *,
    depth: int,
    first: int = 0,
    where: str | None = None,
    settings: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> list[Asked]:
    """The trainings of a method: its arms in the spec of trained methods, with ``recipe`` over their settings.

    ``first`` is the first of the ``depth`` blocks where the model lets a reducer act. ``where`` and ``settings`` ask
    for a placement of one's own instead; the rest is then the method's default.
    """
    methods = available()
    if method not in methods:
        raise TrainError(f"unknown method {method!r}{did_you_mean(method, methods)}; there are {', '.join(methods)}")
    over = dict(recipe or {})
    arms = [arm for arm in written_arms(TRAINED) if method in arm.trains() & arm.names()]
    if where is None and settings is None and arms:
        return [_arm_asked(method, arm, over, depth, first) for arm in arms]
    (stage, *_) = example_stages(method)
    reducer = {"name": method, **settings} if settings is not None else stage["stack"][0]
    build(reducer)  # a slip is found before anything is opened
    blocks = parse_blocks(where or stage["at"], depth, first)
    stages = [{"at": blocks, "stack": [reducer]}]
    return [Asked(method, method, Stages.of(stages), {**over, "stages": stages}, None)]


def trainable() -> list[str]:
    """The methods that the spec of trained methods trains, those it compares them with left out."""
    return sorted({name for arm in written_arms(TRAINED) for name in arm.trains()} - _BASELINES)


def blocks_of(model: str) -> tuple[int, int]:
    """How many blocks a model has and the first that takes a reducer, before its weights and any image are opened."""
    host = host_of(open_model(model, weights="random", workload_name="").model)
    return host.depth, host.first_free


def parse_method_settings(text: str) -> dict[str, Any]:
    """A method's settings as JSON."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise TrainError(f'--settings is JSON, such as \'{{"budget": {{"ratio": 0.5}}}}\'; {error}') from error
    if not isinstance(settings, dict) or "name" in settings:
        raise TrainError(
            f'--settings is a mapping without a name, such as \'{{"budget": {{"ratio": 0.5}}}}\'; got {text}'
        )
    return settings


def _arm_asked(method: str, arm: WrittenArm, over: Mapping[str, Any], depth: int, first: int) -> Asked:
    stages, training = Stages.of(_spelled(arm.stages, depth, first)), _training(arm.training, over, depth, first)
    return Asked(method, arm.variant, stages, training, arm.target)


def _training(written: Mapping[str, Any] | None, over: Mapping[str, Any], depth: int, first: int) -> dict[str, Any]:
    training = {**(written or {}), **over}
    return {**training, "stages": _spelled(training["stages"], depth, first)}


def _spelled(stages: StageList, depth: int, first: int) -> list[dict[str, Any]]:
    return [{"at": parse_blocks(stage["at"], depth, first), "stack": stage["stack"]} for stage in stages]


# --- doing it ---------------------------------------------------------------------------------------------------------


def train(asked: Asked, context: TrialContext) -> Compared:
    """Train and evaluate the method, then random drop at its cost. A training that is finished is not repeated."""
    workload = context.workload.name
    recipe = parse_recipe(asked.training, workload=workload)
    target = asked.target if free_kinds(asked.stages.data) else None
    method = run_trial(_trial(asked.variant, asked.stages, context, recipe.training(), target=target), context)
    share = min(1.0, method.row["gmacs_mean"] / method.row["dense_gmacs"])
    drop = {"name": "random", "budget": {"ratio": "auto"}}
    facts = context.facts
    random = Stages.of([{"at": parse_blocks({"thirds": True}, facts.depth, facts.first_free), "stack": [drop]}])
    off_the_shelf = run_trial(_trial("random", random, context, OFF_THE_SHELF, target=share), context)
    solved = Stages(off_the_shelf.row["reducer"])
    settings = {name: value for name, value in asked.training.items() if name not in _OF_REDUCERS}
    settings |= {name: getattr(recipe, name) for name in _LENGTH}
    control = parse_recipe({**settings, "stages": solved.plain()}, workload=workload)
    trained_as_long = run_trial(_trial("random, trained as long", solved, context, control.training()), context)
    return Compared(asked, method, off_the_shelf, trained_as_long)


def _trial(
    variant: str,
    stages: Stages,
    context: TrialContext,
    training: Training,
    *,
    target: float | None = None,
) -> Trial:
    batch = default_batch(context.workload)
    return target_of(context.facts, context.workload, context.calibration, batch=batch).trial(
        spec="train", variant=variant, x=None, stages=stages, seed=0, target=target, training=training,
        calibrated=target is not None,
    )  # fmt: skip


# --- saying it --------------------------------------------------------------------------------------------------------


def line(compared: Compared) -> list[str]:
    """A row of the table: ``COLUMNS`` says of what."""
    row = compared.method.row
    teacher = ", with a teacher" if row["teacher"] else ""
    trained = f"{row['epochs']} epochs, {row['train_images']} images, {row['train_seconds']:.0f} s{teacher}"
    cost = f"{row['gmacs_mean']:.3g} ({100 * row['gmacs_mean'] / row['dense_gmacs']:.0f} % of dense)"
    others = [_accuracy(result.row) for result in (compared.off_the_shelf, compared.trained_as_long)]
    return [compared.asked.variant, trained, cost, _accuracy(row), *others, compared.verdict]


def _accuracy(row: Mapping[str, Any]) -> str:
    return f"{100 * row['top1']:.1f} [{100 * row['top1_low']:.1f}, {100 * row['top1_high']:.1f}]"


def save(compared: Compared, context: TrialContext, out: Path) -> Path:
    """The trained weights and ``train.json`` in a folder of this training below OUT; that folder."""
    place = out / "train" / re.sub(r"[^a-z0-9]+", "-", compared.asked.variant.lower()).strip("-")
    if compared.p_holm is None:  # else they are there already
        finetuned(Training(compared.method.row["training"]), context).save(place)
    results = {
        "method": compared.method,
        "random, off the shelf": compared.off_the_shelf,
        "random, trained as long": compared.trained_as_long,
    }
    kept = ("reducer", "training", "gmacs_mean", "dense_gmacs", "top1", "top1_low", "top1_high", "train_images",
            "train_seconds", "tokens", "device", "versions", "created")  # fmt: skip
    content = {
        "variant": compared.asked.variant,
        "model": context.facts.name,
        "images": len(context.workload),
        "dense_top1": context.dense.top1,
        "verdict": compared.verdict,
        "p_holm": compared.p_holm,  # null until all methods of the call are trained
        "results": {name: {column: result.row[column] for column in kept} for name, result in results.items()},
    }
    with atomic(place / "train.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return place


def conclude(all_compared: Sequence[Compared], context: TrialContext, out: Path) -> list[Compared]:
    """The comparisons of a call that is through, corrected; each ``train.json`` has its last verdict."""
    concluded = corrected(all_compared)
    for one in concluded:
        save(one, context, out)
    return concluded


def headline(context: TrialContext) -> str:
    """What the table is about."""
    facts, dense = context.facts, context.dense
    return (
        f"{facts.name} ({facts.weights} weights) on {len(context.workload)} images of {context.workload.name}; not "
        f"reduced and not trained further: top-1 {100 * dense.top1:.1f} % at {dense.gmacs:.3g} GMACs"
    )


def closing(all_compared: Sequence[Compared]) -> str:
    """How many methods beat random drop."""
    ahead = sum(compared.beats for compared in all_compared)
    return (
        f"{ahead} of {len(all_compared)} beat random drop trained as long at the same cost (McNemar, corrected by "
        "Holm); brackets are 95 % intervals over the images, of differences on the same images"
    )
