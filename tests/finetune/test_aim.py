"""A training whose budget is sought: the plain model's cost decides it, and the result tells what was found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ablations.measure.context import TrialContext, dense_predictions, model_facts
from ablations.measure.evaluate import run_trial
from ablations.measure.finetune.aim import settled
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.spec.plain_yaml import SpecError
from ablations.trial.free_settings import free_kinds
from ablations.trial.recipe import parse_recipe
from ablations.trial.stages import Training
from ablations.trial.target import Target
from ablations.trial.trial import Trial
from ablations.workloads import open_model
from ablations.workloads.embedded import calibration_scenes, embedded_workload
from reducers import reduce_tokens
from tests.finetune.conftest import CPU

TOPK = "[{at: 3, stack: [{name: topk, budget: {count: auto}}]}]"
SPEC = f"""\
name: aim
title: Trained at a cost
base:
  x: target
  target: [0.6]
  stages: {TOPK}
arms:
  - variant: trained
    training: {{target: $target, epochs: 1, images: 8, batch: 4, holdout: 0, seed: $seed, stages: {TOPK}}}
  - {{variant: off the shelf}}
"""


@pytest.fixture
def context(tmp_path: Path, few_scenes: None) -> TrialContext:
    loaded = open_model("pairs_vit_tiny", weights=None, workload_name="embedded")
    facts = model_facts(loaded.model, name="pairs_vit_tiny", weights="embedded", digest="w" * 64, params_m=0.6)
    images = embedded_workload(limit=6)
    dense = dense_predictions(loaded.model, images, batch=6, device=CPU)
    return TrialContext(
        images, loaded.model, facts, dense, CPU, calibration=calibration_scenes(4, 8), cache=tmp_path,
    )  # fmt: skip


def trials(context: TrialContext, text: str = SPEC) -> list[Trial]:
    assert context.calibration is not None
    calibration = context.calibration.digest
    about = Target(context.facts, "embedded", context.workload.digest, len(context.workload), 6, calibration)
    return expand(parse_spec(text), about)


def test_the_budget_in_training_is_the_one_that_meets_the_cost_off_the_shelf(context: TrialContext) -> None:
    trained, plain = trials(context)
    recipe = parse_recipe(trained.training, workload="embedded")
    found = settled(recipe, context)
    assert free_kinds(recipe.stages.data) and not free_kinds(found.stages.data) and not plain.training
    assert found.stages.text == run_trial(plain, context).row["reducer"] and found.target == 0.6
    fast = reduce_tokens(context.model, found.stages.placement(context.facts.depth))
    cost = float(fast.cost(context.workload.batch(0, 2)).mean()) / 1e9
    assert cost == pytest.approx(0.6 * context.dense.gmacs, rel=0.05)


def test_the_result_tells_the_budget_of_its_training(context: TrialContext) -> None:
    trained, _ = trials(context)
    row = run_trial(trained, context).row
    assert json.loads(row["training"]) == settled(parse_recipe(trained.training, workload="embedded"), context).spec()
    assert row["training"] != trained.training.text and row["finetuned"] and row["epochs"] == 1
    fixed = dataclasses.replace(trained, training=Training.of({**json.loads(row["training"]), "target": 0.6}))
    assert run_trial(fixed, context).row["top1"] == row["top1"], "the same training under its own settings"
    assert len(list((context.cache or Path()).glob("finetuned/*.safetensors"))) == 1, "which is not repeated"


def test_the_key_of_a_trial_covers_the_images_its_training_is_calibrated_on(context: TrialContext) -> None:
    alone = SPEC.replace("  target: [0.6]\n", "").replace("x: target", "x: 1").replace("$target", "0.6")
    alone = alone.replace(f"  stages: {TOPK}\narms", "  stages: [{at: 3, stack: [{name: identity}]}]\narms")
    trained, plain = trials(context, alone)
    assert context.calibration is not None
    assert trained.target is None and trained.calibration == context.calibration.digest and plain.calibration == ""


@pytest.mark.parametrize(
    ("change", "to", "expected"),
    [
        ("training: {target: $target, ", "training: {", "a training needs a budget"),
        ("training: {target: $target, ", "training: {target: 1.5, ", r"above 0 and at most 1; got 1\.5"),
        ("training: {target: $target, ", "training: {target: half, ", "target must be a number"),
        (f"seed: $seed, stages: {TOPK}", "seed: $seed", "no budget of this training is free"),
    ],
)
def test_a_mistake_about_the_cost_of_a_training_is_named(
    context: TrialContext, change: str, to: str, expected: str
) -> None:
    assert change in SPEC
    with pytest.raises(SpecError, match=expected):
        trials(context, SPEC.replace(change, to))
