"""What a spec's arm must fulfil before anything runs: its variables, its reducers, its target, its training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ablations.records.columns import OPTIONS
from ablations.spec.arms import LISTS
from ablations.spec.model import AblationSpec, Arm, SpecFile
from ablations.spec.plain_yaml import Place, SpecError, substitute, variables
from ablations.trial.free_settings import (
    AUTO,
    StageList,
    budgets_in,
    filled,
    free,
    free_kinds,
    sought_schedules,
    stand_in,
    without_schedules,
    write,
)
from ablations.trial.labels import with_nested
from ablations.trial.stages import OFF_THE_SHELF, HostOptions, Stages, Training
from ablations.trial.trial import ModelFacts
from ablations.words import did_you_mean
from reducers import Placement, ReducerError, TokenReducer, available, build, placement_from
from reducers.placement import parse_blocks

_BUILD_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_FORMS = "budget: {count: auto}, {ratio: auto} or {drop: auto}"


@dataclass(frozen=True)
class Placed:
    """The stages of one trial, checked by building them."""

    written: StageList  # names filled in
    placement: Placement  # what is free stands at some value
    stages: Stages  # as the placement describes itself; what is free is "auto"
    kind: str | None  # "count" | "ratio" | "drop": what is free
    place: Place  # where the stages are written


class Unsuited(SpecError):
    """What a model cannot carry out of a spec that was written for others: of a shipped one, or of any whose blocks are
    those of a plain ViT where some of its own take no reducer or attend in windows, or that asks for an option which
    other hosts have. It answers as much of the spec as it can.
    """

    def __init__(self, told: SpecError, *, reason: str) -> None:
        super().__init__(str(told))
        self.reason = reason


# --- variables --------------------------------------------------------------------------------------------------------


def check_variables(file: SpecFile, arm: Arm, place: Place) -> None:
    """Every ``$name`` must have a value, and every varied value must make a difference."""
    used = variables([[stage.model_dump() for stage in arm.stages or ()], arm.training or {}, arm.host or {}])
    together = set(_names_of_cases(file, arm, place))
    varied = {*arm.vary, *together}
    known = {*varied, *arm.set, *(name for name in LISTS if getattr(arm, name)), "seed"}
    for name in sorted({*used, *variables(arm.variant)} - known):
        raise file.error(place, f"${name} has no value{did_you_mean(name, known)}; give it in vary, cases or set")
    for name in sorted({"seed", *LISTS} & {*varied, *arm.set}):
        form = "seeds: [0, 1, 2]" if name == "seed" else f"{name}: [...]"
        raise file.error(place, f"{name!r} is given by `{form}`, not by vary, cases or set")
    named = variables(arm.variant) & together if together & used else set()  # what cases are called
    for name in sorted(varied - used - named):
        raise file.error(place, f"{name!r} varies but no stage uses ${name}: its trials would all be the same")
    if len(arm.seeds) > 1 and "seed" not in used:
        raise file.error(place, "several seeds, but no stage uses $seed: the trials would all be the same")
    if arm.batch and arm.measure is None:
        raise file.error((*place, "batch"), "the batch changes no result but speed; add `measure: speed`, or leave it")
    if isinstance(arm.x, str) and arm.x != "budget" and arm.x not in known:
        raise file.error((*place, "x"), f"{arm.x!r} is none of {', '.join(sorted({'budget', *known}))}, nor a number")


def _names_of_cases(file: SpecFile, arm: Arm, place: Place) -> set[str]:
    """What the cases give, the same names in each and none that is given elsewhere."""
    names = set(arm.cases[0]) if arm.cases else set()
    for number, case in enumerate(arm.cases):
        if set(case) != names:
            raise file.error((*place, "cases", number), f"every case names the same values ({', '.join(arm.cases[0])})")
    for name in sorted((set(arm.vary) & names) | ({*arm.vary, *names} & set(arm.set))):
        raise file.error(place, f"{name!r} is given twice (vary, cases, set); keep one of them")
    return names


# --- stages -----------------------------------------------------------------------------------------------------------


def place_reducers(file: SpecFile, arm: Arm, place: Place, values: Mapping[str, Any], facts: ModelFacts) -> Placed:
    """Build every reducer of the arm and put it where the arm says, with errors that name the spot."""
    written = [{"at": stage.at, "stack": stage.stack} for stage in arm.stages or ()]
    return _placed(file, _stages_place(file.spec, place), written, values, facts)


def host_options(file: SpecFile, arm: Arm, place: Place, values: Mapping[str, Any], facts: ModelFacts) -> HostOptions:
    """How the arm has the model driven: what its host knows, without what is its default."""
    own = isinstance(place[1], int) and file.spec.arms[place[1]].host is not None
    spot: Place = (*(place if own else ("base",)), "host")
    chosen = {}
    for name, value in substitute(arm.host or {}, values).items():
        known = facts.options.get(name)
        if known is None:
            told = f"it knows {', '.join(facts.options)}" if facts.options else "it lets one choose nothing"
            error = file.error((*spot, name), f"{facts.name} has no option {name!r}: {told}")
            if name in OPTIONS:
                raise Unsuited(error, reason=f"it has no option {name!r}")
            raise error
        if value not in known:
            raise file.error((*spot, name), f"{name} is one of {', '.join(known)} for {facts.name}; got {value!r:.80}")
        if value != known[0]:
            chosen[name] = value
    return HostOptions.of(chosen)


def check_target(file: SpecFile, place: Place, placed: Placed, *, target: float | None) -> None:
    """A target needs one kind of free setting, and a free setting a target."""
    if target is None and placed.kind is not None:
        raise file.error(
            placed.place,
            f"the budget {{{placed.kind}: auto}} is sought so that it meets a cost, and none is named; "
            "add `target: [0.5]` (half of the dense model's multiply-adds), or write a number",
        )
    if target is not None and placed.kind is None:
        raise file.error(
            (*place, "target"),
            f"a target needs a budget that may give way: write {_FORMS}, or `target: null` in an arm that has none",
        )


def training_of(
    file: SpecFile, arm: Arm, place: Place, values: Mapping[str, Any], facts: ModelFacts, *, workload: str
) -> Training:
    """The whole recipe of the arm's training, if it has one."""
    if arm.training is None:
        return OFF_THE_SHELF
    from ablations.trial.recipe import parse_recipe

    own = isinstance(place[1], int) and file.spec.arms[place[1]].training is not None
    spot: Place = (*(place if own else ("base",)), "training")
    given = substitute(arm.training, values)
    stages, sought = given.get("stages"), False
    if stages:
        if not isinstance(stages, list) or not all(isinstance(s, dict) and {"at", "stack"} == set(s) for s in stages):
            raise file.error((*spot, "stages"), "a stage of the training is written {at: [3, 6, 9], stack: [...]}")
        placed = _placed(file, (*spot, "stages"), stages, {}, facts)
        given, sought = {**given, "stages": placed.stages.plain()}, placed.kind is not None
    if given.get("target") is not None and not sought:
        raise file.error((*spot, "target"), f"no budget of this training is free to meet a cost; write {_FORMS}")
    try:
        return parse_recipe(given, workload=workload).training()
    except _BUILD_ERRORS as error:
        raise file.error(spot, str(error)) from error


