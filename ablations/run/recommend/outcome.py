"""What a call came to, for people, for Python and for the page: sentences, placement files and ``recommend.json``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ablations.measure.finetune.given import GIVEN, weights_file
from ablations.measure.opening import Subject
from ablations.records.names import RECOMMENDATION, RECOMMENDED
from ablations.run.recommend.call import Call, Entry, Found, Goal
from ablations.search.parts import difference_seen
from ablations.search.race import Standing
from ablations.search.verdict import winner
from ablations.store.store import Store
from ablations.trial.given import given_of, short_name
from ablations.trial.stages import AS_USUAL, OFF_THE_SHELF, HostOptions, Stages, Training
from ablations.version import own_version
from reducers.placement_file import placement_text

FORMAT = 1  # of the record
_HEADING = '# written by `sievit recommend`; in Python: reducers.load("this file"), in a run: --specs this file\n'


def outcome(call: Call, found: Found, *, seen: int, tests: int) -> dict[str, Any]:
    """What one goal came to, as plain data.

    Args:
        call: the call, confirmed.
        found: its goal.
        seen: how often the confirmation images were looked at before.
        tests: comparisons that Holm's correction went over.
    """
    won = winner([entry.comparison for entry in found.finalists if entry.comparison is not None])
    chosen = found.comparator if won is None else found.finalists[won]
    race = found.search
    told = {
        "goal": {"name": found.goal.name, "share": found.goal.share, "speed": found.goal.speed},
        "recommended": _entry(call, chosen),
        "better": won is not None,
        "comparator": _entry(call, found.comparator),
        "finalists": [_entry(call, entry) for entry in found.finalists],
        "others": [_entry(call, entry) for entry in found.others if entry.confirmed is not None],
        "candidates": race.asked,
        "search_images": len(call.parts.search),
        "confirmation_images": len(call.parts.confirmation),
        "calibration_images": len(call.subject.calibration or ()),
        "seen_before": seen,
        "tests": tests,
        "singles": [_searched(one) for one in found.singles],
        "complete": [_searched(one) for one in race.complete],
        "left_out": [list(each) for each in found.failed],
        "untrained": " without training" if call.wishes.given else "",  # what the comparator is
        "weights": _beside(found.goal, chosen.proposal.training),
    }
    return {**told, "sentences": sentences(told, metric=call.context.task.metric)}


def _searched(one: Standing) -> dict[str, Any]:
    return {"label": one.candidate.label, "search": one.mean}


def _entry(call: Call, entry: Entry) -> dict[str, Any]:
    looked = entry.confirmed
    assert looked is not None, "what is shown was confirmed"
    low, high = call.context.task.interval(looked.values)
    gmacs = float(looked.gmacs.mean())
    told: dict[str, Any] = {
        "label": entry.proposal.label,
        "control": entry.control,
        "trained": short_name(entry.proposal.training) if entry.proposal.training else None,
        "stages": Stages(looked.row["reducer"]).plain(),
        "asked": entry.proposal.stages.plain(),
        "key": looked.row["key"],
        "search": entry.standing.mean,
        "value": float(looked.values.mean()),
        "low": low,
        "high": high,
        "gmacs": gmacs,
        "share": gmacs / call.context.dense.gmacs,
    }
    if entry.comparison is not None:
        one = entry.comparison
        told["difference"] = {"mean": one.difference, "low": one.low, "high": one.high, "p": one.p,
                              "adjusted": one.adjusted, "better": one.better, "worse": one.worse}  # fmt: skip
    return told if entry.timed is None else {**told, "timed": entry.timed}


def _training(call: Call, entry: Mapping[str, Any]) -> Training:
    """The training whose weights an entry has."""
    named = {short_name(training): training for training in call.wishes.given}
    return named[entry["trained"]] if entry["trained"] else OFF_THE_SHELF


def _source(subject: Subject) -> str:
    """The library that opens the model by its name: ``timm``, ``transformers``, or nothing for a shipped one."""
    return "" if subject.facts.weights == "embedded" else "transformers" if subject.facts.name[:3] == "hf:" else "timm"


# --- words ------------------------------------------------------------------------------------------------------------


def sentences(told: Mapping[str, Any], *, metric: str) -> list[str]:
    """The verdict in three: what to use, how sure that is, and what it rests on."""
    chosen, other, images = told["recommended"], told["comparator"], told["confirmation_images"]
    best_single = f"the best single published method{told.get('untrained', '')} on the search images"
    cost = _cost(told["goal"])
    if told["better"]:
        first = (
            f"{cost}, use {chosen['label']}: {_percent(chosen)} {metric} on {images:,} images that the search never "
            f"saw, where {other['label']}, {best_single}, has {_percent(other)}."
        )
        second = f"The gain of {_difference(chosen['difference'])} is told apart{_tests(told['tests'])}."
    else:
        first = (
            f"{cost}, use {other['label']}, {best_single}: nothing found is shown to be better; it has "
            f"{_percent(other)} {metric} on {images:,} images that the search never saw."
        )
        best = max(told["finalists"], key=lambda one: one["search"], default=None)
        second = (
            f"The best of what was found, {best['label']}, differs from it by {_difference(best['difference'])} there, "
            f"{'told apart as worse' if best['difference']['worse'] else 'not told apart'}{_tests(told['tests'])}; so "
            f"many images tell about {100 * difference_seen(images):.0f} points apart."
            if best is not None
            else f"None of the candidates was better on the {told['search_images']:,} search images."
        )
    fall = 100 * (chosen["search"] - chosen["value"])
    third = (
        f"{told['candidates']} candidates were looked at on up to {told['search_images']:,} search images, on which "
        f"what is recommended had {100 * chosen['search']:.1f} %, {abs(fall):.1f} points "
        f"{'more' if fall >= 0 else 'less'} than on the confirmation images; {_seen(told['seen_before'])}."
    )
    return [first, second, third]


def _cost(goal: Mapping[str, Any]) -> str:
    if goal["speed"] is not None:
        return f"To run {goal['speed']:g} times as fast as the dense model on this machine"
    return f"At {100 * goal['share']:g} % of the dense model's cost"


def _percent(one: Mapping[str, Any]) -> str:
    return f"{100 * one['value']:.1f} % [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


def _difference(one: Mapping[str, Any]) -> str:
    return (
        f"{100 * one['mean']:+.1f} points [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}] "
        f"(p = {one['adjusted']:.2g})"
    )


def _tests(count: int) -> str:
    return f" (Holm's correction over {count} tests)" if count > 1 else ""


def _seen(times: int) -> str:
    if not times:
        return "the confirmation images were looked at once"
    often = f"{times} time{'s' if times > 1 else ''}"
    return f"the confirmation images were seen {often} before, so that this is a little flattering"


# --- files ------------------------------------------------------------------------------------------------------------


def placement_file(
    goal: Goal, told: Mapping[str, Any], subject: Subject, *, training: Training = OFF_THE_SHELF,
    host: HostOptions = AS_USUAL,
) -> str:  # fmt: skip
    """The YAML of a placement file: a spec of one arm, and what it was recommended for; beside it lie the weights of
    a ``training``.
    """
    chosen, facts, metric = told["recommended"], subject.facts, subject.task.metric
    digests = given_of(training)
    beside = {what: {"file": file, "digest": digests[what]} for what, file in _beside(goal, training).items()}
    about = {
        "sievit": own_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": facts.name,
        "weights": facts.weights,
        "weights_digest": facts.weights_digest,
        "depth": facts.depth,
        "patches": facts.patches,
        "workload": subject.target.workload,
        "data_digest": subject.target.data_digest,
        "task": subject.target.task,
        "cost": round(chosen["share"], 6),
        "speed": goal.speed,
        metric: round(chosen["value"], 6),
        "interval": [round(chosen["low"], 6), round(chosen["high"], 6)],
        "images": told["confirmation_images"],
        "better_than": told["comparator"]["label"] if told["better"] else None,
        "candidates": told["candidates"],
        **({"trained": beside} if beside else {}),
        **({"host": dict(host.data)} if host else {}),
    }
    return _HEADING + placement_text(
        Stages.of(chosen["stages"]).placement(facts.depth),
        about,
        name=f"recommended_{goal.name.replace('-', '_').replace('.', '_')}",
        title=f"Recommended for {facts.name}"[:120],
        variant=chosen["label"][:120],
        question=" ".join(told["sentences"]),
    )


def _beside(goal: Goal, training: Training) -> dict[str, str]:
    """The files of trained weights beside a placement file, by "reducers" and "model"."""
    return {what: f"{goal.name}.{what}.safetensors" for what, digest in given_of(training).items() if digest}


def write(out: Store, call: Call, told: list[dict[str, Any]], found: list[Found]) -> list[str]:
    """``OUT/recommended/*.yaml``, the weights beside them, and ``OUT/recommend.json``; the placement files' names."""
    names = []
    for one, goal in zip(told, (each.goal for each in found), strict=True):
        name = f"{RECOMMENDED}/{goal.name}.yaml"
        training = _training(call, one["recommended"])
        for what in ("reducers", "model"):
            out.delete(f"{RECOMMENDED}/{goal.name}.{what}.safetensors")  # of an earlier call
        for what, file in _beside(goal, training).items():
            kept = f"{GIVEN}/{weights_file(given_of(training)[what])}"
            out.write(f"{RECOMMENDED}/{file}", call.store.storage.read(kept))
        text = placement_file(goal, one, call.subject, training=training, host=call.wishes.host)
        out.write(name, text.encode())
        names.append(name)
    facts, dense = call.subject.facts, call.context.dense
    rungs = len(call.parts.rungs)
    out.write_json(
        RECOMMENDATION,
        {
            "format": FORMAT,
            "version": own_version(),
            "model": facts.name,
            "weights_digest": facts.weights_digest,
            "depth": facts.depth,
            "patches": facts.patches,
            "grid": list(facts.grid),
            "workload": call.subject.target.workload,
            "weights": facts.weights,
            "source": _source(call.subject),
            "host": dict(call.wishes.host.data),
            "trained": [short_name(training) for training in call.wishes.given],
            "task": call.context.task.name,
            "metric": call.context.task.metric,
            "dense": {
                "gmacs": dense.gmacs,
                "search": float(call.pieces.dense(*range(rungs)).mean()),
                "value": float(call.pieces.dense(rungs).mean()),
            },
            "seed": call.wishes.seed,
            "goals": told,
        },
    )
    return names
