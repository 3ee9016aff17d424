"""One call of ``sievit recommend``: singles, search, confirmation, in this order and for every cost that was asked.

Nothing of the confirmation images is looked at before all candidates of all costs are chosen.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from ablations.measure.context import TrialContext
from ablations.measure.opening import Subject
from ablations.run.recommend.pieces import Looked, Pieces, Proposal, TrialFailed
from ablations.run.recommend.reach import comes_near
from ablations.run.recommend.serial import ShareOf
from ablations.run.recommend.singles import Single, singles
from ablations.search.errors import SearchError
from ablations.search.journal import Journal
from ablations.search.parts import Parts
from ablations.search.planner import Listed, Planner, Sampled
from ablations.search.race import Race, Standing
from ablations.search.space import AS_TRAINED, Space, describe, methods, names_of, spread, starts, trained
from ablations.search.verdict import Comparison, compare, finalists
from ablations.store.store import Store
from ablations.trial.code import code_of, runtime_code
from ablations.trial.free_settings import AUTO, StageList, filled
from ablations.trial.stages import AS_USUAL, HostOptions, Stages, Training
from ablations.trial.trial import TrialError, trial_from
from reducers import placement_from, reduce_tokens

log = logging.getLogger(__name__)

SHOWN = 5  # single methods on the confirmation images, the best on the search images among them
OPENINGS = "openings.json"  # when the confirmation images of which search were looked at

Searcher = Callable[[Race, Pieces, ShareOf, Callable[[Race], None]], None]
"""Carries a race out: in this process, or on Ray."""


@dataclass(frozen=True)
class Goal:
    """What a placement is wanted for: a share of the dense model's cost, or a speed."""

    share: float | None = None
    speed: float | None = None

    @property
    def name(self) -> str:
        """``0.50``, ``0.504`` or ``speed-1.50``: what its file is called, another for each number."""
        return _digits(self.share) if self.share is not None else f"speed-{_digits(self.speed or 0.0)}"


@dataclass(frozen=True)
class Wishes:
    """What a person asked for."""

    goals: tuple[Goal, ...]
    candidates: int = 96
    seed: int = 0
    given: tuple[Training, ...] = ()  # whose weights are given, and kept in the store
    host: HostOptions = AS_USUAL  # how the model is driven


@dataclass
class Entry:
    """A placement on the search images, and where it was confirmed on the confirmation images too."""

    standing: Standing
    proposal: Proposal
    control: bool = False
    confirmed: Looked | None = None
    comparison: Comparison | None = None  # with the comparator
    timed: dict[str, float] | None = None


@dataclass
class Found:
    """What one goal came to."""

    goal: Goal
    comparator: Entry
    finalists: list[Entry]
    others: list[Entry]  # further single methods and controls that are looked at beside them
    singles: list[Standing]
    search: Race
    failed: list[tuple[str, str]] = field(default_factory=list)  # singles without a value, and why


