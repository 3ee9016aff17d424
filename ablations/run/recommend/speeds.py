"""Goals of speed: the cost at which each method reaches a speed here, and finalists that are timed alone.

A method is timed once, in turn with the dense model, at the cost that would do if time followed cost; how far it falls
short says at which cost it is fast enough. Finalists are timed again, and offered only where they are.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping

from ablations.measure.context import device_name
from ablations.measure.speed import measure_speed
from ablations.run.recommend.call import Call, Entry, Found, Goal
from ablations.run.recommend.pieces import Proposal
from ablations.run.recommend.reach import share_as_it_is
from ablations.run.recommend.serial import ShareOf, settled
from ablations.search.errors import SearchError
from ablations.search.space import names_of
from ablations.trial.stages import Stages

log = logging.getLogger(__name__)

_RESERVE = 0.97  # of the cost at which a speed is just met: a second timing is another
_LEAST = 0.05  # share of the dense model's cost below which nothing is tried


def shares_at_speed(call: Call, goal: Goal) -> tuple[float, ShareOf]:
    """The cost at which each candidate is brought to a speed: that of its slower method.

    A search that goes on keeps the costs it began with: another timing gives others, and candidates not comparable.

    Raises:
        SearchError: no method reaches it on this machine.
    """
    shares = call.begun_with(goal, _machine(call)) or _timed_shares(call, goal)
    call.begin_with(goal, _machine(call), shares)

    def share_of(stages: Stages) -> float:
        return min(shares.get(name, 0.0) for name in names_of(stages.data))

    return max(shares.values()), share_of


def _machine(call: Call) -> str:
    return f"{platform.node()}, {device_name(call.context.device)}"


def _timed_shares(call: Call, goal: Goal) -> dict[str, float]:
    """Each method's cost, timed now."""
    assert goal.speed is not None
    shares: dict[str, float] = {}
    best: tuple[float, str] = (0.0, "")
    guess = min(0.95, 1 / goal.speed)
    for name, proposal in call.each_method(guess).items():
        ratio = timed(call, proposal)
        if ratio is None:
            continue
        best = max(best, (ratio["speedup"], name))
        needed = _RESERVE * ratio["share"] * ratio["speedup"] / goal.speed
        log.info("%s at %.0f %% of the cost is %.2f times as fast: %s", name, 100 * ratio["share"], ratio["speedup"],
                 f"tried at {100 * needed:.0f} %" if needed >= _LEAST else "out of its reach")  # fmt: skip
        if needed >= _LEAST:
            shares[name] = min(0.98, needed)
    if not shares:
        raise SearchError(
            f"no method is {goal.speed:g} times as fast as the dense model on this machine (the best, {best[1]}, is "
            f"{best[0]:.2f} times as fast at {100 * guess:.0f} % of the cost): ask for less, or try larger batches"
        )
    return shares


def timed(call: Call, proposal: Proposal) -> Mapping[str, float] | None:
    """A placement's speed beside the dense model's, alone on the machine; None where it does not reach its cost."""
    solution, reason = settled(proposal, call.pieces)
    if reason is not None:
        return None
    if solution is None:
        share = share_as_it_is(proposal.stages, proposal.training, call.pieces)
    else:
        share = solution.calibration_gmacs / call.context.dense.gmacs
    trial = call.pieces.trial(proposal, len(call.parts.rungs))
    columns = measure_speed(trial, call.context, stages=proposal.stages if solution is None else solution.stages)
    return {"share": share, **{name: columns[name] for name in ("speedup", "speedup_low", "speedup_high")}}


def meet_speed(call: Call, found: Found) -> None:
    """Time the finalists and the single methods, and leave out who is too slow.

    Raises:
        SearchError: no single method is fast enough when it is timed again.
    """
    speed = found.goal.speed
    assert speed is not None

    def fast(entry: Entry) -> bool:
        times = timed(call, entry.proposal)
        entry.timed = None if times is None else dict(times)
        return times is not None and times["speedup_low"] >= speed

    found.finalists = [entry for entry in found.finalists if fast(entry)]
    singles = [found.comparator, *(entry for entry in found.others if not entry.control)]
    kept = [entry for entry in singles if fast(entry)]
    if not kept:
        call.forget(found.goal)  # the next call times everything again
        raise SearchError(
            f"no single method was {speed:g} times as fast when it was timed again; other work on this machine may "
            "have taken its time: try again when it is idle, or ask for less"
        )
    controls = [entry for entry in found.others if entry.control]
    found.comparator, found.others = kept[0], [*kept[1:], *controls]
