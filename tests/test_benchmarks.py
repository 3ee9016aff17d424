"""The benchmark measures what it says; no test asserts a time."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.speed import compare, markdown, variants
from reducers import Count, TopK, at


def test_every_variant_is_timed_beside_the_dense_model() -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    table = compare(model, {"top-K": at(0, TopK(Count(4)))}, torch.randn(3, 3, 32, 32), rounds=3, warmup=1)
    dense, topk = table
    assert (dense.variant, dense.gmacs_ratio) == ("dense", 1.0)
    assert dense.speedup == 1.0
    assert topk.gmacs < dense.gmacs
    assert topk.efficiency == pytest.approx(topk.speedup / topk.gmacs_ratio)
    assert topk.speedup_low <= topk.speedup <= topk.speedup_high
    assert "| top-K | 3 |" in markdown(table)


def test_the_standard_variants_fit_a_network_of_twelve_blocks() -> None:
    for placement in variants().values():
        placement.check(12)
