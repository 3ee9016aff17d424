"""A training at a cost: ``training: {target: 0.5, stages: [… budget: {count: auto} …]}``.

The budget that the reducer has in training is the one at which the plain model, before any training, costs that share
of its multiply-adds; it is sought on the calibration images, as the target of an evaluation is.
"""

from __future__ import annotations

import dataclasses
import json

from ablations.measure.context import TrialContext
from ablations.trial.free_settings import free_kinds
from ablations.trial.recipe import Recipe
from ablations.trial.trial import Trial, canonical_json


def settled(recipe: Recipe, context: TrialContext) -> Recipe:
    """The recipe with the budget that was found written in; its ``target`` stays, to be told. Others as they are."""
    from ablations.measure.calibrate import solve  # which knows trained reducers, and so this package

    if not free_kinds(list(recipe.stages)):
        return recipe
    facts, images = context.facts, context.workload
    trial = Trial(
        spec="training",
        variant="the reducer in training",
        x=None,
        stages=canonical_json(recipe.stages),
        model=facts.name,
        weights=facts.weights,
        weights_digest=facts.weights_digest,
        workload=images.name,
        data_digest=images.digest,
        images=len(images),
        batch=1,
        seed=0,  # of whatever seed the training is: they share what is tried
        target=recipe.target,
    )
    return dataclasses.replace(recipe, stages=tuple(json.loads(solve(trial, context).stages)))
