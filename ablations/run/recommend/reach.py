"""Whether a candidate can cost what is asked at all: found out before it counts as one."""

from __future__ import annotations

from ablations.measure.calibrate import REACHED, calibration_batches, cost_of, mean_cost
from ablations.run.recommend.pieces import Pieces
from ablations.trial.free_settings import Setting, free_kinds, ladder, settle
from ablations.trial.stages import Stages, Training
from reducers import Placement, placement_from, reduce_tokens

_NEAR = (0.99, 1.03)  # what a cost on one image may be beside the mean of all


def comes_near(stages: Stages, training: Training, share: float, pieces: Pieces) -> bool:
    """Whether stages that leave one kind of budget open can cost about a share of the dense model: quickly, by the ends
    of their ladder on one calibration image. What leaves none open must cost no more than that as it is.
    """
    context = pieces.context
    if min((block for stage in stages.data for block in stage["at"]), default=0) / context.facts.depth > share:
        return False  # so much is spent before anything acts
    if not free_kinds(stages.data):
        return share_as_it_is(stages, training, pieces) <= share * (1 + REACHED)
    (kind,) = free_kinds(stages.data)
    patches = context.facts.patches
    rungs = ladder(stages.data, kind, patches)
    tuned, load = pieces.with_weights(training)
    image = calibration_batches(tuned)[0][0][:1]

    def cost(rung: Setting) -> float:
        placement = _placed(Stages.of(settle(stages.data, kind, rung, patches)), pieces)
        placement = placement if load is None else load(placement)
        fast = reduce_tokens(tuned.model, placement, host=pieces.host.data).to(context.device).eval()
        return cost_of(fast, [(image, None)], seed=0) / context.dense.gmacs

    return cost(rungs[0]) * _NEAR[0] <= share <= cost(rungs[-1]) * _NEAR[1]


def share_as_it_is(stages: Stages, training: Training, pieces: Pieces) -> float:
    """What stages without an open budget cost on the calibration images, as a share of the dense model's."""
    tuned, load = pieces.with_weights(training)
    placement = _placed(stages, pieces)
    placement = placement if load is None else load(placement)
    return mean_cost(placement, tuned, seed=0, host=pieces.host) / tuned.dense.gmacs


def _placed(stages: Stages, pieces: Pieces) -> Placement:
    facts = pieces.context.facts
    return placement_from(stages.plain(), depth=facts.depth, patches=facts.patches)
