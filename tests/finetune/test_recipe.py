"""A recipe is refused before anything runs, with the remedy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ablations.measure.finetune.data import epoch_order, images_per_epoch
from ablations.trial.recipe import Distillation, Recipe, RecipeError, parse_recipe
from tests.finetune.conftest import recipe_of

STAGE = {"at": [3], "stack": [{"name": "ats", "budget": {"count": 20}}]}


def test_the_papers_defaults_and_the_embedded_ones() -> None:
    photographs, digits = parse_recipe({}, workload="imagefolder"), parse_recipe("{}", workload="embedded")
    assert (photographs.epochs, photographs.lr, photographs.min_lr, photographs.augment) == (30, 2e-5, 2e-6, "strong")
    assert digits.epochs < 10 and digits.images is not None and not digits.mixes and digits.augment == "light"


def test_a_recipe_is_plain_data_and_back() -> None:
    recipe = recipe_of(stages=[STAGE], distill={"alpha": 0.2}, ema=0.99)
    text = json.dumps(recipe.spec())
    assert parse_recipe(text, workload="embedded") == recipe == parse_recipe(text, workload="imagefolder")
    assert recipe.distill == Distillation(0.2, 1.0)
    assert list(recipe.placement(12).blocks) == [3]
    assert recipe.placement(12).blocks[3] is not recipe.placement(12).blocks[3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'.*did you mean 'epochs'"),
        ({"epochs": 0}, "epochs must be a whole number, 1 or more"),
        ({"epochs": 2.5}, "epochs must be a whole number"),
        ({"batch": True}, "batch must be a whole number"),
        ({"images": 0}, "images must be a whole number"),
        ({"lr": 0}, "lr must be a number, above 0"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"lr": float("inf")}, "lr must be a number"),
        ({"lr": 1e-9}, "min_lr .* is above lr"),
        ({"weight_decay": -1}, "weight_decay must be a number, 0 or more"),
        ({"smoothing": 1.5}, "smoothing must be a number, 0 or more and at most 1"),
        ({"clip": 0}, "clip must be a number, above 0"),
        ({"ema": 2}, "ema must be a number, above 0 and at most 1"),
        ({"amp": "float8"}, "amp 'float8': choose one of none, bfloat16, float16"),
        ({"augment": "weak"}, "augment 'weak': choose one of"),
        ({"mixup": 0.5, "batch": 7}, "make batch 7 even"),
        ({"epochs": 2, "keep_start": 1, "keep_shrink": 2}, "the training ends after 2"),
        ({"epochs": 2, "warmup": 2}, "leaves nothing of 2"),
        ({"distill": 0.5}, "distill is written"),
        ({"distill": {"beta": 1}}, "distill is written"),
        ({"distill": {"tau": 0}}, "distill.tau must be a number, above 0"),
        ({"stages": {"at": 3}}, "stages is a list"),
        ({"stages": [3]}, "stages is a list"),
    ],
)
def test_what_cannot_be_followed_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(settings, workload="embedded")


def test_numbers_of_another_package_become_plain_ones() -> None:
    recipe = Recipe(epochs=np.int64(3), lr=np.float32(0.5), distill=Distillation(alpha=np.float64(0.25)))  # type: ignore[arg-type]
    assert json.dumps(recipe.spec()) == json.dumps(Recipe(epochs=3, lr=0.5, distill=Distillation(alpha=0.25)).spec())
    assert isinstance(Recipe(lr=1).lr, int), "a number as it was written, so that no digest changes"


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_training_is_a_json_mapping(text: str) -> None:
    with pytest.raises(RecipeError, match="training"):
        parse_recipe(text, workload="embedded")


def test_an_epoch_is_a_whole_number_of_updates() -> None:
    assert images_per_epoch(Recipe(batch=8, accumulate=3, images=100), 1000) == 96
    assert images_per_epoch(Recipe(batch=8), 21) == 16
    with pytest.raises(RecipeError, match="lower one of them"):
        images_per_epoch(Recipe(batch=8, accumulate=4), 31)


def test_epochs_walk_through_one_shuffle_after_the_other() -> None:
    orders = [epoch_order(epoch, images=16, available=40, seed=0) for epoch in range(5)]  # 80: everything twice
    seen = np.concatenate(orders)
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert not np.array_equal(seen[:40], seen[40:])
    assert not np.array_equal(orders[0], epoch_order(0, images=16, available=40, seed=1))
    assert np.array_equal(orders[3], epoch_order(3, images=16, available=40, seed=0))


def test_an_epoch_may_be_longer_than_the_set() -> None:
    counts = np.bincount(epoch_order(0, images=100, available=40, seed=0))
    assert counts.min() == 2 and counts.max() == 3
