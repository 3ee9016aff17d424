"""The cluttered digits, ``embedded:v1``: bit-reproducible scenes, shipped weights as good as their card says."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from ablations.models.digits import CANVAS, MODELS, PATCH, WEIGHTS, create_digits_model, normalise
from ablations.workloads import digits, open_model
from ablations.workloads.embedded import first_workload
from ablations.workloads.model_card import token_choice, write_card
from ablations.workloads.train_embedded import RECIPES, learning_rate, train
from tests.samples import sampled

SHIPPED = [name for name in sorted(MODELS) if (WEIGHTS / f"{name}.safetensors").is_file()]


def test_scenes_are_the_same_bits_on_every_machine() -> None:
    scenes = [digits.render(split, index) for split in ("test", "train") for index in (0, 1, 2159)]
    content = hashlib.sha256()
    for scene in scenes:
        content.update(scene.image.tobytes() + scene.mask.tobytes() + bytes([scene.label, scene.clutter]))
    assert content.hexdigest()[:16] == "2b97502170ae7511", "a changed scene needs a new digits.VERSION and new weights"


def test_every_held_out_digit_is_shown_equally_often_and_none_is_trained_on() -> None:
    held_out, labels = digits.source_digits("test")
    shown = [digits.render("test", index).label for index in range(len(labels))]
    assert shown == labels.tolist()
    trained = {image.tobytes() for image in digits.source_digits("train")[0]}
    assert not any(image.tobytes() in trained for image in held_out)


def test_the_mask_is_the_digit_and_clutter_stays_off_its_middle() -> None:
    for index in range(60):
        scene = digits.render("train", index)
        assert scene.mask.any()
        assert (scene.image[scene.mask] >= 64).all()
        assert 0 <= scene.clutter <= digits.MAX_CLUTTER
        bare = digits.render("train", index, max_clutter=0)
        assert bare.clutter == 0
        assert not (bare.image[~bare.mask] >= 64).any()


def test_the_amount_of_clutter_varies() -> None:
    clutter = first_workload(360).clutter
    assert clutter is not None
    assert set(clutter.tolist()) >= set(range(9))


def test_mask_patches_equal_a_slow_loop() -> None:
    masks = np.random.RandomState(0).rand(3, 16, 24) > 0.97
    slow = [[m[i : i + 8, j : j + 8].any() for i in (0, 8) for j in (0, 8, 16)] for m in masks]
    assert digits.mask_patches(masks, 8).tolist() == slow


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' and 'test'"):
        digits.render("val", 0)  # type: ignore[arg-type]


def test_the_workload_normalises_as_training_does() -> None:
    workload = first_workload(4)
    trained = normalise(torch.from_numpy(workload.pixels[..., 0]))
    torch.testing.assert_close(workload.batch(0, 4), trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sampled(SHIPPED, quick=["digits_vit_tiny"]))
def test_shipped_weights_are_as_good_as_their_record_says(name: str) -> None:
    record = json.loads((WEIGHTS / f"{name}.training.json").read_text())
    model, workload = open_model(name, weights=None, workload_name="embedded:v1").model, first_workload(360)
    with torch.inference_mode():
        top1 = (model(workload.batch(0, 360)).argmax(1).numpy() == workload.labels).mean()
    assert top1 == pytest.approx(record["curve"][-1]["top1"], abs=0.04)  # 360 of the 1080 scenes of the record
    assert (record["schedule"], record["images"]) == RECIPES[name]


def test_the_small_model_ships_with_its_card() -> None:
    assert "digits_vit_small" in SHIPPED
    assert set(SHIPPED) == set(MODELS)
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    assert all(name in card for name in MODELS)


@pytest.mark.slow
def test_token_choice_matters() -> None:
    model = open_model("digits_vit_small", weights=None, workload_name="embedded:v1").model
    found = token_choice(model, first_workload(360))
    assert found["dense"] - found["32 by the mask"] <= 0.03
    assert found["dense"] - found["32 at random"] >= 0.10


@pytest.mark.slow
def test_training_writes_weights_a_curve_and_a_card(tmp_path, monkeypatch) -> None:
    from ablations.workloads import train_embedded

    monkeypatch.setattr(train_embedded, "EVALUATED", 20)
    train("digits_vit_tiny", 1024, tmp_path, stop_after=256, log_every=1)
    record = json.loads((tmp_path / "digits_vit_tiny.training.json").read_text())
    assert [point["images"] for point in record["curve"]] == [128, 256]
    model = create_digits_model("digits_vit_tiny")
    model.load_state_dict(open_model("digits_vit_tiny", weights=str(tmp_path / "digits_vit_tiny.safetensors"),
                                     workload_name="embedded:v1").model.state_dict())  # fmt: skip
    choice = {"dense": 0.5, "32 by the mask": 0.5}
    card = write_card(tmp_path, {"digits_vit_tiny": record}, {"digits_vit_tiny": choice}).read_text()
    assert "digits_vit_tiny" in card
    assert "50.0" in card


@pytest.mark.parametrize("peak", [1e-3, 2e-3])
def test_the_learning_rate_warms_up_to_its_peak_and_ends_at_zero(peak: float) -> None:
    rates = [learning_rate(step, 1000, peak) for step in range(1001)]
    assert max(rates) == pytest.approx(peak) and rates.index(max(rates)) in (49, 50)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert PATCH * 8 == CANVAS
