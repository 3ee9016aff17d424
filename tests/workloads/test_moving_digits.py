"""The moving digits: bit-reproducible clips in which the digit moves as its label says and is whole in every frame."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from ablations.measure.metrics import patch_masks
from ablations.measure.opening import default_batch
from ablations.models.clips import CLIP_CANVAS as CANVAS
from ablations.models.clips import FRAMES, TIMESFORMER, XVIT
from ablations.models.digits import MEAN, SHIPPED, STD, WEIGHTS, save_weights
from ablations.models.loading import check_model, head_classes
from ablations.models.weight_files import ModelError, read_weights
from ablations.workloads import moving_digits, open_model, open_workload, split_calibration, train_clips
from ablations.workloads.base import Workload, WorkloadError, subset
from ablations.workloads.digits import source_digits
from ablations.workloads.embedded import CLIP_SEED, moving_workload
from ablations.workloads.moving_digits import DIGIT_SIZES, DIRECTIONS, MAX_CLUTTER, render
from reducers import ATS, Placement, Ratio, at, reduce_tokens


def steps_of(masks: np.ndarray) -> set[tuple[int, int]]:
    """By how much the torus rolls from each frame to the next, of all steps up to 3 pixels; fails where it does not."""
    tried = list(itertools.product(range(-3, 4), repeat=2))
    return {
        next(step for step in tried if np.array_equal(np.roll(before, step, axis=(0, 1)), after))
        for before, after in itertools.pairwise(masks)
    }


def test_clips_are_the_same_bits_on_every_machine() -> None:
    scenes = [render(split, index, seed=3) for split in ("test", "train") for index in (0, 1, 959)]
    content = hashlib.sha256()
    for scene in scenes:
        content.update(scene.frames.tobytes() + scene.masks.tobytes())
        content.update(bytes([scene.direction, scene.digit, scene.clutter]))
    assert content.hexdigest()[:16] == "e89b979a1e9a6fa2", (
        "a changed clip needs a new moving_digits.VERSION and new weights"
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_digit_is_whole_in_every_frame_and_moves_as_its_label_says(split: str) -> None:
    speeds = set()
    for index in range(12):
        scene = render(split, index)  # type: ignore[arg-type]
        assert scene.frames.shape == scene.masks.shape == (FRAMES, CANVAS, CANVAS)
        assert scene.frames.dtype == np.uint8 and scene.masks.dtype == bool
        assert (scene.frames[scene.masks] >= 64).all() and scene.masks[0].sum() > 40
        (step,) = steps_of(scene.masks)
        speed = max(map(abs, step))
        assert step == tuple(speed * axis for axis in DIRECTIONS[scene.direction])
        speeds.add(speed)
        for axis in (1, 2):  # on the torus its extent is that of a digit
            empty = ~scene.masks[0].any(axis=axis - 1)
            gaps = np.diff(np.flatnonzero(np.tile(~empty, 2))) - 1
            assert CANVAS - gaps.max() <= DIGIT_SIZES[1]
    assert speeds == {2, 3}


def test_pieces_move_their_own_ways() -> None:
    """What is no digit moves as well, and seldom with the digit."""
    alone, along = render("train", 5, max_clutter=0), 0
    assert alone.clutter == 0 and (alone.frames.max(axis=0) > 0).any()
    counts: Counter[int] = Counter()
    for index in range(80):
        scene = render("train", index)
        counts[scene.clutter] += 1
        if scene.clutter == 0:
            continue
        (step,) = steps_of(scene.masks[:2])
        rolled = np.roll(scene.frames[0], np.multiply(step, FRAMES - 1), axis=(0, 1))
        along += np.array_equal(rolled, scene.frames[-1])
    assert set(counts) == set(range(MAX_CLUTTER + 1)) and min(counts.values()) >= 5
    assert along <= 4, "all of its pieces go the digit's way"


def test_no_piece_rides_in_the_middle_of_the_digit() -> None:
    inside = moving_digits._frames_inside
    still = np.tile([[40, 40]], (FRAMES, 1))
    shape, piece = np.array([20, 20]), np.array([10, 8])
    assert inside(still, piece, still, shape) == FRAMES
    assert inside((still + 20) % CANVAS, piece, still, shape) == 0  # beside it, beyond the border
    assert inside((still + [8, 12]) % CANVAS, piece, still, shape) == FRAMES  # over the border
    crossing = (still + np.arange(FRAMES)[:, None] * [0, 3]) % CANVAS
    slow = sum(0 < 3 * t + 4 < 20 for t in range(FRAMES))
    assert inside(crossing, piece, still, shape) == slow == 6


def test_every_label_is_shown_equally_often_by_held_out_digits_and_seeds_give_other_clips() -> None:
    scenes = [render("test", index) for index in range(80)]
    assert Counter((scene.direction, scene.digit) for scene in scenes) == {
        (direction, digit): 1 for direction in range(8) for digit in range(10)
    }
    assert [scene.direction for scene in scenes] == [*range(8)] * 10
    assert not np.array_equal(render("test", 4).frames, render("test", 4, seed=1).frames)
    assert not np.array_equal(render("test", 0).masks, render("test", 80).masks)
    with pytest.raises(ValueError, match="'train' and 'test'"):
        render("val", 0)  # type: ignore[arg-type]


def test_the_digit_is_one_of_its_split_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of a split that has one picture of each class show that picture."""
    images, labels = source_digits("test")
    first = np.array([np.flatnonzero(labels == digit)[0] for digit in range(10)])
    asked = []

    def few(split: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append(split)
        return images[first], labels[first]

    seen = []
    resize = moving_digits.resize
    monkeypatch.setattr(moving_digits, "source_digits", few)
    monkeypatch.setattr(moving_digits, "resize", lambda image, *size: seen.append(image) or resize(image, *size))
    for index in (0, 8, 16, 79):
        seen.clear()
        scene = render("test", index)
        assert np.array_equal(seen[0], images[first[scene.digit]])
    assert set(asked) == {"test"}


def test_where_the_digit_is_does_not_tell_its_direction() -> None:
    """In no frame: the corner lies anywhere on the torus with equal chance, for every direction."""
    corners = np.zeros((8, FRAMES, 2, 4))
    random = np.random.RandomState(0)
    for direction in range(8):
        for _ in range(400):
            path = moving_digits._path(direction, random)
            for axis in (0, 1):
                corners[direction, np.arange(FRAMES), axis, path[:, axis] * 4 // CANVAS] += 1
    assert corners.min() > 60 and corners.max() < 140  # of 100 in each quarter


# --- as a workload ----------------------------------------------------------------------------------------------------


def test_clips_are_a_workload_of_directions_with_the_digit_beside() -> None:
    clips = open_workload("moving_digits", data=None, model=XVIT, limit=16, strict=True, cache=None)
    assert clips.pixels.shape == (16, FRAMES, CANVAS, CANVAS, 1) and clips.frames == FRAMES and clips.classes == 8
    assert clips.labels.tolist() == [*range(8)] * 2 and clips.second is not None
    assert clips.second.tolist() == [0] * 8 + [1] * 8
    scene = render("test", 9, seed=CLIP_SEED)
    assert np.array_equal(clips.pixels[9, ..., 0], scene.frames) and clips.masks is not None
    assert np.array_equal(clips.masks[9], scene.masks)
    batch = clips.batch(8, 10)
    assert batch.shape == (2, FRAMES, 1, CANVAS, CANVAS) and batch.is_contiguous() and batch.dtype == torch.float32
    np.testing.assert_allclose(batch[1, :, 0].numpy(), (scene.frames / 255 - MEAN) / STD, atol=1e-6)
    thumbnail = clips.thumbnail(9)
    assert thumbnail.shape == (FRAMES * CANVAS, CANVAS, 3)
    assert np.array_equal(thumbnail[2 * CANVAS : 3 * CANVAS, :, 1], scene.frames[2])
    part = subset(clips, [9, 3])
    assert part.labels.tolist() == [1, 3] and part.second is not None and part.second.tolist() == [1, 0]
    assert np.array_equal(part.pixels, clips.pixels[[9, 3]]) and part.digest != clips.digest
    calibration, evaluated = split_calibration(clips)
    assert evaluated is clips and len(calibration) == 128 and not set(calibration.ids) & set(clips.ids)


def test_colours_of_clips_are_normalised_apart_and_their_frames_count_in_the_batch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 5, 3), dtype=np.uint8)
    clips = Workload("clips", pixels, np.zeros(2, np.int64), ("a", "b"), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 1, "-")
    expected = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(clips.batch(0, 2).numpy(), np.moveaxis(expected, -1, 2), atol=1e-6)
    for frame in range(3):
        one = dataclasses.replace(clips, pixels=pixels[:, frame])
        assert one.frames is None and torch.equal(one.batch(0, 2), clips.batch(0, 2)[:, frame])
        assert np.array_equal(one.thumbnail(1), clips.thumbnail(1)[6 * frame : 6 * frame + 6])
    assert default_batch(clips) == 40 and default_batch(one) == 120
    with pytest.raises(WorkloadError, match="of clips"):
        dataclasses.replace(clips, pixels=pixels[None])


