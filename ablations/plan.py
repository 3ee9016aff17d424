"""From specs to trials: substitute, span all combinations, and build every reducer once before anything runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ablations.spec import AblationSpec, Arm, Place, SpecError, SpecFile, did_you_mean
from ablations.trial import ModelFacts, Stages, Trial, budget_number, canonical_stages, estimated_cost
from reducers import Placement, ReducerError, available, build, placement_from
from reducers.placement import parse_blocks

MAX_TRIALS = 5000  # of one spec: a slip in `vary` must not fill a disk
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z]\w*))")
_BUILD_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

Check = Callable[[Placement], object]


@dataclass(frozen=True)
class Target:
    """What all trials of a run have in common: the model, and the images they are evaluated on."""

    facts: ModelFacts
    workload: str
    data_digest: str
    images: int
    batch: int


@dataclass(frozen=True)
class Job:
    """One computation, and every trial that it answers: specs may ask the same question under different names."""

    trials: tuple[Trial, ...]
    cost: float  # rough multiply-adds per image, see estimated_cost

    @property
    def key(self) -> str:
        return self.trials[0].key


def expand(file: SpecFile, target: Target, *, check: Check | None = None) -> list[Trial]:
    """The trials of a spec, in its own order and without repetition.

    ``check`` is asked about every placement, e.g. whether the model at hand can carry it out; what it raises is
    reported with the arm it came from.
    """
    trials: dict[str, Trial] = {}
    for index, arm in enumerate(file.spec.merged()):
        place: Place = ("arms", index)
        _check_variables(file, arm, place)
        for values in _combinations(file, arm, place):
            trial = _trial(file, arm, place, values, target, check)
            trials.setdefault(trial.key, trial)
            if len(trials) > MAX_TRIALS:
                raise file.error(place, f"more than {MAX_TRIALS} trials in one spec; vary fewer values")
    return list(trials.values())


def jobs(trials: Iterable[Trial], facts: ModelFacts) -> list[Job]:
    """Group trials that share a computation, the longest first so that no core is left with a long one at the end."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.computation, []).append(trial)
    made = [Job(tuple(group), estimated_cost(group[0].stage_list(), facts)) for group in groups.values()]
    return sorted(made, key=lambda job: -job.cost)


def _combinations(file: SpecFile, arm: Arm, place: Place) -> Iterable[dict[str, Any]]:
    cases = arm.cases or [{}]
    count = math.prod(len(values) for values in arm.vary.values()) * len(arm.seeds) * len(cases)
    if count > MAX_TRIALS:
        raise file.error((*place, "vary"), f"{count} combinations, at most {MAX_TRIALS} make sense; vary fewer values")
    for case in cases:
        for chosen in itertools.product(*arm.vary.values()):
            for seed in arm.seeds:
                yield {**arm.set, **case, **dict(zip(arm.vary, chosen, strict=True)), "seed": seed}


def _check_variables(file: SpecFile, arm: Arm, place: Place) -> None:
    """Every ``$name`` must have a value, and every varied value must make a difference."""
    used = _variables([stage.model_dump() for stage in arm.stages or ()])
    of_cases = set(arm.cases[0]) if arm.cases else set()
    varied = {*arm.vary, *of_cases}
    known = {*varied, *arm.set, "seed"}
    for number, case in enumerate(arm.cases):
        if set(case) != of_cases:
            raise file.error((*place, "cases", number), f"every case names the same values ({', '.join(arm.cases[0])})")
    for name in sorted({*used, *_variables(arm.variant)} - known):
        raise file.error(place, f"${name} has no value{did_you_mean(name, known)}; give it in vary, cases or set")
    if "seed" in {*varied, *arm.set}:
        raise file.error(place, "'seed' is given by `seeds: [0, 1, 2]`, not by vary, cases or set")
    for name in sorted((set(arm.vary) & of_cases) | (varied & set(arm.set))):
        raise file.error(place, f"{name!r} is given twice (vary, cases, set); keep one of them")
    for name in sorted(varied - used):
        raise file.error(place, f"{name!r} varies but no stage uses ${name}: its trials would all be the same")
    if len(arm.seeds) > 1 and "seed" not in used:
        raise file.error(place, "several seeds, but no stage uses $seed: the trials would all be the same")
    if isinstance(arm.x, str) and arm.x != "budget" and arm.x not in known:
        raise file.error((*place, "x"), f"{arm.x!r} is none of {', '.join(sorted({'budget', *known}))}, nor a number")


def _variables(value: Any) -> set[str]:
    """The names after ``$`` anywhere in nested data."""
    if isinstance(value, str):
        return {braced or plain for braced, plain in _VARIABLE.findall(value)}
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return set().union(*map(_variables, inner))


def _substitute(value: Any, values: Mapping[str, Any]) -> Any:
    """Replace ``$name``: a string that is nothing else becomes the value itself, inside other text its text."""
    if isinstance(value, Mapping):
        return {key: _substitute(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, values) for item in value]
    if not isinstance(value, str):
        return value
    whole = _VARIABLE.fullmatch(value)
    if whole:
        return values[whole[1] or whole[2]]
    return _VARIABLE.sub(lambda match: str(values[match[1] or match[2]]), value)


