"""Candidates one after the other in this process: each looked at rung by rung, as long as the race lets it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ablations.measure.failures import DeviceError
from ablations.records.storage import StoreError
from ablations.run.recommend.pieces import Pieces, Proposal, TrialFailed
from ablations.search.planner import Candidate
from ablations.search.race import Race
from ablations.trial.stages import Stages
from ablations.trial.trial import Solution

log = logging.getLogger(__name__)

ShareOf = Callable[[Stages], float]
"""The share of the dense model's cost that stages are brought to."""


def search_serially(race: Race, pieces: Pieces, share_of: ShareOf, told: Callable[[Race], None]) -> None:
    """Every candidate that the race has; ``told`` hears of each that ended."""
    while True:
        with pieces.context.profile.measure("planning"):
            candidate = race.ask()
        if candidate is None:
            return
        _try(candidate, race, pieces, share_of(candidate.stages))
        told(race)


def _try(candidate: Candidate, race: Race, pieces: Pieces, share: float) -> None:
    proposal = Proposal.of(candidate, share)
    _, reason = settled(proposal, pieces)
    if reason is not None:
        race.fail(candidate.number, reason)
        return
    on, rung = True, len(race.standings[candidate.number].values)
    while on:
        try:
            looked = pieces.look(proposal, rung)
        except TrialFailed as error:
            race.fail(candidate.number, str(error))
            return
        on, rung = race.report(candidate.number, looked.row["key"], looked.values), rung + 1


def settled(proposal: Proposal, pieces: Pieces) -> tuple[Solution | None, str | None]:
    """A proposal brought to its cost (None where no budget of it is open), and why that is not possible, or None.

    Raises:
        StoreError, DeviceError: nothing can be computed any more.
    """
    try:
        solution = pieces.settle(proposal)
    except (StoreError, DeviceError):
        raise
    except Exception as error:  # any failure of a candidate is its end, and no one else's
        log.debug("candidate %s cannot be settled", proposal.label, exc_info=error)
        return None, f"{type(error).__name__}: {error}"[:400]
    return solution, None if solution is None or solution.reached else solution.note
