"""Who learns when: standing still, curricula, and what methods ask of the recipe they are trained by."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ablations.measure.finetune.loop import FinetuneError, Finetuning
from ablations.trial.recipe import RecipeError, parse_recipe
from reducers import TokenReducer, registry
from tests.finetune.conftest import ATS, plain_model, recipe_of, training
from tests.finetune.taught import NAME, Taught, registered, stage


@pytest.fixture(autouse=True)
def _taught() -> Iterator[None]:
    with registered():
        yield


def plain_weights(begun: Finetuning) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in begun.model.base.state_dict().items()}


def same(begun: Finetuning, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in begun.model.base.state_dict().items())


def test_the_model_stands_still_for_its_share_of_the_training_and_the_reducer_does_not(cache: Path) -> None:
    recipe = recipe_of(stages=[stage([1, 2])], epochs=2, images=16, batch=4, weight_decay=0.1)
    assert (recipe.freeze, recipe.reducer_lr_scale) == (0.5, 10.0), "the method asked for them"
    begun = training(cache, recipe, model=plain_model())
    before, own = plain_weights(begun), begun.model.placement.blocks[1]
    assert isinstance(own, Taught)
    begun_with = own.scores["1"].weight.clone()  # type: ignore[union-attr, operator]
    stood = []
    step = begun._step

    def counted() -> None:
        step()
        stood.append(same(begun, before))

    begun._step = counted  # type: ignore[method-assign]
    begun.run()
    assert stood == [True] * 4 + [False] * 4, "eight updates, half of them with the model at rest"
    assert own.shares == [update / 8 for update in range(8)]
    assert not torch.equal(own.scores["1"].weight, begun_with)  # type: ignore[arg-type]


def test_frozen_to_the_end_only_the_reducer_changes(cache: Path) -> None:
    begun = training(cache, recipe_of(stages=[stage([1])], freeze=1.0, ema=0.9, clip=1.0), model=plain_model())
    before = plain_weights(begun)
    begun.run()
    trained, reducers = begun.trained()
    assert same(begun, before) and all(torch.equal(trained[name], before[name]) for name in before)
    assert set(reducers) == {"1.scores.1.weight", "1.scores.1.bias"}


@pytest.mark.parametrize("freeze", [0.4, 1.0])
def test_a_restart_within_a_phase_gives_the_same_weights(cache: Path, freeze: float) -> None:
    recipe = recipe_of(stages=[stage([1, 2])], epochs=2, images=16, batch=4, freeze=freeze, lr=1e-3)
    through, first, second = (training(cache, recipe, model=plain_model()) for _ in range(3))
    through.run()
    states = []

    def keep(facts: object) -> None:
        if not states:
            states.append(copy.deepcopy(first.state()))

    first.run(report=keep)
    second.restore(states[0])
    second.run()
    for one, other in zip(through.trained(), second.trained(), strict=True):
        assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_standing_still_needs_somebody_else_who_learns(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FinetuneError, match="the reducers have none of their own"):
        training(cache, recipe_of(stages=[ATS], freeze=0.5))
    monkeypatch.setattr(Taught, "losses", None)  # its decision is hard: the task says nothing to its weights
    with pytest.raises(
        FinetuneError, match="no weight that may learn has a part in the loss of update 1: lower freeze"
    ):
        training(cache, recipe_of(stages=[stage([1])], freeze=1.0), model=plain_model()).run()


def test_what_a_method_asks_for_goes_over_the_workload_and_below_what_is_given() -> None:
    asked = parse_recipe({"stages": [stage([1])]}, workload="embedded")
    assert (asked.freeze, asked.reducer_lr_scale, asked.epochs) == (0.5, 10.0, 3)
    given = parse_recipe({"stages": [stage([1])], "freeze": 0.0, "epochs": 1}, workload="embedded")
    assert (given.freeze, given.reducer_lr_scale, given.epochs) == (0.0, 10.0, 1)
    stacked = [{"at": [1], "stack": [*ATS["stack"], *stage([1])["stack"]]}]
    assert parse_recipe({"stages": stacked}, workload="embedded").freeze == 0.5, "in a stack too"
    for recipe in (asked, given):
        assert parse_recipe(recipe.spec(), workload="imagefolder") == recipe, "written out, it stays as it is"


def test_a_training_from_before_the_setting_keeps_its_digest() -> None:
    assert "freeze" not in recipe_of(stages=[ATS]).spec()
    assert recipe_of(stages=[ATS], freeze=0.0) == recipe_of(stages=[ATS])
    assert recipe_of(stages=[stage([1])], freeze=0.0).spec()["freeze"] == 0.0, "the method asks for another"


def test_methods_that_disagree_leave_it_to_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Taught):
        """Asks for something else."""

        schedule = {"freeze": 0.1}  # noqa: RUF012

    monkeypatch.setitem(registry._METHODS, "other", Other)
    monkeypatch.setattr(Other, "name", "other")
    stages = [stage([1]), {"at": [2], "stack": [{"name": "other", "budget": {"ratio": 0.7}}]}]
    with pytest.raises(RecipeError, match=rf"different freeze \({NAME} 0.5, other 0.1\); give freeze"):
        parse_recipe({"stages": stages}, workload="embedded")
    assert parse_recipe({"stages": stages, "freeze": 0.2}, workload="embedded").freeze == 0.2


def test_a_method_cannot_ask_for_a_setting_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Taught, "schedule", {"speed": 1})
    with pytest.raises(RecipeError, match=f"{NAME} asks for a training with 'speed'"):
        parse_recipe({"stages": [stage([1])]}, workload="embedded")


@pytest.mark.parametrize("freeze", [-0.1, 1.5, True, "half"])
def test_the_share_is_a_share(freeze: object) -> None:
    with pytest.raises(RecipeError, match="freeze must be a number, 0 or more and at most 1"):
        recipe_of(freeze=freeze)


def test_a_curriculum_has_the_last_word_on_the_models_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_head(self: TokenReducer, share: float, base: torch.nn.Module) -> None:
        base.requires_grad_(False)
        base.head.requires_grad_(True)  # type: ignore[operator, union-attr]

    monkeypatch.setattr(Taught, "train_phase", only_the_head)
    begun = training(cache, recipe_of(stages=[stage([1])]), model=plain_model())
    before = plain_weights(begun)
    begun.run()
    changed = {name for name, tensor in begun.model.base.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}
