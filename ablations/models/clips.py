"""The small models that read clips of moving digits: a TimeSformer and an X-ViT, twelve blocks of width 64 each.

Both show a reducer 36 patches and a class token in each of 8 frames. transformers, which has TimeSformer, is imported
when that one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ablations.models.weight_files import ModelError

FRAMES = 8
CLIP_CANVAS = 48  # pixels per side of a frame
DIRECTIONS = 8  # classes: where the digit moves
TIMESFORMER, XVIT = "digits_timesformer_tiny", "digits_xvit_tiny"
CLIP_CLASSIFIER = {TIMESFORMER: "classifier", XVIT: "head.fc"}
HEADS = 2  # of each block
_PATCH, _WIDTH, _DEPTH = 8, 64, 12  # of digits_vit_tiny, whose weights they start from


def _timesformer() -> nn.Module:
    """Divided attention: over time, then over space."""
    try:
        from transformers import TimesformerConfig, TimesformerForVideoClassification
    except ImportError as error:
        raise ModelError(
            f"{TIMESFORMER} is a model of transformers, which is not installed: pip install 'sievit[hf]'"
        ) from error
    settings: dict[str, Any] = {
        "image_size": CLIP_CANVAS, "patch_size": _PATCH, "num_channels": 1, "num_frames": FRAMES,
        "hidden_size": _WIDTH, "num_hidden_layers": _DEPTH, "num_attention_heads": HEADS,
        "intermediate_size": 4 * _WIDTH, "num_labels": DIRECTIONS,
    }  # fmt: skip
    return TimesformerForVideoClassification(TimesformerConfig(**settings))


def _xvit() -> nn.Module:
    from reducers.backbones.xvit import XViT

    return XViT(
        num_frames=FRAMES, img_size=CLIP_CANVAS, patch_size=_PATCH, in_chans=1, num_classes=DIRECTIONS,
        embed_dim=_WIDTH, depth=_DEPTH, num_heads=HEADS, drop_rate=0.0,
    )  # fmt: skip


CLIPS: dict[str, Callable[[], nn.Module]] = {XVIT: _xvit, TIMESFORMER: _timesformer}  # the main one first