def check_trained(file: SpecFile, place: Place, placed: Placed, *, training: Training, depth: int) -> None:
    """A method that works only after training needs one that has it at the same block."""
    learned = set()
    if training:
        trained_with = placement_from(filled(training.stages.data), depth=depth)
        learned = {(block, reducer.name) for block, reducer in _trained(trained_with)}
    for block, reducer in _trained(placed.placement):
        if (block, reducer.name) not in learned:
            lacks = f"the training has none at block {block}" if training else "this arm has no training"
            raise file.error(
                placed.place,
                f"{reducer.name} works only after training, and {lacks}; add `training: {{stages: …}}` that places it "
                f"there, as specs/trained_methods.yaml does, or use `sievit train {reducer.name}`",
            )


def _trained(placement: Placement) -> Iterator[tuple[int, TokenReducer]]:
    """Every reducer that must be trained, selectors and members of stacks included, with its block."""
    for block, reducer in placement.blocks.items():
        for member in with_nested(reducer):
            if member.traits.trained:
                yield block, member


def _placed(
    file: SpecFile, place: Place, written: list[dict[str, Any]], values: Mapping[str, Any], facts: ModelFacts
) -> Placed:
    stages: list[dict[str, Any]] = []
    for number, stage in enumerate(written):
        try:
            blocks = _blocks(substitute(stage["at"], values), facts)
        except ReducerError as error:
            raise file.error((*place, number, "at"), f"{error} (model {facts.name})") from error
        stack = substitute(stage["stack"], values)
        if not isinstance(stack, list) or not stack:
            raise file.error((*place, number, "stack"), f"a stack is a list of reducers; got {stack!r:.80}")
        stages.append({"at": blocks, "stack": stack})
    kinds = sorted(free_kinds(stages))
    if len(kinds) > 1:
        raise file.error(
            place, f"several kinds of budget are auto ({', '.join(kinds)}): one cost decides one kind; use the same"
        )
    kind = kinds[0] if kinds else None
    _check_schedules(file, place, stages)
    stood = stand_in(kind, stages, facts.patches) if kind else 0
    built: list[dict[str, Any]] = write(stages, kind, stood) if kind else stages
    for number, stage in enumerate(built):
        for index, reducer in enumerate(stage["stack"]):
            _check_reducer(file, (*place, number, "stack", index), reducer)
    try:
        if sought_schedules(stages):  # which blocks act is known once the total is: it must be able to at all of them
            placement = placement_from(without_schedules(built), depth=facts.depth)
            spec = placement_from(built, depth=facts.depth).spec()
        else:
            placement = placement_from(built, depth=facts.depth, patches=facts.patches)
            spec = placement.spec()
    except _BUILD_ERRORS as error:
        raise file.error(place, _reason(error)) from error
    return Placed(stages, placement, Stages.of(free(spec, kind, stood) if kind else spec), kind, place)


