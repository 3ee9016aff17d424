"""A model of four narrow blocks and a few scenes: trainings that take a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from ablations.measure.finetune.loop import Finetuning
from ablations.trial.recipe import Recipe, parse_recipe
from ablations.workloads.training import Scenes

CPU = torch.device("cpu")
ATS: dict[str, Any] = {"at": [1, 2], "stack": [{"name": "ats", "budget": {"count": 24}}]}

# everything at once that draws random numbers or keeps a state
RESTARTED: dict[str, Any] = {
    "stages": [ATS], "epochs": 2, "images": 24, "batch": 4, "accumulate": 2, "lr": 1e-3, "clip": 1.0, "mixup": 0.4,
    "cutmix": 0.4, "drop_path": 0.2, "ema": 0.9, "keep_shrink": 1.0, "distill": {"alpha": 0.3, "tau": 2.0},
    "holdout": 8, "warmup": 0.5,
}  # fmt: skip


def tiny_model() -> VisionTransformer:
    """Four blocks, 64 patches of 8 x 8 pixels, dropout everywhere; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return VisionTransformer(
            img_size=64, patch_size=8, in_chans=1, num_classes=10, depth=4, embed_dim=24, num_heads=2,
            proj_drop_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1,
        ).eval()  # fmt: skip


def plain_model() -> VisionTransformer:
    """The same model without any dropout."""
    model = VisionTransformer(
        img_size=64, patch_size=8, in_chans=1, num_classes=10, depth=4, embed_dim=24, num_heads=2
    ).eval()
    model.load_state_dict(tiny_model().state_dict())
    return model


def recipe_of(**settings: Any) -> Recipe:
    """A short recipe on the embedded workload."""
    short = {"epochs": 1, "images": 16, "batch": 8, "holdout": 0}
    return parse_recipe({**short, **settings}, workload="embedded")


def scenes(cache: Path, recipe: Recipe, *, count: int = 48) -> Scenes:
    return Scenes(cache, count=count, augment=recipe.augment, holdout=recipe.holdout, seed=recipe.seed)


def training(cache: Path, recipe: Recipe, *, model: Any = None, count: int = 48) -> Finetuning:
    """A training that has not begun."""
    return Finetuning(recipe, tiny_model() if model is None else model, scenes(cache, recipe, count=count), device=CPU)


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> Iterator[None]:
    """Sums in one order: what is compared to the last bit must not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which scenes are drawn once for all tests."""
    return tmp_path_factory.mktemp("cache")