class Call:
    """Carries a call out.

    Args:
        subject: the model and the images.
        context: the same, opened, with the dense model's answers.
        parts: the parts of the images.
        store: where the candidates' results are kept.
        wishes: what was asked for.
        searcher: who carries races out.
        told: hears how a race goes, by the name of its phase.
        warm: results of an earlier run on these images.
    """

    def __init__(
        self, subject: Subject, context: TrialContext, parts: Parts, store: Store, *, wishes: Wishes,
        searcher: Searcher, told: Callable[[str, Race], None], warm: Store | None = None,
    ) -> None:  # fmt: skip
        self.subject, self.context, self.parts, self.store = subject, context, parts, store
        self.wishes, self._searcher, self._told = wishes, searcher, told
        self.pieces = Pieces(context, parts, store, batch=subject.target.batch, seed=wishes.seed, warm=warm,
                             host=wishes.host)  # fmt: skip
        self._rungs = len(parts.rungs)
        self._openings()  # a damaged record is told before anything is searched
        self._dense = self.pieces.dense(*range(self._rungs))
        self._journal = Journal(store.out / "searches" / f"{_short(self._identity())}.jsonl", identity=self._identity())

    # --- searching ----------------------------------------------------------------------------------------------------

    def search(self, goal: Goal, share: float, share_of: ShareOf) -> Found:
        """The best single method and the best candidates for a goal, as the search images have it.

        ``share``: of the dense model's cost, where candidates do not have shares of their own by ``share_of``.
        """
        known = self._singles(share)
        if not [single for single in known if not single.control]:
            raise SearchError("this model takes none of the methods of the spec `methods`: there is nothing to compare")
        listed = [(single.label, single.stages) for single in known]
        alone = self._race(partial(Listed, listed), f"singles {goal.name}", share_of, halving=False)
        standing = {one.candidate.stages: one for one in alone.complete}
        entries = {
            single.stages: self._entry(standing[single.stages], share_of, single) for single in known
            if single.stages in standing
        }  # fmt: skip
        published = [
            entries[one.candidate.stages] for one in alone.complete if not entries[one.candidate.stages].control
        ]
        failed = [(one.candidate.label, one.ended) for one in alone.standings.values() if not one.complete]
        failed += self._out_of_reach(share, share_of)
        if not published:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in failed[:3])
            raise SearchError(
                f"no method costs {share:g} of the dense model here ({reasons}); ask for another cost with COST"
            )
        comparator = published[0]
        race = self._race(
            partial(self._planner, share, share_of), f"search {goal.name}", share_of, incumbent=comparator.standing
        )
        best = finalists(race.complete, comparator.standing)
        others = published[1:SHOWN] + [entry for entry in entries.values() if entry.control]
        return Found(
            goal, comparator, [self._entry(one, share_of) for one in best], others, alone.complete, race, failed
        )

    def begun_with(self, goal: Goal, machine: str) -> dict[str, float] | None:
        """The share of each method with which the search for a speed was begun on this machine, if it was."""
        for event in self._journal.of(f"speeds {goal.name}"):
            shares = event.get("shares")
            if event.get("machine") == machine and isinstance(shares, dict) and shares:
                return {str(name): float(share) for name, share in shares.items()}
        return None

    def begin_with(self, goal: Goal, machine: str, shares: Mapping[str, float]) -> None:
        """Keep the shares of a search for a speed; what was searched with others is begun anew."""
        if self.begun_with(goal, machine) != shares:
            self.forget(goal)
            self._journal.add(f"speeds {goal.name}", {"event": "timed", "machine": machine, "shares": dict(shares)})

    def forget(self, goal: Goal) -> None:
        """Begin the search for a goal anew the next time."""
        for phase in ("speeds", "singles", "search"):
            self._journal.forget(f"{phase} {goal.name}")

    def each_method(self, share: float) -> dict[str, Proposal]:
        """Every method of the space, alone: as the spec places it, else at three blocks; of those that must be trained,
        as they were.
        """
        space, found = self._space(), dict[str, Proposal]()
        for single in self._singles(share):
            name = single.stages.data[0]["stack"][0]["name"]
            if not single.control:
                found.setdefault(name, Proposal(single.stages, single.label, share))
        for method in space.methods:
            stages = [{"at": spread(space.free[len(space.free) // 4 :], 3),
                       "stack": [{"name": method.name, "budget": {"ratio": AUTO}}]}]  # fmt: skip
            found.setdefault(method.name, Proposal(Stages.of(stages), describe(stages), share))
        for one in space.given:
            placed, training = next(iter(one.placements.values())), one.training
            for name in names_of(placed):
                found.setdefault(name, Proposal(Stages.of(placed), describe(placed, training), share, training))
        return found

    def _singles(self, share: float) -> list[Single]:
        return singles(self.subject.target, self.subject.loaded.model, share, host=self.wishes.host)

    def _out_of_reach(self, share: float, share_of: ShareOf) -> list[tuple[str, str]]:
        """What was trained and cannot come to a goal in any way, and why."""
        found = []
        for one in self._space(share).given:
            stages = one.placements[AS_TRAINED]
            reasons = [self._why_not(share_of, Stages.of(each), one.training) for each in one.placements.values()]
            if all(reasons):
                found.append((describe(stages, one.training), reasons[0]))
                log.warning("%s is left out: %s", *found[-1])
        return found

    def _why_not(self, share_of: ShareOf, stages: Stages, training: Training) -> str:
        try:
            self._reaches(share_of, stages, training)
        except ValueError as error:
            return str(error)
        return ""

    def _space(self, share: float | None = None) -> Space:
        facts = self.context.facts
        free = tuple(block for block in range(facts.first_free, facts.depth) if block not in facts.closed)
        latest = None if share is None else max(free[0], int(share * facts.depth))
        given = tuple(trained(training, self._fits) for training in self.wishes.given)
        return Space(methods(self._fits, free[0]), free, latest, given)

    def _planner(self, share: float, share_of: ShareOf) -> Planner:
        space = self._space(share)
        return Sampled(
            space, size=self.wishes.candidates, seed=self.wishes.seed, label=describe,
            fits=partial(self._reaches, share_of), starts=starts(space),
        )  # fmt: skip

    def _reaches(self, share_of: ShareOf, stages: Stages, training: Training) -> None:
        """Raises ValueError for what the model cannot carry out, or what does not come near its cost."""
        self._fits(stages.data)
        share = share_of(stages)
        if not comes_near(stages, training, share, self.pieces):
            raise ValueError(f"it cannot cost {share:.3g} of the dense model")

    def _fits(self, stages: StageList) -> object:
        """Raises ValueError for what the model cannot carry out; every free budget counts as one that can."""
        facts = self.context.facts
        one = filled(stages, {"count": max(1, facts.patches // 2), "ratio": Fraction(9, 10), "drop": 1})
        placement = placement_from(one, depth=facts.depth, patches=facts.patches)
        return reduce_tokens(self.context.model, placement, host=self.wishes.host.data)

    def _race(
        self, make: Callable[[], Planner], phase: str, share_of: ShareOf, *, incumbent: Standing | None = None,
        halving: bool = True,
    ) -> Race:  # fmt: skip
        """A race, carried out from where it stands."""

        def begin() -> Race:
            return Race(
                make(), rungs=self._rungs, dense=self._dense, test=self.test, incumbent=incumbent, halving=halving,
                keep=partial(self._journal.add, phase),
            )  # fmt: skip

        race, events = begin(), self._journal.of(phase)
        if events:
            try:
                race.resume(events, self._values)
            except SearchError as error:
                log.info("the search begins anew (%s); finished trials are not computed again", error)
                self._journal.forget(phase)
                race = begin()
        self._searcher(race, self.pieces, share_of, partial(self._told, phase))
        return race

    def _values(self, key: str, rung: int) -> np.ndarray | None:
        """Those of a trial that the journal names; None where it is gone, or other code would compute it by now."""
        looked = self.pieces.known(key, rung)
        return None if looked is None or not _of_today(looked.row["trial"]) else looked.values

    def test(self, first: np.ndarray, second: np.ndarray) -> float:
        """The task's paired test, two-sided."""
        task = self.context.task
        return min(1.0, 2 * min(task.better(first, second), task.better(second, first)))

    # --- confirming ---------------------------------------------------------------------------------------------------

    def confirm(self, found: Iterable[Found]) -> int:
        """Look at the confirmation images, for all goals at once; how often they were looked at before."""
        all_found = list(found)
        entries = [entry for one in all_found for entry in (one.comparator, *one.finalists, *one.others)]
        seen = self._open([self.pieces.trial(entry.proposal, self._rungs).key for entry in entries])
        for number, entry in enumerate(entries, start=1):
            log.info("confirming %d of %d: %s", number, len(entries), entry.proposal.label)
            try:
                entry.confirmed = self.pieces.look(entry.proposal, self._rungs)
            except TrialFailed as error:
                log.warning("%s gave no result on the confirmation images: %s", entry.proposal.label, error)
        for one in all_found:
            if one.comparator.confirmed is None:
                raise SearchError(f"{one.comparator.proposal.label} gave no result to compare with; run it again")
            one.finalists = [entry for entry in one.finalists if entry.confirmed is not None]
        questions = [(_values(one.comparator), [_values(entry) for entry in one.finalists]) for one in all_found]
        for one, comparisons in zip(all_found, compare(questions, test=self.test), strict=True):
            for entry, comparison in zip(one.finalists, comparisons, strict=True):
                entry.comparison = comparison
        return seen

    def _open(self, keys: list[str]) -> int:
        """Record that this search looks at the confirmation images with these trials; how many looked before it."""
        images, known = self.pieces.workload(self._rungs).digest, self._openings()
        search = [_short(self._identity()), *(goal.name for goal in self.wishes.goals)]
        this = {"images": images, "trials": sorted(keys), "search": search}  # the same call again is no new look
        before = known[: known.index(this)] if this in known else known
        if this not in known:
            self.store.write_json(OPENINGS, [*known, this])
        return sum(one["images"] == images for one in before)

    def _openings(self) -> list[Mapping[str, Any]]:
        """Every look at confirmation images that OUT has on record, the first first.

        Raises:
            SearchError: the record is damaged; without it, images that were seen would be called unseen.
        """
        told = self.store.read_json(OPENINGS)
        if told is None and self.store.storage.entry(OPENINGS) is None:
            return []
        if not isinstance(told, list) or any(not isinstance(one, dict) or "images" not in one for one in told):
            raise SearchError(
                f"{self.store.storage.below(OPENINGS)} is damaged, and it alone says how often the confirmation images "
                "were looked at: put it back from a copy, or delete it and take them for seen; nothing else is lost"
            )
        return told

    def _entry(self, standing: Standing, share_of: ShareOf, single: Single | None = None) -> Entry:
        candidate = standing.candidate
        proposal = Proposal.of(candidate, share_of(candidate.stages))
        return Entry(standing, proposal, control=single is not None and single.control)

    def _identity(self) -> list[object]:
        target = self.subject.target
        return [
            target.facts.name, target.facts.weights_digest, target.workload, target.data_digest, target.calibration,
            target.batch, target.task, self.wishes.seed, self.wishes.candidates, runtime_code(target.task),
            *([{"trained": [each.text for each in self.wishes.given]}] if self.wishes.given else []),
            *([{"host": self.wishes.host.text}] if self.wishes.host else []),
        ]  # fmt: skip


def _values(entry: Entry) -> np.ndarray:
    assert entry.confirmed is not None
    return entry.confirmed.values


def _of_today(text: str) -> bool:
    """Whether the code that a trial used is that of today."""
    try:
        trial = trial_from(text)
    except TrialError:
        return False
    return trial.code == code_of(trial)


def _digits(number: float) -> str:
    """Two decimals, or as many as the number has."""
    return text if float(text := f"{number:.2f}") == number else str(number)


def _short(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