def test_the_patches_of_a_clips_mask_are_counted_frame_by_frame() -> None:
    masks = np.random.default_rng(0).random((2, 3, 4, 6)) > 0.8
    found = patch_masks(masks, (2, 3))
    assert found.shape == (2, 18)
    assert np.array_equal(found.reshape(2, 3, 6), np.stack([patch_masks(masks[:, t], (2, 3)) for t in range(3)], 1))


@torch.no_grad()
def test_who_reads_clips_is_opened_for_them_alone() -> None:
    model = open_model(XVIT, weights="random", workload_name="moving_digits", classes=8).model
    clips = open_workload("moving_digits", data=None, model=XVIT, limit=2, strict=True, cache=None)
    assert model(clips.batch(0, 2)).shape == (2, 8)
    fast = reduce_tokens(model, at(range(3, 12), ATS(Ratio(0.5))))
    _, trace = fast.trace(clips.batch(0, 2))
    assert trace.kept(11).shape == (2, FRAMES * 36) and trace.kept(11).any()
    dense = float(reduce_tokens(model, Placement()).trace(clips.batch(0, 1))[1].macs[0])
    assert round(dense / 1e9, 3) == 0.193
    with pytest.raises(WorkloadError, match="reads clips, and imagefolder has images"):
        open_workload("imagefolder", data=".", model=XVIT, limit=2, strict=True, cache=None)
    for name, workload, why in (
        (XVIT, "embedded", "64 x 64 grey digits, which digits_xvit_tiny cannot read.*WORKLOAD=moving_digits"),
        ("digits_vit_tiny", "moving_digits", "clips of 8 frames of 48 x 48 grey pixels, which digits_vit_tiny"),
    ):
        with pytest.raises(WorkloadError, match=why):
            open_workload(workload, data=None, model=name, limit=2, strict=True, cache=None)
        with pytest.raises(ModelError, match=why):
            open_model(name, weights="random", workload_name=workload)
    with pytest.raises(ModelError, match="reads scenes of 48 px"):
        check_model(f"{XVIT}?img=64")


