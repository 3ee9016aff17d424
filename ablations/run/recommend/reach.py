"""Whether a candidate can cost what is asked at all: found out before it counts as one."""

from __future__ import annotations

from ablations.measure.calibrate import calibration_batches, cost_of
from ablations.measure.context import TrialContext
from ablations.trial.free_settings import Setting, free_kinds, ladder, settle
from ablations.trial.stages import Stages
from reducers import placement_from, reduce_tokens

_NEAR = (0.99, 1.03)  # what a cost on one image may be beside the mean of all


def comes_near(stages: Stages, share: float, context: TrialContext) -> bool:
    """Whether stages that leave one kind of budget open can cost about a share of the dense model: quickly, by the ends
    of their ladder on one calibration image.
    """
    if min((block for stage in stages.data for block in stage["at"]), default=0) / context.facts.depth > share:
        return False  # so much is spent before anything acts
    (kind,) = free_kinds(stages.data)
    patches, depth = context.facts.patches, context.facts.depth
    rungs = ladder(stages.data, kind, patches)
    image = calibration_batches(context)[0][0][:1]

    def cost(rung: Setting) -> float:
        placement = placement_from(settle(stages.data, kind, rung, patches), depth=depth, patches=patches)
        fast = reduce_tokens(context.model, placement).to(context.device).eval()
        return cost_of(fast, [(image, None)], seed=0) / context.dense.gmacs

    return cost(rungs[0]) * _NEAR[0] <= share <= cost(rungs[-1]) * _NEAR[1]
