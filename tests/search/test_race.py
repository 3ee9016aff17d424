"""Races: who goes on, who is the incumbent, and a search that was stopped stands where it stood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablations.search.errors import SearchError
from ablations.search.journal import Journal
from ablations.search.planner import Candidate, Listed, Sampled
from ablations.search.race import Race
from ablations.search.rungs import goes_on
from ablations.search.space import Method, Space, describe, starts, trained
from ablations.trial.given import given_training
from ablations.trial.stages import Stages
from tests.samples import sampled
from tests.search.conftest import paired

RUNGS = (16, 48, 64)  # images that each rung adds
IMAGES = sum(RUNGS)
SPACE = Space((Method("tome"), Method("topk"), Method("evit")), tuple(range(6)))
DENSE = np.ones(IMAGES)


def accuracy(stages: Stages) -> float:
    """A world with a known best: EViT alone, from block 2 on, at three blocks."""
    found = 0.4
    first = stages.data[0]
    found += 0.15 * (len({reducer["name"] for stage in stages.data for reducer in stage["stack"]}) == 1)
    found += 0.2 * (first["stack"][0]["name"] == "evit") + 0.1 * (first["at"][0] == 2)
    return found + 0.1 * (sum(len(stage["at"]) for stage in stages.data) == 3)


def values(text: str, number: int, rung: int) -> np.ndarray:
    start = sum(RUNGS[:rung])
    candidate = Candidate(number, Stages(text), "")
    digits = sum(map(ord, text)) % 2**32  # hash() differs from process to process
    hard, own = np.random.default_rng(0).random(IMAGES), np.random.default_rng(digits).random(IMAGES)
    right = (0.7 * hard + 0.3 * own) < accuracy(candidate.stages)
    return right.astype(float)[start : start + RUNGS[rung]]


def planner(size: int = 40, seed: int = 0) -> Sampled:
    return Sampled(SPACE, size=size, seed=seed, label=describe, fits=lambda *_: None)


def race(events: list[dict[str, Any]] | None = None, *, size: int = 40, seed: int = 0, **more: Any) -> Race:
    keep = None if events is None else events.append
    return Race(planner(size, seed), rungs=len(RUNGS), dense=DENSE, test=paired, keep=keep, **more)


def run(one: Race, *, steps: int | None = None, results: dict[str, np.ndarray] | None = None) -> int:
    """Carry a race out, or so many rungs of it; the rungs that were computed."""
    done = 0
    while (candidate := one.ask()) is not None:
        on = True
        while on:
            if steps is not None and done >= steps:
                return done
            rung = len(one.standings[candidate.number].values)
            key = f"{candidate.number}/{rung}"
            found = values(candidate.stages.text, candidate.number, rung)
            if results is not None:
                assert key not in results, "nothing is computed twice"
                results[key] = found
            on, done = one.report(candidate.number, key, found), done + 1
    return done


@pytest.mark.parametrize("size", sampled([40, 80], quick=[40]))
def test_the_known_best_of_a_space_is_found(size: int) -> None:
    one = race(size=size)
    run(one)
    assert one.incumbent is not None
    best = one.incumbent.candidate.stages
    names = {reducer["name"] for stage in best.data for reducer in stage["stack"]}
    assert names == {"evit"} and accuracy(best) >= 0.85


def test_most_candidates_end_early_and_none_is_proposed_twice() -> None:
    one = race(size=60)
    computed = run(one)
    texts = [standing.candidate.stages.text for standing in one.standings.values()]
    assert len(set(texts)) == len(texts) == 60
    assert 60 < computed < 60 * len(RUNGS) / 1.5
    assert one.complete and all(standing.ended for standing in one.standings.values() if not standing.complete)


def test_one_seed_makes_one_search_and_another_seed_another() -> None:
    found = []
    for seed in (0, 0, 1):
        events: list[dict[str, Any]] = []
        run(race(events, size=20, seed=seed))
        found.append(events)
    assert found[0] == found[1] != found[2]


def test_the_journal_carries_what_was_trained_and_other_weights_make_another_search() -> None:
    stages = Stages.of([{"at": [1, 2], "stack": [{"name": "topk", "budget": {"ratio": 0.7}}]}])
    events: list[dict[str, Any]] = []

    def begun(letter: str) -> Race:
        given = given_training(stages, model=letter * 64, reducers="")
        space = Space(SPACE.methods, SPACE.free, given=(trained(given, lambda stages: None),))
        made = Sampled(space, size=12, seed=0, label=describe, fits=lambda *_: None, starts=starts(space))
        return Race(made, rungs=len(RUNGS), dense=DENSE, test=paired, keep=events.append)

    results: dict[str, np.ndarray] = {}
    run(begun("a"), steps=9, results=results)
    told = list(events)
    named = [event["training"] for event in told if event["event"] == "asked" and "training" in event]
    assert len(named) >= 2 and all("a" * 64 in text for text in named)
    again = begun("a")
    again.resume(told, lambda key, rung: results[key])
    run(again, results=results)
    assert again.asked == 12
    with pytest.raises(SearchError, match="another search"):
        begun("c").resume(told, lambda key, rung: results[key])


@pytest.mark.parametrize("steps", [0, 1, 7, 30])
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(steps: int, tmp_path: Path) -> None:
    whole: list[dict[str, Any]] = []
    run(race(whole))
    journal = Journal(tmp_path / "search.jsonl", identity=["a"])
    results: dict[str, np.ndarray] = {}
    first = Race(planner(), rungs=len(RUNGS), dense=DENSE, test=paired, keep=lambda event: journal.add("s", event))
    run(first, steps=steps, results=results)
    again = Journal(tmp_path / "search.jsonl", identity=["a"])
    second = Race(planner(), rungs=len(RUNGS), dense=DENSE, test=paired, keep=lambda event: again.add("s", event))
    second.resume(again.of("s"), lambda key, rung: results[key])
    run(second, results=results)
    assert [{name: value for name, value in event.items() if name != "phase"} for event in again.of("s")] == whole
    assert (
        second.incumbent is not None
        and second.incumbent.candidate.number
        == max(second.complete, key=lambda one: (one.mean, -one.candidate.number)).candidate.number
    )


def test_a_journal_of_another_search_is_not_gone_on_with() -> None:
    events: list[dict[str, Any]] = []
    run(race(events, size=12))
    with pytest.raises(SearchError, match="another search"):
        race(size=12, seed=5).resume(events, lambda key, rung: np.zeros(RUNGS[rung]))
    with pytest.raises(SearchError, match="is gone"):
        race(size=12).resume(events, lambda key, rung: None)


def test_a_journal_drops_a_line_that_was_cut_short_and_begins_anew_for_another_identity(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    journal = Journal(path, identity={"seed": 0})
    journal.add("a", {"event": "asked", "number": 0, "stages": "[]"})
    journal.add("b", {"event": "asked", "number": 0, "stages": "[]"})
    path.write_text(path.read_text() + '{"phase": "a", "ev')
    again = Journal(path, identity={"seed": 0})
    assert len(again.of("a")) == len(again.of("b")) == 1
    again.add("a", {"event": "failed", "number": 0, "reason": "x"})
    assert len(Journal(path, identity={"seed": 0}).of("a")) == 2
    again.forget("a")
    assert [json.loads(line).get("phase") for line in path.read_text().splitlines()] == [None, "b"]
    assert Journal(path, identity={"seed": 1}).of("b") == []


def test_a_candidate_that_is_worse_on_the_same_images_ends_whatever_its_place() -> None:
    best, worse = np.ones(40), np.array([0.0] * 8 + [1.0] * 32)
    on, why = goes_on(worse, best, [0.1], test=paired)
    assert not on and "worse" in why
    assert goes_on(worse, best[::1] * 0 + worse, [0.1], test=paired) == (True, "")


def test_of_those_that_reached_a_rung_the_better_third_goes_on() -> None:
    mean = np.array([1.0] * 6 + [0.0] * 4)  # 0.6
    assert goes_on(mean, None, [0.9] * 5, test=paired)[0], "too few are known yet"
    assert not goes_on(mean, None, [0.9] * 6, test=paired)[0]
    assert goes_on(mean, None, [0.9, 0.9, 0.1, 0.1, 0.1, 0.1], test=paired)[0]
    assert not goes_on(mean, None, [0.9, 0.9, 0.9, 0.1, 0.1, 0.1], test=paired)[0]


def test_without_halving_every_candidate_is_looked_at_whole() -> None:
    listed = Listed([(f"{place}", stages_of(name)) for place, name in enumerate(("tome", "topk", "evit"))])
    one = Race(listed, rungs=len(RUNGS), dense=DENSE, test=paired, halving=False)
    assert run(one) == 3 * len(RUNGS)
    assert one.complete[0].candidate.label == "2"
    assert listed.values[2] == pytest.approx(one.complete[0].mean - 1)


def test_a_candidate_without_a_value_does_not_end_the_search() -> None:
    one, tried = race(size=30), 0
    while (candidate := one.ask()) is not None:
        tried += 1
        if candidate.number % 2:
            one.fail(candidate.number, "the cost is out of its reach")
            continue
        while one.report(
            candidate.number, "k", values(candidate.stages.text, 0, len(one.standings[candidate.number].values))
        ):
            pass
    assert tried == 30 and one.complete
    assert sum(standing.ended == "the cost is out of its reach" for standing in one.standings.values()) == 15


def stages_of(name: str) -> Stages:
    return Stages.of([{"at": [2, 3, 4], "stack": [{"name": name, "budget": {"ratio": "auto"}}]}])


@pytest.mark.parametrize(
    ("event", "changed"),
    [(1, {"key": None}), (1, {"number": None}), (1, {"number": [0]}), (1, {"event": "wrong"}), (0, {"stages": None})],
)
def test_a_journal_with_a_damaged_event_is_refused_and_not_half_believed(event: int, changed: dict[str, Any]) -> None:
    events: list[dict[str, Any]] = []
    results: dict[str, np.ndarray] = {}
    run(race(events), steps=6, results=results)
    assert [one["event"] for one in events[:2]] == ["asked", "rung"]
    race().resume(events, lambda key, rung: results[key])  # whole, it is taken
    told = {name: value for name, value in {**events[event], **changed}.items() if value is not None}
    with pytest.raises(SearchError):
        race().resume([*events[:event], told, *events[event + 1 :]], lambda key, rung: results[key])


def test_a_candidate_whose_worker_was_lost_is_tried_again_by_a_search_that_goes_on() -> None:
    events: list[dict[str, Any]] = []
    results: dict[str, np.ndarray] = {}
    one = race(events, size=12)
    run(one, steps=5, results=results)
    (number,) = (number for number, each in one.standings.items() if not (each.ended or each.complete))
    one.lose(number, "lost")
    run(one, results=results)
    again = race(events, size=12)
    again.resume(list(events), lambda key, rung: results[key])
    assert len(again.standings) == 12 and not again.standings[number].ended
    run(again, results=results)
    assert again.standings[number].values and (again.standings[number].ended or again.standings[number].complete)
    third = race(size=12)
    third.resume(events, lambda key, rung: results[key])
    assert third.ask() is None and third.complete == third.complete
    assert {n: (each.keys, each.ended) for n, each in third.standings.items()} == {
        n: (each.keys, each.ended) for n, each in again.standings.items()
    }
