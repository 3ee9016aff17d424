"""Models of clips by name, and clips opened for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablations.measure.evaluate import run_trial
from ablations.models import hf
from ablations.models.loading import class_names, clip_frames, head_classes, input_config, open_model
from ablations.models.model_names import chosen_name, parse_model_name
from ablations.run.contexts import make_context
from ablations.run.session import Settings, open_session
from ablations.workloads import ModelError, WorkloadError, open_workload
from tests.workloads.conftest import MakeTree
from tests.workloads.videos import write_frames

tf = pytest.importorskip("transformers")

SPEC = """\
name: tiny
title: A tiny question
base: {x: target, target: [0.7], stages: [{at: 1, stack: [{name: $method, budget: {count: auto}}]}]}
arms:
  - {variant: ATS, set: {method: ats}}
  - {variant: 'ATS, over the clip', set: {method: ats}, host: {over: clip}}
  - {variant: 'ATS, own channels', set: {method: ats}, host: {missing: self}}
"""
LABELS = {0: "abseiling", 1: "air drumming", 2: "answering questions"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny TimeSformer as ``save_pretrained`` leaves it, its processor beside it."""
    config = tf.TimesformerConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, id2label=LABELS, label2id={name: number for number, name in LABELS.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.TimesformerForVideoClassification(config)
    torch.nn.init.normal_(model.timesformer.embeddings.time_embeddings)
    model.save_pretrained(tmp_path / "model")
    about = {
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}, "resample": 2,
        "do_normalize": True, "image_mean": [0.45] * 3, "image_std": [0.225] * 3, "do_rescale": True,
        "rescale_factor": 1 / 255,
    }  # fmt: skip
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(about))
    return tmp_path / "model"


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Folders of frames of two of its three classes."""
    for cls in ("air_drumming", "answering_questions"):
        for clip in range(6):
            write_frames(tmp_path / "data" / cls / f"clip {clip}", 12 + clip)
    return tmp_path / "data"


def test_the_number_of_frames_stands_in_the_name() -> None:
    name = chosen_name("hf:OWNER/NAME", "64", "8")
    assert name == "hf:OWNER/NAME?img=64?frames=8"
    known = parse_model_name(name)
    assert (known.what, known.size, known.frames, str(known)) == ("OWNER/NAME", (64, 64), 8, name)
    assert chosen_name(name, None, "16") == "hf:OWNER/NAME?img=64?frames=16"
    for wrong in ("0", "many", "-3", "1.5", ""):
        with pytest.raises(ModelError, match="no number of frames"):
            parse_model_name(f"hf:OWNER/NAME?frames={wrong}")


def test_what_a_model_of_clips_reads_is_known_without_its_weights(saved: Path) -> None:
    name = f"hf:{saved}"
    assert clip_frames(name) == 4 and clip_frames(f"{name}?frames=8") == 8
    assert head_classes(name, weights=None) == 3 and class_names(name) == tuple(LABELS.values())
    config = input_config(name)
    assert config["input_size"] == (3, 32, 32) and config["mean"] == (0.45,) * 3 and config["std"] == (0.225,) * 3
    assert clip_frames("deit_tiny_patch16_224") is None and clip_frames("xvit_b_16") == 16
    assert head_classes("xvit_b_8", weights=None) == 400


def test_names_that_say_nothing_are_no_names() -> None:
    assert hf.class_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) == ()
    assert hf.class_names({}) == () and hf.class_names({"id2label": {"1": "b", "0": "a"}}) == ("a", "b")


def test_a_processor_that_takes_one_off_is_understood() -> None:
    """ViViT's: pixels / 127.5 - 1, then mean and deviation."""
    told = {"rescale_factor": 1 / 127.5, "offset": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    mean, std = hf._normalisation(told)
    pixels = np.arange(256.0)
    assert np.allclose((pixels / 255 - mean[0]) / std[0], ((pixels / 127.5 - 1) - 0.5) / 0.5)
    plain = {"rescale_factor": 0.00392156862745098, "image_mean": [0.485] * 3, "image_std": [0.229] * 3}
    assert hf._normalisation(plain) == ((0.485,) * 3, (0.229,) * 3)


def test_the_processor_of_later_versions_is_found_under_its_name(saved: Path) -> None:
    (saved / "preprocessor_config.json").rename(saved / "video_preprocessor_config.json")
    assert input_config(f"hf:{saved}")["mean"] == (0.45,) * 3


def test_times_of_another_number_of_frames_are_those_of_the_library(saved: Path) -> None:
    own = open_model(f"hf:{saved}", weights=None, workload_name="clips").model
    more = open_model(f"hf:{saved}?frames=8", weights=None, workload_name="clips").model
    clip = torch.randn(1, 8, 3, 32, 32)
    assert more.config.num_frames == 8
    embeddings = own.timesformer.embeddings
    with torch.inference_mode():
        assert torch.equal(more.timesformer.embeddings(clip), embeddings(clip))


def test_frames_are_refused_where_they_cannot_be_chosen() -> None:
    for name in ("deit_tiny_patch16_224", "digits_xvit_tiny", "xvit_b_8"):
        with pytest.raises(ModelError, match="one number of frames, or reads images"):
            clip_frames(f"{name}?frames=4")


def test_clips_and_images_are_told_apart(saved: Path, frames: Path, make_tree: MakeTree) -> None:
    options: dict[str, Any] = {"limit": None, "strict": False, "cache": None}
    clips = open_workload("clips", data=str(frames), model=f"hf:{saved}", **options)
    assert clips.labels.tolist() == [1] * 6 + [2] * 6 and clips.classes == 3
    assert clips.pixels.shape == (12, 4, 32, 32, 3)
    with pytest.raises(WorkloadError, match="reads images, and clips has clips"):
        open_workload("clips", data=str(frames), model="test_vit", **options)
    with pytest.raises(WorkloadError, match="reads clips, and imagefolder has images: use WORKLOAD=clips"):
        open_workload("imagefolder", data=str(make_tree(name="images")), model=f"hf:{saved}", **options)


def test_a_run_on_views_of_folders_of_frames(saved: Path, frames: Path, tmp_path: Path) -> None:
    """From the command's words to a result: costs of all views, the option that a model lacks left out."""
    (tmp_path / "tiny.yaml").write_text(SPEC)
    settings = Settings(
        out=tmp_path / "out", workload="clips", data=str(frames), model=f"hf:{saved}", stride=2, views="2x3",
        specs=(str(tmp_path / "tiny.yaml"),),
    )  # fmt: skip
    session = open_session(settings)
    assert [trial.variant for trial in session.all_trials] == ["ATS", "ATS, over the clip"]
    assert session.workload.views == 6 and session.facts.units == 4
    context = make_context(session, torch.device("cpu"))
    for trial in session.all_trials:
        row = run_trial(trial, context).row
        assert row["views"] == 6 and row["status"] == "ok"
        assert 0.5 < row["gmacs_mean"] / row["dense_gmacs"] < 0.9
        assert row["tokens"][0] == 6 * (1 + 4 * 16)