@torch.no_grad()
def test_the_small_timesformer_is_transformers() -> None:
    pytest.importorskip("transformers")
    model = open_model(TIMESFORMER, weights="random", workload_name="moving_digits", classes=8).model
    assert model(torch.zeros(2, FRAMES, 1, CANVAS, CANVAS)).logits.shape == (2, 8)


def test_a_trained_classifier_is_recognised_in_a_file(tmp_path: Path) -> None:
    model: Any = open_model(XVIT, weights="random", workload_name="moving_digits").model
    path = save_weights(model, XVIT, tmp_path)
    loaded: Any = open_model(XVIT, weights=str(path), workload_name="moving_digits", classes=8).model
    torch.testing.assert_close(loaded.head.fc.weight, model.head.fc.weight.half().float(), rtol=0, atol=0)
    assert head_classes(XVIT, weights=str(path)) == 8


# --- the models' training ---------------------------------------------------------------------------------------------


def shipped() -> dict[str, torch.Tensor]:
    return read_weights(WEIGHTS / "digits_vit_tiny.safetensors")


@torch.no_grad()
def test_a_model_of_clips_begins_as_the_shipped_vit_in_every_frame() -> None:
    """X-ViT alone in time and TimeSformer behind its zeros read each frame as the ViT does, its positions resampled."""
    plain = VisionTransformer(
        img_size=CANVAS, patch_size=8, in_chans=1, num_classes=0, embed_dim=64, depth=12, num_heads=2
    ).eval()  # fmt: skip
    known = {key: value.float() for key, value in shipped().items() if not key.startswith("head.")}
    known["pos_embed"] = resample_abs_pos_embed(known["pos_embed"], [6, 6], num_prefix_tokens=1)
    plain.load_state_dict(known)
    frame = train_clips.draw("train", 0, 2, seed=0)[0][:, 0]
    expected = plain.forward_features(frame)
    clips = frame[:, None].expand(-1, FRAMES, -1, -1, -1)
    xvit: Any = train_clips.started(XVIT, shipped()).eval()
    xvit.time_embed.zero_()
    for block in xvit.blocks:
        block.attn.group = 1
    _, summary, tokens = train_clips.told(xvit, clips)
    torch.testing.assert_close(summary, expected[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens[:, 3], expected[:, 1:], rtol=0, atol=1e-4)
    pytest.importorskip("transformers")
    timesformer: Any = train_clips.started(TIMESFORMER, shipped()).eval()
    assert timesformer.timesformer.embeddings.time_embeddings.std() > 0.1
    timesformer.timesformer.embeddings.time_embeddings.zero_()
    _, summary, tokens = train_clips.told(timesformer, clips)
    torch.testing.assert_close(summary, expected[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens[:, 5], expected[:, 1:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_attention_over_time_begins_by_looking_at_the_frames_beside() -> None:
    pytest.importorskip("transformers")
    model: Any = train_clips.started(TIMESFORMER, shipped()).eval()
    seen = []
    for layer in model.timesformer.encoder.layer[:2]:
        layer.temporal_attention.attention.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(train_clips.draw("train", 0, 4, seed=0)[0])
    for qkv in seen:
        queries, keys, _ = qkv.unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)  # each (places, heads, frames, channels)
        before, after = (queries @ keys.mT / 32**0.5).softmax(-1).mean(0)
        assert before.argmax(1).tolist() == [0, 0, 1, 2, 3, 4, 5, 6] and before.amax(1).min() > 0.4
        assert after.argmax(1).tolist() == [1, 2, 3, 4, 5, 6, 7, 7] and after.amax(1).min() > 0.4


def test_patches_of_each_frame_are_told_the_direction_of_the_digit_in_them() -> None:
    clips, directions, digits, patches = train_clips.draw("test", 3, 2, seed=1)
    scene = render("test", 4, seed=1)
    assert directions.tolist() == [3, 4] and digits.tolist() == [0, 0] and clips.shape == (2, FRAMES, 1, CANVAS, CANVAS)
    for frame, (row, column) in itertools.product(range(FRAMES), itertools.product(range(6), range(6))):
        part = scene.masks[frame, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert int(patches[1, frame, 6 * row + column]) == (4 if part.any() else 8)


@torch.no_grad()
@pytest.mark.parametrize("name", [XVIT, TIMESFORMER])
def test_what_is_trained_is_what_is_evaluated(name: str) -> None:
    if name == TIMESFORMER:
        pytest.importorskip("transformers")
    model: Any = train_clips.started(name, shipped()).eval()
    clips = train_clips.draw("train", 0, 2, seed=0)[0]
    logits = model(clips)
    torch.testing.assert_close(train_clips.told(model, clips)[0], getattr(logits, "logits", logits))


def test_clutter_grows_piece_by_piece() -> None:
    pieces = [train_clips.clutter(step, 100) for step in range(100)]
    assert pieces == sorted(pieces) and set(pieces) == set(range(6)) and pieces[39] == pieces[40] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", [XVIT, TIMESFORMER])
def test_a_training_writes_weights_and_a_curve_and_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == TIMESFORMER:
        pytest.importorskip("transformers")
    monkeypatch.setattr(train_clips, "EVALUATED", 16)
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    clips, plain, seen = 3 * train_clips.BATCH, train_clips._accuracies, []
    train_clips.train(name, clips, tmp_path / "whole", log_every=1)

    def breaks(*arguments: Any) -> tuple[float, float]:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(train_clips, "_accuracies", breaks)
    with pytest.raises(KeyboardInterrupt):
        train_clips.train(name, clips, tmp_path / "broken", log_every=1)
    train_clips.train(name, clips, tmp_path / "broken", resume=True, log_every=1)
    one, two = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "broken"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    record = json.loads((tmp_path / "broken" / f"{name}.training.json").read_text())
    assert [point["clips"] for point in record["curve"]] == [32, 64, 96]
    trained = open_model(name, weights=str(tmp_path / "whole" / f"{name}.safetensors"), workload_name="moving_digits")
    assert trained.weights == "file"


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_the_shipped_weights_of_clips_are_small_and_have_their_record_and_card() -> None:
    assert SHIPPED["moving_digits"] == (XVIT, TIMESFORMER)
    assert sum((WEIGHTS / f"{name}.safetensors").stat().st_size for name in SHIPPED["moving_digits"]) <= 3 * 2**20
    card = (WEIGHTS / "CLIPS_CARD.md").read_text(encoding="utf-8")
    for name in SHIPPED["moving_digits"]:
        record = json.loads((WEIGHTS / f"{name}.training.json").read_text(encoding="utf-8"))
        assert record["model"] == name and record["clips"] == train_clips.TRAINED_ON[name]
        assert record["curve"][-1]["clips"] == record["clips"] and record["curve"][-1]["cpu_minutes"] <= 45
        assert f"| {name} |" in card and f"{record['clips']:,}" in card


@pytest.mark.parametrize("name", [XVIT, TIMESFORMER])
@torch.inference_mode()
def test_the_shipped_weights_tell_directions_as_their_card_says(name: str) -> None:
    if name == TIMESFORMER:
        pytest.importorskip("transformers")
    found = re.search(rf"\| {name} \|.* (\d+\.\d) \(\d", (WEIGHTS / "CLIPS_CARD.md").read_text(encoding="utf-8"))
    assert found is not None
    loaded, workload = open_model(name, weights=None, workload_name="moving_digits"), moving_workload(80)
    assert loaded.weights == "embedded"
    right = (train_clips.told(loaded.model, workload.batch(0, 80))[0].argmax(1).numpy() == workload.labels).mean()
    assert abs(100 * right - float(found[1])) < 10
