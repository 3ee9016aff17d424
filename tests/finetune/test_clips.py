"""Finetuning on clips of moving digits: the whole clip is moved alike, and a training runs and can be evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablations.measure.finetune.loop import Finetuning
from ablations.trial.recipe import parse_recipe
from ablations.workloads import moving_digits
from ablations.workloads.training import SCENE_SEED, Scenes
from reducers.backbones.xvit import XViT

from .conftest import CPU

MOVING = "moving_digits"


def tiny() -> XViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return XViT(
            num_frames=8, img_size=48, patch_size=8, in_chans=1, num_classes=8, embed_dim=16, depth=3, num_heads=2
        ).eval()  # fmt: skip


def clips(cache: Path, *, augment: Any = "none", holdout: int = 0) -> Scenes:
    return Scenes(cache, count=24, augment=augment, holdout=holdout, seed=0, workload=MOVING)


def test_a_training_clip_is_what_was_drawn_moved_alike_in_all_frames_over_its_torus(cache: Path) -> None:
    drawn = moving_digits.render("train", 5, seed=SCENE_SEED)
    plain, label = clips(cache)[(0, 5)]
    assert plain.shape == (8, 1, 48, 48) and label == drawn.direction and clips(cache).classes == 8
    moved, same = clips(cache, augment="light")[(1, 5)]
    assert same == label and not torch.equal(moved, plain)
    offsets = [(down, right) for down in range(-4, 5) for right in range(-4, 5)]
    assert sum(torch.equal(torch.roll(plain, by, (2, 3)), moved) for by in offsets) == 1
    assert torch.equal(plain[:, 0] > plain.min(), torch.from_numpy(drawn.frames > 0))


def test_held_out_clips_are_others_of_the_same_split(cache: Path) -> None:
    held_out = clips(cache, holdout=4).held_out
    assert held_out is not None and held_out.pixels.shape == (4, 8, 48, 48, 1)
    assert held_out.labels.tolist() == [
        moving_digits.render("train", index, seed=SCENE_SEED).direction for index in range(24, 28)
    ]
    assert held_out.batch(0, 2).shape == (2, 8, 1, 48, 48)


def test_a_video_model_is_finetuned_with_a_reducer_active(cache: Path) -> None:
    stage = {"at": [1, 2], "stack": [{"name": "ats", "budget": {"count": 12}}]}
    recipe = parse_recipe({"stages": [stage], "epochs": 1, "images": 16, "batch": 8, "holdout": 4}, workload=MOVING)
    dense = tiny()
    begun = Finetuning(recipe, dense, clips(cache, holdout=4), device=CPU)
    reports: list[dict[str, Any]] = []
    begun.run(report=reports.append)
    trained, _ = begun.trained()
    assert [row["images"] for row in reports] == [16] and np.isfinite(reports[0]["loss"])
    changed = {name for name, value in dense.state_dict().items() if not torch.equal(value, trained[name])}
    assert {"blocks.0.attn.qkv.weight", "blocks.2.mlp.fc2.weight", "time_embed"} <= changed