def _trial(
    file: SpecFile, arm: Arm, place: Place, values: dict[str, Any], target: Target, check: Check | None
) -> Trial:
    placement, stages = _place(file, arm, place, values, target.facts)
    if check is not None:
        try:
            check(placement)
        except ValueError as error:
            raise file.error(place, f"{error}") from error
    facts = target.facts
    variant = str(_substitute(arm.variant, values))
    if "\n" in variant or not 0 < len(variant) <= 120:
        raise file.error(place, f"the variant {variant!r:.60} is no label; use one line of at most 120 characters")
    return Trial(
        spec=file.spec.name,
        variant=variant,
        x=_x(file, arm, place, values, stages, facts),
        stages=canonical_stages(placement),
        model=facts.name,
        weights=facts.weights,
        weights_digest=facts.weights_digest,
        workload=target.workload,
        data_digest=target.data_digest,
        images=target.images,
        batch=target.batch,
        seed=values["seed"],
    )


def _place(
    file: SpecFile, arm: Arm, place: Place, values: dict[str, Any], facts: ModelFacts
) -> tuple[Placement, Stages]:
    """Build every reducer of the arm and put it where the arm says, with errors that name the spot."""
    stages: Stages = []
    for number, stage in enumerate(arm.stages or ()):
        spot = _stage_place(file.spec, place, number)
        try:
            blocks = _blocks(_substitute(stage.at, values), facts.depth)
        except ReducerError as error:
            raise file.error((*spot, "at"), f"{error} (model {facts.name})") from error
        stack = [_substitute(reducer, values) for reducer in stage.stack]
        for index, reducer in enumerate(stack):
            _check_reducer(file, (*spot, "stack", index), reducer)
        stages.append({"at": blocks, "stack": stack})
    try:
        return placement_from(stages, depth=facts.depth), stages
    except _BUILD_ERRORS as error:
        raise file.error(_stage_place(file.spec, place, 0)[:-1], _reason(error)) from error


def _stage_place(spec: AblationSpec, place: Place, number: int) -> Place:
    """Where a stage is written: in the arm, or in ``base`` where the arm gives none."""
    own = isinstance(place[1], int) and spec.arms[place[1]].stages is not None
    return (*(place if own else ("base",)), "stages", number)


def _blocks(where: Any, depth: int) -> list[int]:
    """Block indices of a stage, each inside the network and named once."""
    if isinstance(where, str):
        if any(len(digits) > 4 for digits in re.findall(r"\d+", where)):  # before a range is written out
            raise ReducerError(f"{where!r} is outside the network: its {depth} blocks count from 0 to {depth - 1}")
    elif isinstance(where, list):  # ["$first", 6] has been substituted; ["3-5", 9] is two ways at once
        where = [int(b) if isinstance(b, str) and b.isascii() and b.isdigit() else b for b in where]
    blocks = parse_blocks(where, depth)
    for block in blocks:
        if not 0 <= block < depth:
            raise ReducerError(f"block {block} is outside the network: its {depth} blocks count from 0 to {depth - 1}")
    if len(set(blocks)) != len(blocks):
        raise ReducerError(f"a block is named twice in {where!r}; name it once, or stack the reducers")
    if not blocks:
        raise ReducerError("no block is named; leave the stage out, or use the reducer 'identity'")
    return sorted(blocks)


def _check_reducer(file: SpecFile, place: Place, reducer: Any) -> None:
    """Really build it; unknown names and settings get a suggestion first."""
    if not isinstance(reducer, Mapping) or "name" not in reducer:
        raise file.error(place, f"a reducer is written {{name: ats, budget: {{count: 108}}}}; got {reducer!r:.80}")
    methods = available()
    name = reducer["name"]
    if not isinstance(name, str) or name not in methods:
        raise file.error(
            (*place, "name"), f"unknown reducer {name!r}{did_you_mean(name, methods)}; there are {', '.join(methods)}"
        )
    try:
        build(dict(reducer))
    except _BUILD_ERRORS as error:
        raise file.error(place, _reason(error)) from error


def _reason(error: BaseException) -> str:
    """A reducer's own message; anything else is a value of a kind that no reducer takes."""
    if isinstance(error, ReducerError):
        return str(error)
    return f"a value of the wrong kind ({type(error).__name__}: {error}); see `python -m ablations list --reducers`"


def _x(
    file: SpecFile, arm: Arm, place: Place, values: Mapping[str, Any], stages: Stages, facts: ModelFacts
) -> float | None:
    """The number the figure's axis shows: a varied value, a constant, or what the first budget comes to."""
    if arm.x is None:
        return None
    if arm.x == "budget":
        budgets = [r["budget"] for s in stages for r in s["stack"] if isinstance(r.get("budget"), Mapping)]
        return budget_number(budgets[0], facts.patches) if budgets else None
    value = values[arm.x] if isinstance(arm.x, str) else arm.x
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise file.error((*place, "x"), f"x = {arm.x!r} takes the value {value!r}, which is no number")
    return float(value)


__all__ = ["Job", "SpecError", "Target", "expand", "jobs"]
