"""Calibration to equal cost: the setting at which a method costs what a trial's target asks for.

A target is a share of the dense model's multiply-adds. One setting is free (``auto``): K, a keep rate, the tokens
dropped at a block, or the total of a schedule; its ladder of values rises in cost, and the rung whose mean cost over
the calibration images is nearest is sought by bisection. Only costs are looked at, never labels, and never an image
that is evaluated.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ablations.measure.context import TrialContext, spans, use_exact_float32
from ablations.measure.failures import halving
from ablations.trial.free_settings import free_kinds, ladder, setting_label, settle
from ablations.trial.stages import AS_USUAL, HostOptions, Stages
from ablations.trial.trial import Solution, Trial, TrialError
from reducers import Placement, placement_from, reduce_tokens
from reducers.runtime import ReducedViT, Shared

REACHED = 0.01  # a target counts as reached within this share of it
_CLOSE = 0.002  # … and this near, the search ends: finer than what the evaluated images will repeat
_BATCH = 32  # images at once; the calibration images stay in memory
LARGE = 128  # pixels of a side from which on the frames of clips are counted
_GIGA = 1e9


@dataclass(frozen=True)
class Found:
    """Where a search ended: the rung, its cost, and on the way there."""

    rung: int
    cost: float
    probes: int
    inside: bool  # the goal lies between the cheapest and the dearest rung
    ends: tuple[float, float]  # their costs


def solve(trial: Trial, context: TrialContext, *, load: Callable[[Placement], Placement] | None = None) -> Solution:
    """The trial's stages with the free setting written in; ``load`` gives a placement's reducers their trained weights.

    The same trial and images give the same solution, whatever has been tried before: ``context.probes`` only spares
    work. A target that cannot be reached gives the nearest attainable cost and says so.
    """
    stages = trial.stages.data
    kinds = free_kinds(stages)
    if trial.target is None or len(kinds) != 1:
        raise TrialError(f"{trial.variant}: calibration needs a target and one kind of budget that is auto")
    (kind,) = kinds
    patches, depth = _patches(trial, context), context.facts.depth
    rungs = ladder(stages, kind, patches)
    goal = trial.target * context.dense.gmacs

    def placed(rung: int) -> Placement:
        placement = placement_from(settle(stages, kind, rungs[rung], patches), depth=depth, patches=patches)
        return placement if load is None else load(placement)

    def cost(rung: int) -> float:
        context.beat()
        key = (trial.family, str(rungs[rung]))
        if key not in context.probes:
            context.probes[key] = mean_cost(placed(rung), context, seed=trial.seed, host=trial.host)
        return float(context.probes[key])

    found = search(cost, len(rungs), goal)
    setting, error = setting_label(kind, rungs[found.rung], stages, patches), found.cost / goal - 1
    reached = abs(error) <= REACHED
    return Solution(
        stages=Stages.of_placement(placed(found.rung)),
        setting=setting,
        target_gmacs=goal,
        calibration_gmacs=found.cost,
        probes=found.probes,
        reached=reached,
        note="" if reached else _note(found, setting, error, dense=context.dense.gmacs),
    )


def _patches(trial: Trial, context: TrialContext) -> int:
    """How many a budget counts, which the way in which the model is driven may say: of a frame or of a clip."""
    if not trial.host:
        return context.facts.patches
    return reduce_tokens(context.model, Placement(), host=trial.host.data).host.patches


def search(cost: Callable[[int], float], rungs: int, goal: float) -> Found:
    """The rung 0 … ``rungs`` - 1 whose cost is nearest to ``goal``; costs should rise from rung to rung.

    Bisection that first looks where a straight line through the ends of the bracket meets the goal, and halves where
    that did not. It stops early at a cost within 0.2 % of the goal; of two rungs equally near, the cheaper is taken.
    What is looked at depends on the costs alone.
    """
    low, high = 0, rungs - 1
    known = {rung: cost(rung) for rung in (low, high)}
    ends = known[low], known[high]
    inside = known[low] <= goal <= known[high]
    halve = False
    while inside and high - low > 1 and min(abs(c - goal) for c in known.values()) > _CLOSE * goal:
        span = known[high] - known[low]
        share = 0.5 if halve or span <= 0 else (goal - known[low]) / span
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        known[middle] = cost(middle)
        before = high - low
        low, high = (middle, high) if known[middle] <= goal else (low, middle)
        halve = 2 * (high - low) > before
    best = min(known, key=lambda rung: (abs(known[rung] - goal), rung))
    return Found(best, known[best], len(known), inside, ends)


def mean_cost(placement: Placement, context: TrialContext, *, seed: int, host: HostOptions = AS_USUAL) -> float:
    """Mean GMACs per calibration image; one image is enough for a method that treats all alike.

    Where the GPU's memory runs out, with half as many images at once from then on: what an image costs does not depend
    on those beside it.
    """
    use_exact_float32()
    fast = reduce_tokens(context.model, placement, host=host.data).to(context.device).eval()
    views = context.workload.views  # each costs by itself, and a clip costs them all
    if not any(member.traits.adaptive for member in fast.members()):
        return views * cost_of(fast, [(calibration_batches(context)[0][0][:1], None)], seed=seed)
    return views * halving(
        lambda at_once: cost_of(fast, calibration_batches(context, at_once=at_once), seed=seed),
        at_once=len(calibration_batches(context)[0][0]) // views,
        what="settings are sought",
    )


@torch.inference_mode()
def cost_of(fast: ReducedViT, batches: Sequence[tuple[Tensor, Shared | None]], *, seed: int) -> float:
    """Mean GMACs per image of these batches; reducers say nothing meanwhile."""
    torch.manual_seed(seed)
    with _quiet():
        costs = torch.cat([fast.cost(images, shared=shared).cpu() for images, shared in batches])
    return float(costs.mean()) / _GIGA


def calibration_batches(context: TrialContext, *, at_once: int | None = None) -> list[tuple[Tensor, Shared]]:
    """The calibration images, at most ``at_once`` in a batch (None: 32; of clips of large frames, so many frames), and
    for each batch what the plain model computes of its first blocks. They stay, and so does their size where it had to
    be made smaller.
    """
    found, workload = context.calibration_batches, context.calibration
    if workload is None:
        raise TrialError("a target is met on calibration images, and this context has none")
    if at_once is None:
        large = workload.frames is not None and workload.pixels.shape[-3] >= LARGE
        at_once = max(1, _BATCH // workload.pixels.shape[1]) if large else _BATCH
    if not found or len(found[0][0]) > at_once * workload.views:
        found.clear()  # before the new ones need its memory
        found.extend(
            (workload.batch(start, stop).to(context.device), Shared()) for start, stop in spans(len(workload), at_once)
        )
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings from the reducers: the ends of a ladder ask for what a method must cut short, on purpose."""
    logger = logging.getLogger("reducers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _note(found: Found, setting: str, error: float, *, dense: float) -> str:
    """Why the target is not met, for people."""
    if found.inside:
        return f"the nearest attainable cost, at {setting}, is {error:+.1%} from the target: the steps are coarse"
    least, most = sorted(found.ends)
    return (
        f"out of reach: this method costs {least / dense:.3g} to {most / dense:.3g} of the dense model here; "
        f"evaluated at the nearest ({setting}, {error:+.1%})"
    )
