"""The digit pairs: bit-reproducible scenes whose mask decides the label, and a shipped model as good as its record."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ablations.models.digits import CLASSES, PAIRS_MODEL, SHIPPED, WEIGHTS
from ablations.workloads import digits, open_model, pairs
from ablations.workloads.embedded import embedded_workload, first_workload, name_of
from ablations.workloads.train_pairs import BATCH, CYCLES, train


def test_scenes_are_the_same_bits_on_every_machine() -> None:
    scenes = [pairs.render(split, index, seed=3) for split in ("test", "train") for index in (0, 1, 2399)]
    content = hashlib.sha256()
    for scene in scenes:
        content.update(scene.image.tobytes() + scene.mask.tobytes() + scene.shown.tobytes())
        content.update(bytes([scene.label, scene.clutter]))
    assert content.hexdigest()[:16] == "bb1b7232870e890e", "a changed scene needs a new pairs.VERSION and new weights"


def test_one_digit_is_shown_twice_and_one_or_two_beside_it() -> None:
    found = set()
    for index in range(80):
        scene = pairs.render("train", index)
        shown = set(np.unique(scene.shown).tolist()) - {CLASSES}
        assert scene.label in shown and (scene.mask == (scene.shown == scene.label)).all()
        assert (scene.image[scene.shown < CLASSES] >= 64).all() and 0 <= scene.clutter <= pairs.MAX_CLUTTER
        found.add(len(shown) - 1)
        rows, columns = np.nonzero(scene.mask)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert extent > pairs.DIGIT_SIZES[1] or scene.mask.sum() > 0.3 * extent**2, "two digits, apart"
    assert found == {1, 2}


def test_every_label_is_shown_equally_often_and_seeds_give_other_scenes() -> None:
    labels = [pairs.render("test", index).label for index in range(30)]
    assert labels == [*range(10)] * 3
    assert not np.array_equal(pairs.render("test", 4).image, pairs.render("test", 4, seed=1).image)
    with pytest.raises(ValueError, match="'train' and 'test'"):
        pairs.render("val", 0)  # type: ignore[arg-type]


def test_what_patches_show_equals_a_slow_loop() -> None:
    shown = np.random.RandomState(0).choice([2, 7, CLASSES, CLASSES, CLASSES], size=(3, 4, 6))
    slow = []
    for scene in shown:
        for top, left in ((i, j) for i in (0, 2) for j in (0, 2, 4)):
            part = scene[top : top + 2, left : left + 2].ravel().tolist()
            counts = [part.count(label) for label in range(CLASSES)]
            slow.append(counts.index(max(counts)) if max(counts) else CLASSES)
    assert pairs.shown_patches(shown, 2).ravel().tolist() == slow


def test_records_of_the_older_scenes_are_found_again_under_their_new_name() -> None:
    """Until there were digit pairs, the cluttered digits were called ``embedded``."""
    old, new = first_workload(7).digest, embedded_workload(7).digest
    assert old != new
    assert name_of("embedded", 7, old) == "embedded:v1" and name_of("embedded", 7, new) == "embedded"
    assert name_of("embedded", 7, "changed") == "embedded" and name_of("imagefolder", 7, old) == "imagefolder"


def test_the_shipped_weights_are_small_and_as_good_as_their_record_says() -> None:
    path = WEIGHTS / f"{PAIRS_MODEL}.safetensors"
    record = json.loads((WEIGHTS / f"{PAIRS_MODEL}.training.json").read_text())
    scenes = sum(scenes for scenes, _ in CYCLES)
    assert path.stat().st_size <= 4e6 and record["scenes"] == scenes == record["curve"][-1]["images"]
    assert SHIPPED["embedded"] == (PAIRS_MODEL,)
    model, workload = open_model(PAIRS_MODEL, weights=None, workload_name="embedded").model, embedded_workload(400)
    with torch.inference_mode():
        top1 = (model(workload.batch(0, 400)).argmax(1).numpy() == workload.labels).mean()
    found = re.search(rf"{PAIRS_MODEL} on 2,400 scenes, dense (\d+\.\d)", (WEIGHTS / "PAIRS_CARD.md").read_text())
    assert found and 100 * top1 == pytest.approx(float(found[1]), abs=4)  # the first 400 of its scenes


@pytest.mark.slow
def test_training_writes_weights_and_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ablations.workloads import train_pairs

    monkeypatch.setattr(train_pairs, "EVALUATED", 20)
    start_file = WEIGHTS / "digits_vit_tiny.safetensors"
    train(tmp_path, start=start_file, cycles=[(2 * BATCH, 1e-3)], log_every=1)
    first = json.loads((tmp_path / f"{PAIRS_MODEL}.training.json").read_text())["curve"]
    train(tmp_path, start=start_file, cycles=[(2 * BATCH, 1e-3), (BATCH, 5e-4)], log_every=1, resume=True)
    record = json.loads((tmp_path / f"{PAIRS_MODEL}.training.json").read_text())
    assert [point["images"] for point in record["curve"]] == [BATCH, 2 * BATCH, 3 * BATCH]
    assert record["curve"][:2] == first and 0 < first[0]["cpu_minutes"] <= record["curve"][2]["cpu_minutes"]
    own = str(tmp_path / f"{PAIRS_MODEL}.safetensors")
    trained = open_model(PAIRS_MODEL, weights=own, workload_name="embedded").model
    start = open_model("digits_vit_tiny", weights=None, workload_name="embedded:v1").model
    assert not torch.equal(trained.head.weight, start.head.weight)  # type: ignore[union-attr,arg-type]


def test_no_digit_of_the_test_split_is_trained_on() -> None:
    trained = {image.tobytes() for image in digits.source_digits("train")[0]}
    assert not any(image.tobytes() in trained for image in digits.source_digits("test")[0])
