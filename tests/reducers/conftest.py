"""Small models of every kind the runtime drives, with nothing so small that an error could hide in it."""

from __future__ import annotations

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from reducers import ReducedViT, Trace

DEPTH = 4
SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 7}


def make_vit(kind: str = "class", *, seed: int = 0, **changes: object) -> VisionTransformer:
    """A random model whose every parameter matters: biases, norms and LayerScale are far from their neutral values."""
    torch.manual_seed(seed)
    options = {**SIZES, **KINDS[kind], **changes}
    model_class = VisionTransformerDistilled if kind == "distilled" else VisionTransformer
    model = model_class(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


KINDS: dict[str, dict[str, object]] = {
    "class": {},
    "distilled": {},
    "registers": {"reg_tokens": 4, "init_values": 0.5},
    "average": {"class_token": False, "global_pool": "avg"},
    "average_with_class": {"global_pool": "avg"},
    "avgmax": {"class_token": False, "global_pool": "avgmax"},
    "map": {"class_token": False, "global_pool": "map"},
    "qk_norm": {"qk_norm": True, "init_values": 0.3, "scale_attn_norm": True},
    "no_qkv_bias": {"qkv_bias": False, "pre_norm": True},
}
WITHOUT_CLASS_TOKEN = {"average", "avgmax", "map"}


@torch.no_grad()
def assert_same_alone_and_in_a_batch(driven: ReducedViT, images: Tensor, *, costs: bool = True) -> Trace:
    """Assert that every image gets alone what it gets in the batch, in float64; the batch's trace.

    ``costs=False`` where a batch rightly costs an image more: a score that it did not need and others did.
    """
    images, last = images.double(), len(driven.base.blocks) - 1
    together, trace = driven.trace(images)
    for i in range(len(images)):
        alone, own = driven.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[i])
        assert torch.equal(own.owner(last)[0], trace.owner(last)[i])
        if costs:
            torch.testing.assert_close(own.macs[0], trace.macs[i])
    return trace


def nested_squares(trace: Trace, blocks: range) -> list[Tensor]:
    """The kept patches of a pattern after each block, (6, 6) bool: asserts that every image has the same, symmetric,
    within the one before.
    """
    before, squares = torch.ones(6, 6, dtype=torch.bool), []
    for block in blocks:
        kept = trace.kept(block)
        assert (kept == kept[0]).all()
        square = kept[0].view(6, 6)
        assert torch.equal(square, square.rot90()), "whole rings"
        assert (square <= before).all() and square.any()
        squares.append(before := square)
    return squares


@pytest.fixture
def images() -> Tensor:
    """Five images, one of them constant."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(5, 3, 48, 48, generator=generator)
    batch[4] = 0.25
    return batch
