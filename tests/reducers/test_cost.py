"""Cost: the exact anchors of the field, and a second opinion from fvcore."""

from __future__ import annotations

import pytest
import timm
import torch

from reducers import ATS, Count, Drop, EViT, Identity, Ratio, ToMe, TopK, at, every, reduce_tokens
from reducers.cost_fvcore import fvcore_macs

from .conftest import KINDS, make_vit


@pytest.fixture(scope="module")
def small():
    return timm.create_model("deit_small_patch16_224").eval()


@torch.inference_mode()
def reference(model, placement) -> float:
    _, trace = reduce_tokens(model, placement).trace(torch.randn(1, 3, 224, 224))
    return round(float(trace.reference_macs[0]) / 1e9, 3)


def haurum(rate):
    """Top-K at the absolute counts int(196 r^i) of the common three-stage protocol."""
    placement = at([], Identity())
    for stage, block in enumerate((3, 6, 9), 1):
        placement = placement | at(block, TopK(Count(int(196 * rate**stage))))
    return placement


ANCHORS = {
    "dense": (at([], Identity()), 4.599),
    "EViT 0.9": (at([3, 6, 9], EViT(Ratio(0.9))), 4.022),
    "EViT 0.7": (at([3, 6, 9], EViT(Ratio(0.7))), 3.029),
    "EViT 0.5": (at([3, 6, 9], EViT(Ratio(0.5))), 2.309),
    "EViT 0.9 no fusion": (at([3, 6, 9], EViT(Ratio(0.9), fuse=False)), 3.988),
    "EViT 0.7 no fusion": (at([3, 6, 9], EViT(Ratio(0.7), fuse=False)), 2.997),
    "EViT 0.5 no fusion": (at([3, 6, 9], EViT(Ratio(0.5), fuse=False)), 2.282),
    "top-K 0.9": (haurum(0.9), 3.960),
    "top-K 0.7": (haurum(0.7), 2.980),
    "top-K 0.5": (haurum(0.5), 2.278),
    "ToMe r = 8": (every(1, ToMe(Drop(8))), 3.416),
    "ToMe r = 13": (every(1, ToMe(Drop(13))), 2.703),
    "ToMe r = 16": (every(1, ToMe(Drop(16))), 2.291),
}


@pytest.mark.parametrize("name", ANCHORS)
def test_published_costs_are_hit_to_three_decimals(name, small):
    placement, gmacs = ANCHORS[name]
    assert reference(small, placement) == pytest.approx(gmacs, abs=5.01e-4)


@pytest.mark.parametrize(("size", "gmacs"), [("tiny", 1.254), ("base", 17.564)])
def test_the_other_deits(size, gmacs):
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224")
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert reference(model.eval(), at([], Identity())) == pytest.approx(gmacs, abs=5.01e-4)


@pytest.mark.parametrize(
    ("points", "bound"), [(24, 1.69), (48, 2.07), (72, 2.46), (96, 2.86), (128, 3.41), (160, 3.96)]
)
def test_the_upper_bounds_of_ats_at_block_3(small, points, bound):
    """Methods 14.2: ATS cuts the attention rows before they meet the values. Even scores make it keep all K."""
    reducer = ATS(Count(points), score="value_norm")
    with torch.no_grad():
        model = timm.create_model("deit_small_patch16_224", depth=12).eval()
        model.blocks[3].attn.qkv.weight[2 * 384 :].zero_()  # every value is the bias: all scores are equal
        model.blocks[3].attn.qkv.bias[2 * 384 :].fill_(1.0)
        _, trace = reduce_tokens(model, at(3, reducer)).trace(torch.randn(1, 3, 224, 224))
    assert trace.tokens[0, -1] == points + 1
    assert float(trace.reference_macs[0]) / 1e9 == pytest.approx(
        bound, abs=6e-3
    )  # given to two decimals; K = 128 is 3.405


def test_hvt_published_costs_follow_from_the_counting_rule():
    """Methods 0.4: the rule gives HVT-S-1 … 4 their published 2.40/1.94/1.62/1.39 from their token counts alone."""
    from reducers.cost import BlockCost

    shape = BlockCost(384 * 384, 2 * 384 * 384, 384, 384 * 384, 8 * 384 * 384)
    for pooled, published in {(0,): 2.402, (0, 6): 1.941, (0, 4, 8): 1.620, (0, 3, 6, 9): 1.394}.items():
        tokens, total = 196, 196 * 768 * 384 + 1000 * 384.0
        for block in range(12):
            n = torch.tensor([tokens])
            total += float(shape.macs(queries=n, keys=n, outputs=n, mlp=n))
            if block in pooled:
                tokens = (tokens - 3) // 2 + 1
        assert total / 1e9 == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fvcore_agrees_on_every_kind_of_model(kind, images):
    model = make_vit(kind)
    _, trace = reduce_tokens(model, at([], Identity())).trace(images[:1])
    assert fvcore_macs(model, images[:1]) == pytest.approx(float(trace.macs[0]), rel=1e-9)


@torch.no_grad()
def test_fvcore_agrees_on_deit_small_fused_or_not(small):
    image = torch.randn(1, 3, 224, 224)
    assert fvcore_macs(small, image) / 1e9 == pytest.approx(4.599, abs=5.01e-4)
    for block in small.blocks:
        block.attn.fused_attn = False
    try:
        assert fvcore_macs(small, image) / 1e9 == pytest.approx(4.599, abs=5.01e-4)
    finally:
        for block in small.blocks:
            block.attn.fused_attn = True


@torch.no_grad()
def test_fvcore_agrees_on_the_rows_really_computed(images):
    """The reduced model, traced: what runs is what is counted, but for the reducer's own work,
    which fvcore sees in part.
    """
    model = make_vit()
    reduced = reduce_tokens(model, at([1, 3], TopK(Count(9))))
    _, trace = reduced.trace(images[:1])
    traced = fvcore_macs(reduced, images[:1])
    executed, own = float(trace.macs[0]), float(trace.reducer_macs[0])
    assert executed - own <= traced <= executed * (1 + 1e-9)


@torch.no_grad()
def test_a_pure_selection_computes_fewer_rows_than_the_published_order(images):
    _, trace = reduce_tokens(make_vit(), at([0, 1], TopK(Count(9)))).trace(images)
    assert (trace.macs < trace.reference_macs).all()
