"""A training at a cost: ``training: {target: 0.5, stages: [… budget: {count: auto} …]}``.

The budget that the reducer has in training is the one at which the plain model, before any training, costs that share
of its multiply-adds; it is sought on the calibration images, as the target of an evaluation is.
"""

from __future__ import annotations

import dataclasses

from ablations.measure.context import TrialContext
from ablations.measure.opening import target_of
from ablations.trial.free_settings import free_kinds
from ablations.trial.recipe import Recipe
from ablations.trial.stages import AS_USUAL, HostOptions


def settled(recipe: Recipe, context: TrialContext, host: HostOptions = AS_USUAL) -> Recipe:
    """The recipe with the budget that was found written in; its ``target`` stays, to be told. Others as they are."""
    from ablations.measure.calibrate import solve  # which knows trained reducers, and so this package

    if not free_kinds(recipe.stages.data):
        return recipe
    trial = target_of(context.facts, context.workload, None, batch=1).trial(
        spec="training", variant="the reducer in training", x=None, stages=recipe.stages, target=recipe.target,
        seed=0,  # of whatever seed the training is: they share what is tried
        calibrated=False, host=host,
    )  # fmt: skip
    return dataclasses.replace(recipe, stages=solve(trial, context).stages)