def _check_schedules(file: SpecFile, place: Place, stages: StageList) -> None:
    """What is sought with a schedule is one total for all that is sought."""
    seeking = [reducer for stage in stages for reducer in stage["stack"] if free_kinds(reducer)]
    scheduled = [reducer for reducer in seeking if "schedule" in reducer]
    if not scheduled:
        return
    if len(scheduled) < len(seeking):
        raise file.error(
            place,
            "a total with a schedule and a drop at each block are sought together, and one number cannot be both; give "
            "the others `schedule: flat`",
        )
    for reducer in scheduled:
        if isinstance(reducer["schedule"], list):
            raise file.error(place, "a listed schedule is its own budget: nothing is left to seek; write {late: 2}")
        if sum(AUTO in budget.values() for budget in budgets_in(reducer)) > 1:
            raise file.error(
                place, f"{reducer.get('name')} seeks two budgets, and the schedule is of one; write a number"
            )


def _stages_place(spec: AblationSpec, place: Place) -> Place:
    """Where the stages are written: in the arm, or in ``base`` where the arm gives none."""
    own = isinstance(place[1], int) and spec.arms[place[1]].stages is not None
    return (*(place if own else ("base",)), "stages")


def _blocks(where: Any, facts: ModelFacts) -> list[int]:
    """Block indices of a stage, each inside the network and named once."""
    depth = facts.depth
    if isinstance(where, str):
        if any(len(digits) > 4 for digits in re.findall(r"\d+", where)):  # before a range is written out
            raise ReducerError(f"{where!r} is outside the network: its {depth} blocks count from 0 to {depth - 1}")
    elif isinstance(where, list):  # ["$first", 6] has been substituted; ["3-5", 9] is two ways at once
        where = [int(b) if isinstance(b, str) and re.fullmatch("[0-9]{1,4}", b) else b for b in where]
    blocks = parse_blocks(where, depth, facts.first_free)
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
        placement_from([{"at": [0], "reducer": dict(reducer)}]) if "schedule" in reducer else build(dict(reducer))
    except _BUILD_ERRORS as error:
        raise file.error(place, _reason(error)) from error


def _reason(error: BaseException) -> str:
    """A reducer's own message; anything else is a value of a kind that no reducer takes."""
    if isinstance(error, ReducerError):
        return str(error)
    return f"a value of the wrong kind ({type(error).__name__}: {error}); see `sievit list --reducers`"
