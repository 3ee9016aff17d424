"""One method trained and put beside random drop: the command, and how specs hold trained methods to their training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from ablations.measure import evaluate
from ablations.measure.opening import open_context, open_subject
from ablations.run import train
from ablations.spec.expand import expand
from ablations.spec.model import find_specs, parse_spec
from ablations.spec.plain_yaml import SpecError
from ablations.spec.written import TRAINED, example_stages, written_arms
from ablations.trial.free_settings import free_kinds, ladder, settle
from ablations.trial.stages import Stages
from ablations.trial.target import Target
from ablations.trial.trial import TrialResult
from ablations.workloads import ImageSource, open_model
from analysis import stats
from analysis.facts import comparison
from reducers import available, build, placement_from, reduce_tokens
from tests.finetune import taught

Ablate = Callable[..., int]
SHORT = ("--set", "epochs=1", "images=8", "batch=4", "holdout=0")
TAUGHT = "[{at: 3, stack: [{name: taught_for_a_test, budget: {count: %s}}]}]"


@pytest.fixture(autouse=True)
def _taught(few_scenes: None) -> Iterator[None]:
    """The method of the tests, and 16 training scenes instead of thousands."""
    with taught.registered():
        yield


# --- specs ------------------------------------------------------------------------------------------------------------


def spec_of(stages: str, training: str) -> Any:
    return parse_spec(
        f"{{name: a, title: A, arms: [{{variant: v, stages: {stages}, training: {training}}}]}}", "a.yaml"
    )


def test_a_trained_method_is_not_evaluated_untrained(target: Target) -> None:
    with pytest.raises(SpecError, match="works only after training, and this arm has no training; add `training"):
        expand(spec_of(TAUGHT % 9, "null"), target)
    with pytest.raises(SpecError, match="sievit train taught_for_a_test"):
        expand(spec_of(TAUGHT % 9, "{epochs: 1}"), target)
    elsewhere = "{stages: %s}" % (TAUGHT % 9).replace("at: 3", "at: 4")  # noqa: UP031
    with pytest.raises(SpecError, match="the training has none at block 3"):
        expand(spec_of(TAUGHT % 9, elsewhere), target)
    (trial,) = expand(spec_of(TAUGHT % 9, "{stages: %s}" % (TAUGHT % 20)), target)
    assert trial.training.data["freeze"] == 0.5, "the recipe holds what the method asks for"


def test_every_trained_method_has_an_arm_that_trains_it(target: Target) -> None:
    (file,) = find_specs([TRAINED])
    assert not file.spec.default
    trials = expand(file, dataclasses.replace(target, calibration="c" * 64))
    trained = {part["name"] for trial in trials if trial.training for s in trial.stages.data for part in s["stack"]}
    wanted = {name for name, cls in available().items() if cls.trained} - {taught.NAME}
    assert trained >= {*wanted, "random", "topk"}
    lengths = {(t.training.data["epochs"], t.training.data["images"]) for t in trials if t.training}
    assert len(lengths) == 1, "everything is trained as long as everything else"
    assert {t.target for t in trials if t.variant.startswith("random")} >= {0.4, 0.5, 0.6}


def test_arms_are_read_as_the_spec_has_them(target: Target) -> None:
    for name in (TRAINED, "methods", "evit_stacking"):
        (file,) = find_specs([name])
        arms = written_arms(name)
        assert [arm.variant for arm in arms] == list(dict.fromkeys(arm.variant for arm in arms))
        assert {arm.variant for arm in arms} == {t.variant for t in expand(file, target)}
    (learned,) = [arm for arm in written_arms(TRAINED) if arm.variant == "DynamicViT"]
    assert learned.names() == learned.trains() == {"dynamicvit"} and learned.target == 0.5
    assert learned.training is not None and learned.training["seed"] == 0


SOUGHT = [arm for arm in written_arms(TRAINED) if free_kinds(arm.stages)]


@pytest.mark.parametrize("arm", SOUGHT, ids=lambda arm: arm.variant)
@torch.inference_mode()
def test_a_budget_that_is_sought_may_stand_anywhere_on_its_ladder(arm: Any) -> None:
    model = open_model("pairs_vit_tiny", weights="random", workload_name="embedded").model
    (kind,) = free_kinds(arm.stages)
    rungs = ladder(arm.stages, kind, 64)
    least, most = (
        float(reduce_tokens(model, placement_from(settle(arm.stages, kind, rung, 64))).cost(torch.rand(1, 1, 64, 64)))
        for rung in (rungs[0], rungs[-1])
    )
    assert 0 < least < 0.45 * most


@pytest.mark.parametrize("name", available())
def test_every_method_has_an_example_that_can_be_built(name: str) -> None:
    placement = placement_from(example_stages(name), depth=12)
    assert {reducer.name for reducer in placement.blocks.values()} == {name}


# --- the command ------------------------------------------------------------------------------------------------------


def train_tiny(ablate: Ablate, out: Path, *words: str) -> int:
    return ablate("train", *words, "--out", out, "--model", "pairs_vit_tiny", "--limit", "12", *SHORT)


def test_a_method_is_trained_evaluated_and_compared(
    ablate: Ablate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (taught.NAME, "--at", "3,6", "--settings", '{"budget": {"ratio": 0.5}}')
    assert train_tiny(ablate, tmp_path, *words) == 0
    printed = capsys.readouterr().out
    assert "pairs_vit_tiny (embedded weights) on 12 images of embedded" in printed
    for column in ("method", "trained as long", "verdict", taught.NAME, "1 epochs, 8 images", "random drop"):
        assert column in printed
    folder = tmp_path / "train" / "taught-for-a-test"
    assert set(load_file(folder / "reducers.safetensors")) == {
        f"{at}.scores.{of}.{part}" for at in (3, 6) for of in (3, 6) for part in ("weight", "bias")
    }
    found = json.loads((folder / "train.json").read_text())
    assert 0 <= found["p_holm"] <= 1 and f"{found['verdict'].partition(':')[0]}:" in printed
    ours, shelf, control = (found["results"][name] for name in found["results"])
    assert abs(shelf["gmacs_mean"] / ours["gmacs_mean"] - 1) < 0.02, "random drop costs the same"
    assert control["gmacs_mean"] == shelf["gmacs_mean"] and control["train_images"] == ours["train_images"] == 8
    assert shelf["training"] is None
    recipe = json.loads(control["training"])
    assert recipe["stages"][0]["stack"][0]["name"] == "random" and recipe.get("freeze", 0) == 0
    assert json.loads(ours["training"])["freeze"] == 0.5
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "finetuned").glob("*.safetensors")}
    assert len(before) == 2
    assert train_tiny(ablate, tmp_path, *words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing was trained twice"


def test_without_a_name_the_command_lists_what_it_can_train(ablate: Ablate, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate("train") == 0
    listed = capsys.readouterr().out.split()
    assert "dynamicvit" in listed and "random" not in listed
    assert {name for name, cls in available().items() if cls.trained} - {taught.NAME} <= set(listed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dynamicvitt"], "unknown method 'dynamicvitt'; did you mean 'dynamicvit'"),
        (["dynamicvit", "--settings", "{"], "--settings is JSON"),
        (["dynamicvit", "--settings", '{"name": "topk"}'], "--settings is a mapping without a name"),
        (["dynamicvit", "--settings", '{"budged": 3}'], "no setting 'budged'"),
        (["dynamicvit", "--at", "3-", "--settings", "{}"], "needs budget"),
        (["dynamicvit", "--at", "nowhere"], "blocks are written"),
        (["dynamicvit", "--set", "epochs"], "--set takes NAME=VALUE"),
        (["dynamicvit", "--set", "epoch=1"], "did you mean 'epochs'"),
        (["dynamicvit", "--workload", "imagefolder", "--model", "test_vit"], "DATA"),
    ],
)
def test_slips_are_one_message(
    words: list[str], message: str, ablate: Ablate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("train", "--out", tmp_path, "--limit", "4", *words) == 2
    assert message in capsys.readouterr().err


def test_arms_of_the_spec_take_the_recipe_over_their_own() -> None:
    asked, by_threshold = train.asked_for("dynamicvit", depth=12, recipe={"epochs": 1, "seed": 3})
    assert asked.training == by_threshold.training and by_threshold.target is None, "one training, two inferences"
    assert asked.training["epochs"] == 1 and asked.training["seed"] == 3 and asked.target == 0.5
    assert [stage["at"] for stage in asked.training["stages"]] == [[3, 6, 9]]
    assert len(train.asked_for("stvit", depth=12)) == 2, "both readings of the class token"
    (own,) = train.asked_for("topk", depth=12, where="2-3")
    assert own.stages.plain() == [{"at": [2, 3], "stack": [{"name": "topk", "budget": {"count": 108}}]}]
    (deep,) = train.asked_for("bat", depth=24, settings={"budget": {"ratio": 0.7}})
    assert deep.stages.plain()[0]["at"] == [6, 12, 18]


def outcome(ours: np.ndarray, theirs: np.ndarray, *, reached: bool = True) -> train.Compared:
    row = {"target_reached": reached, "target_note": "out of reach"}
    asked = train.Asked("m", "M", [], {}, None)
    results = [TrialResult({}, {"correct": ours}), TrialResult(row), TrialResult({}, {"correct": theirs})]
    return train.Compared(asked, *results)


def disagreeing(ours: int, theirs: int, *, images: int) -> train.Compared:
    """So many images that only one of the two gets right; both are right on the others."""
    places = np.arange(images)
    return outcome((places < ours) | (places >= ours + theirs), places >= ours)


def test_differences_are_paired_and_verdicts_follow_from_their_test() -> None:
    ours, theirs = np.array([True] * 60 + [False] * 40), np.array([True] * 40 + [False] * 60)
    gap, low, high = outcome(ours, theirs).lead
    assert gap == pytest.approx(0.2) and low < gap < high
    assert outcome(ours, theirs).verdict.startswith("beats random drop: +20.0 points [+11.")
    assert outcome(theirs, ours).verdict.startswith("fails: random drop is better: -20.0 points")
    assert outcome(ours, ours).verdict.startswith("cannot be told apart from random drop: +0.0 points [-")
    assert outcome(ours, ours, reached=False).verdict.endswith("; random drop out of reach")


def test_the_verdict_is_that_of_the_report() -> None:
    """20 images against 9 of 2160: a normal interval of the difference leaves zero out, the exact test does not."""
    found = disagreeing(20, 9, images=2160)
    answers = (found.method.images["correct"], found.trained_as_long.images["correct"])
    in_report = stats.paired(*answers)
    assert (in_report.difference, in_report.low, in_report.high) == found.lead
    assert in_report.p_value == found.p_value == pytest.approx(0.0614, abs=1e-4)
    assert found.verdict.startswith("cannot be told apart from random drop: +0.5 points")
    rows = pd.DataFrame(
        {"variant": name, "answers": [answer], "gmacs_mean": 0.5, "dense_gmacs": 1.0, "dense": False, "keys": [[name]]}
        for name, answer in zip(("method", "drop"), answers, strict=True)
    ).assign(answers=list(answers), keys=[["a"], ["b"]])
    (said,) = comparison.versus_curve(rows, "drop", by="variant")
    assert not said.told_apart and said.p_holm == train.corrected([found])[0].p_value


def test_verdicts_are_corrected_over_all_methods_of_a_call() -> None:
    close = disagreeing(21, 8, images=2160)
    assert close.verdict.startswith("beats") and train.corrected([close])[0].beats
    several = train.corrected([close, disagreeing(9, 9, images=2160), disagreeing(8, 9, images=2160)])
    assert several[0].verdict.startswith("cannot be told apart from random drop: +0.6 points")
    assert train.closing(several).startswith("0 of 3 beat") and train.closing([close]).startswith("1 of 1 beat")
    assert several[0].p_value == stats.holm([one.p_value for one in (close, *several[1:])])[0]
    assert train.corrected(several) == several, "correcting twice is correcting once"


def test_what_is_calibrated_after_a_training_has_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a method that learns what to keep depends on what it learned."""
    subject = open_subject(ImageSource(limit=4), "pairs_vit_tiny", cache=tmp_path)
    context = open_context(subject, torch.device("cpu"), cache=tmp_path)
    seen: list[torch.Tensor] = []
    measured = evaluate.reduce_tokens

    def watched(model: Any, placement: Any, **options: Any) -> Any:
        fast = measured(model, placement, **options)
        seen.extend(own.scores["3"].weight.detach().clone() for own in fast.members() if own.name == taught.NAME)
        return fast

    monkeypatch.setattr("ablations.measure.calibrate.reduce_tokens", watched)
    monkeypatch.setattr(evaluate, "reduce_tokens", watched)
    stages = [{"at": [3], "stack": [{"name": taught.NAME, "budget": {"count": "auto"}}]}]
    training = {"epochs": 1, "images": 8, "batch": 4, "holdout": 0, "stages": [taught.stage([3])]}
    compared = train.train(train.Asked("taught", "taught", Stages.of(stages), training, 0.6), context)
    assert compared.method.row["calibrated"] and len(seen) > 3
    assert all(torch.equal(weight, seen[0]) for weight in seen)


def test_methods_without_an_arm_are_trained_as_their_example() -> None:
    (asked,) = train.asked_for(taught.NAME, depth=12)
    assert (
        asked.stages.plain()
        == asked.training["stages"]
        == [{"at": [3, 6, 9], "stack": [{"name": taught.NAME, "budget": {"ratio": 0.7}}]}]
    )
    assert build(asked.stages.plain()[0]["stack"][0]).trained
