"""From specs to trials: substitute, span all combinations, and build every reducer once before anything runs."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ablations.spec.arms import combinations, lists_of
from ablations.spec.checks import (
    Placed,
    Unsuited,
    check_target,
    check_trained,
    check_variables,
    host_options,
    place_reducers,
    training_of,
)
from ablations.spec.model import Arm, SpecFile
from ablations.spec.plain_yaml import Place, substitute
from ablations.trial.code import code_of
from ablations.trial.free_settings import free_kinds
from ablations.trial.labels import budget_number
from ablations.trial.stages import Training
from ablations.trial.target import Target
from ablations.trial.trial import CLASSIFY, DENSE, LAST, ModelFacts, Trial
from reducers import Placement

log = logging.getLogger(__name__)

MAX_TRIALS = 5000  # of one spec: a slip in `vary` must not fill a disk

Check = Callable[[Placement], object]


def expand(file: SpecFile, target: Target, *, check: Check | None = None) -> list[Trial]:
    """The trials of a spec, in its own order and without repetition.

    ``check`` is asked about every placement, e.g. whether the model at hand can carry it out; what it raises is
    reported with the arm it came from.
    """
    _check_recommended(file, target.facts)
    trials: dict[str, Trial] = {}
    left_out: dict[str, Unsuited] = {}
    others: dict[str, None] = {}
    for index, arm in enumerate(file.spec.merged()):
        place: Place = ("arms", index)
        check_variables(file, arm, place)
        if arm.only and target.facts.name not in arm.only:
            others.update(dict.fromkeys(arm.only))
            continue
        for values in _combinations(file, arm, place):
            try:
                trial = _trial(file, arm, place, values, target, check)
            except Unsuited as error:
                left_out.setdefault(str(substitute(arm.variant, values)), error)
                continue
            trials.setdefault(trial.key, trial)
            if len(trials) > MAX_TRIALS:
                raise file.error(place, f"more than {MAX_TRIALS} trials in one spec; vary fewer values")
    if others and not trials and not left_out:
        raise file.error(("arms",), f"no arm is for {target.facts.name}: MODEL={' or MODEL='.join(others)}")
    if left_out and not trials:
        raise next(iter(left_out.values()))
    for variant, why in left_out.items():
        log.info("%s of %s is left out for %s: %s", variant, file.spec.name, target.facts.name, why.reason)
    return list(trials.values())


def _check_recommended(file: SpecFile, facts: ModelFacts) -> None:
    """A placement file of another version is refused, one for another model is told, as by ``reducers.load``."""
    about = file.spec.recommended
    if about is None:
        return
    from reducers.placement_file import VERSION

    if about.get("version") != VERSION:
        raise file.error(
            ("recommended", "version"), f"it is {about.get('version')!r:.40}, and this is read: {VERSION}; write the "
            "file again with `sievit recommend`, or update this version"
        )  # fmt: skip
    if about.get("trained"):
        raise file.error(
            ("recommended", "trained"), "it comes with trained weights, which no run reads: use it in Python "
            "(reducers.load), or search again with `sievit recommend --trained FOLDER`; the placement alone can be "
            "trained anew, `python -m ablations.measure.finetune --stages`"
        )  # fmt: skip
    named = ("weights_digest", "depth", "patches")
    if any(about[name] and getattr(facts, name) and about[name] != getattr(facts, name)
           for name in named if name in about):  # fmt: skip
        log.warning("%s was found for %s, which is another model, other weights or another size of image than %s: what "
                    "it says of cost and accuracy may not hold", file.path, about.get("model"), facts.name)  # fmt: skip


def _combinations(file: SpecFile, arm: Arm, place: Place) -> Iterable[dict[str, Any]]:
    plain = dict(arm)
    count = math.prod(map(len, lists_of(plain).values())) * len(arm.seeds) * max(1, len(arm.cases))
    if count > MAX_TRIALS:
        raise file.error((*place, "vary"), f"{count} combinations, at most {MAX_TRIALS} make sense; vary fewer values")
    return combinations(plain)


def _trial(
    file: SpecFile, arm: Arm, place: Place, values: dict[str, Any], target: Target, check: Check | None
) -> Trial:
    facts = target.facts
    placed = place_reducers(file, arm, place, values, facts)
    check_target(file, place, placed, target=values.get("target"))
    if check is not None:
        try:
            check(placed.placement)
        except ValueError as error:
            told = file.error(place, f"{error}")
            if facts.first_free or facts.closed or facts.windows or file.shipped:
                raise Unsuited(told, reason=str(error)) from error
            raise told from error
    variant = str(substitute(arm.variant, values))
    if "\n" in variant or not 0 < len(variant) <= 120:
        raise file.error(place, f"the variant {variant!r:.60} is no label; use one line of at most 120 characters")
    training = training_of(file, arm, place, values, facts, workload=target.workload)
    if training and target.task != CLASSIFY:
        raise file.error(
            place,
            f"it finetunes, which is for the task {CLASSIFY} alone (its loss reads labels): leave the spec, or this "
            f"arm, out of a run with --task {target.task} (TASK={target.task})",
        )
    check_trained(file, place, placed, training=training, depth=facts.depth)
    if arm.restore and target.task != DENSE:
        raise file.error(
            (*place, "restore"),
            f"it puts tokens back in their places, and the task {target.task} reads no map of them: run it with --task "
            f"{DENSE} (TASK={DENSE}), or leave `restore` out",
        )
    share = values.get("target")
    trial = target.trial(
        spec=file.spec.name,
        variant=variant,
        x=_x(file, arm, place, values, placed, facts),
        stages=placed.stages,
        seed=values["seed"],
        target=None if share is None else float(share),
        training=training,
        host=host_options(file, arm, place, values, facts),
        measure=arm.measure or "",
        batch=values.get("batch"),
        calibrated=share is not None or _seeks(training),
        restore=values.get("restore") or LAST,
    )
    return dataclasses.replace(trial, code=code_of(trial))


def _seeks(training: Training) -> bool:
    """Whether the budget of a training is sought, on the calibration images too."""
    return bool(training) and bool(free_kinds(training.stages.data))


def _x(
    file: SpecFile, arm: Arm, place: Place, values: Mapping[str, Any], placed: Placed, facts: ModelFacts
) -> float | None:
    """The number the figure's axis shows: a varied value, a constant, or what the first budget comes to."""
    if arm.x is None:
        return None
    if arm.x == "budget":
        if placed.kind is not None:
            raise file.error((*place, "x"), "x: budget has no number where the budget is auto; write x: target")
        budgets = [r["budget"] for s in placed.written for r in s["stack"] if isinstance(r.get("budget"), Mapping)]
        return budget_number(budgets[0], facts.patches) if budgets else None
    value = values[arm.x] if isinstance(arm.x, str) else arm.x
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise file.error((*place, "x"), f"x = {arm.x!r} takes the value {value!r}, which is no number")
    return float(value)
