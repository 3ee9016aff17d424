"""STViT-R on a plain ViT: units of six blocks against a slow reference, and the whole map that they give back."""

from __future__ import annotations

import pytest
import torch

from ablations.workloads import open_model
from reducers import ATS, Count, Placement, Ratio, ReducerError, Stack, ToMe, TopK, at, build, reduce_tokens
from reducers.budget import Drop
from reducers.hosts.timm_vit import TimmBlock
from reducers.kit.semantic import recover
from reducers.methods import STViTR
from reducers.methods.stvit_r import first_blocks
from reducers.reducer import State
from reducers.runtime.cross import cross_block
from reducers.tokens import TokenBatch

from .conftest import KINDS, make_vit
from .test_evit_tome_topk import attention_parts, embed, feed_forward
from .test_stvit import edges, slow_cross


def slow_unit(blocks, x, prefix, shape, centre, *, pooled_keys, residual):
    """Six blocks on one image of 6 x 6 patches: (P + N, D) -> (P + N, D)."""
    x = feed_forward(blocks[0], attention_parts(blocks[0], x[None])[2])[0]
    lead, patches = x[:prefix], x[prefix:]
    square = patches.view(6, 6, -1)
    rows, columns = (edges(6, side) for side in shape)
    pooled = torch.stack([square[a:b, c:d].amax((0, 1)) for a, b in rows for c, d in columns])
    asked = torch.cat([lead, pooled, patches] if pooled_keys else [lead, patches])
    kept = torch.cat([lead, pooled if residual else torch.zeros_like(pooled)])
    first = slow_cross(blocks[1], torch.cat([lead, pooled]), asked, kept)
    asking = first if centre is None else torch.cat([first[:prefix], first[prefix:] + centre])
    semantic = slow_cross(blocks[2], asking, torch.cat([first, patches]), asking)[None]
    for block in blocks[3:5]:
        semantic = feed_forward(block, attention_parts(block, semantic)[2])
    asking = torch.cat([semantic[0, :prefix], patches])
    return slow_cross(blocks[5], asking, semantic[0], asking)


SETTINGS = [{}, {"centres": False, "pooled_keys": False}, {"residual": False}]


@pytest.mark.parametrize("kind", ["class", "qk_norm", "registers", "average"])
@pytest.mark.parametrize("given", SETTINGS, ids=str)
@torch.no_grad()
def test_two_units_equal_a_slow_reference(kind, given, images):
    model = make_vit(kind, depth=13).double()
    reducer = STViTR(Count(6), **given)
    driven = reduce_tokens(model, at(range(12), reducer))
    for centre in reducer.units.values():
        centre.normal_()
    found = driven.forward_features(images.double())
    for image, ours in zip(images[:2].double(), found, strict=False):
        x, shape = embed(model, image[None])[0], (2, 3)
        for first in (0, 6):
            centre = reducer.units[str(first)] if reducer.centres else None
            x = slow_unit(
                model.blocks[first : first + 6], x, model.num_prefix_tokens, shape, centre,
                pooled_keys=reducer.pooled_keys, residual=reducer.residual,
            )  # fmt: skip
        x = feed_forward(model.blocks[12], attention_parts(model.blocks[12], x[None])[2])
        torch.testing.assert_close(ours, model.norm(x)[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_recovery_from_all_patches_themselves_is_the_plain_block(kind):
    """As many semantic tokens as patches, and the blocks between left out."""
    model = make_vit(kind).double()
    prefix = model.num_prefix_tokens
    tokens = torch.randn(3, 36 + prefix, 32, dtype=torch.float64)
    batch = TokenBatch.from_images(tokens, prefix=prefix, has_class_token=prefix > 0, track=True)
    for block in model.blocks:
        found = recover(TimmBlock(block), batch, State(5, 6, 36, (6, 6)), batch)
        torch.testing.assert_close(found.x.view_as(tokens), block(tokens), rtol=0, atol=1e-10)
        torch.testing.assert_close(found.x.view_as(tokens), cross_block(TimmBlock(block), tokens, tokens))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_whole_map_is_back_after_a_unit_and_belongs_to_itself(kind, images):
    model = make_vit(kind, depth=8)
    prefix = model.num_prefix_tokens
    driven = reduce_tokens(model, at(range(1, 7), STViTR(Count(9))))
    logits, trace = driven.trace(images)
    assert torch.isfinite(logits).all()
    whole, few = 36 + prefix, 9 + prefix
    assert trace.tokens.tolist() == [[whole] * 3 + [few] * 4 + [whole] * 2] * len(images)
    identity = torch.arange(36) + prefix
    for block in (0, 1, 6, 7):
        assert torch.equal(trace.owner(block), identity.expand(len(images), -1)) and trace.kept(block).all()
    for block in range(2, 6):
        assert not trace.kept(block).any() and (trace.owner(block) >= prefix).all()
        assert all(len(owner.unique()) == 9 for owner in trace.owner(block))
    assert (trace.class_kept(4) == model.has_class_token).all()
    dense = reduce_tokens(model, Placement()).cost(images)
    assert (trace.macs < dense).all() and torch.equal(trace.macs, trace.reference_macs)
    torch.testing.assert_close(driven.cost(images), trace.macs)


@torch.no_grad()
def test_the_dense_map_is_every_patchs_own(images):
    """Behind a unit every rule of restoring is the identity, and methods that merge may follow."""
    model = make_vit(depth=8)
    unit = at(range(6), STViTR(Count(9)))
    driven = reduce_tokens(model, unit)
    found = driven.features(images, restore="owner")
    assert found.shape == (5, 36, 32)
    for rule in ("last", "zero"):
        assert torch.equal(driven.features(images, restore=rule), found)
    assert torch.equal(driven.forward_features(images)[:, 1:], found)
    assert len(found[0].round(decimals=4).unique(dim=0)) == 36, "no two patches are alike"
    merged = reduce_tokens(model, unit | at(7, ToMe(Drop(5)))).features(images, restore="owner")
    assert len(merged[0].round(decimals=4).unique(dim=0)) == 31


@torch.no_grad()
def test_the_cost_of_a_unit_of_the_embedded_model():
    """Blocks 6-11 and 3 x 3 semantic tokens, with a head of 11 classes a patch: 32.51 of 45.14 million."""
    model = open_model("digits_vit_tiny", weights="random", workload_name="embedded").model
    scene = torch.zeros(1, 1, 64, 64)
    placements = at(range(6, 12), STViTR(Count(9))), Placement()
    found = [float(reduce_tokens(model, placement).cost(scene)) + 64 * 64 * 11 for placement in placements]
    assert [round(macs / 1e6, 2) for macs in found] == [32.51, 45.14]


@torch.no_grad()
def test_the_cost_of_a_unit_is_that_of_its_rows(images):
    """N = 37 tokens, M = 10 semantic ones, the class token among both; rows of 32 features."""
    n, m, d = 37, 10, 32
    linear = [12 * n, 2 * m + 2 * (n + m - 1) + 8 * m, 2 * m + 2 * (n + m - 1) + 8 * m, 12 * m, 12 * m, 10 * n + 2 * m]
    pairs = [n * n, m * (n + m - 1), m * (n + m - 1), m * m, m * m, n * m]
    expected = sum(rows * d * d + 2 * pair * d for rows, pair in zip(linear, pairs, strict=True))
    model = make_vit(depth=6)
    found = reduce_tokens(model, at(range(6), STViTR(Count(9)))).cost(images)
    around = reduce_tokens(model, Placement()).cost(images) - 6 * (12 * n * d * d + 2 * n * n * d)
    assert torch.equal(found - around, torch.full_like(found, expected))


def test_gradients_reach_the_centres_and_all_that_was_pooled(images):
    reducer = STViTR(Count(4))
    model = reduce_tokens(make_vit(depth=12), at(range(12), reducer)).train()
    assert sorted(reducer.units) == ["0", "6"]
    assert all(0 < centre.detach().std().item() < 0.04 for centre in reducer.units.values())
    images = images.requires_grad_()
    model.features(images, restore="owner")[:, 7].square().sum().backward()  # of one recovered patch
    for centre in reducer.units.values():
        assert centre.grad.isfinite().all() and centre.grad.abs().sum(1).min() > 0
    assert (images.grad[:4].abs().sum((1, 2, 3)) > 0).all()
    plain = STViTR(Count(4), centres=False)
    reduce_tokens(make_vit(depth=6), at(range(6), plain))
    assert not list(plain.parameters())


@torch.no_grad()
def test_a_larger_image_has_as_many_semantic_tokens():
    driven = reduce_tokens(make_vit(dynamic_img_size=True, depth=6), at(range(6), STViTR(Ratio(0.25))))
    for size in ((48, 48), (80, 48)):
        whole = size[0] * size[1] // 64 + 1
        trace = driven.trace(torch.randn(2, 3, *size))[1]
        assert trace.tokens[0].tolist() == [whole] * 2 + [10] * 4 + [whole]


@pytest.mark.parametrize("blocks", [range(5), range(7), [0, 1, 2, 3, 4, 6], [3], range(1, 12)])
def test_blocks_that_are_no_whole_units_are_refused(blocks):
    with pytest.raises(ReducerError, match="units of 6 blocks in a row"):
        reduce_tokens(make_vit(depth=12), at(blocks, STViTR()))
    assert first_blocks([*range(7, 13), *range(6)]) == (0, 7)


@torch.no_grad()
def test_what_comes_before_is_refused_and_inside_a_unit_nothing_acts(images):
    model = make_vit(depth=8)
    unit = at(range(1, 7), STViTR(Count(9)))
    for before in (TopK(Ratio(0.9)), ATS(Ratio(0.9)), ToMe(Drop(2))):
        with pytest.raises(ReducerError, match="stvit_r pools the grid .* place other reducers after it"):
            reduce_tokens(model, at(0, before) | unit)(images)
    for block in (1, 4, 6):
        with pytest.raises(ReducerError, match="cannot be stacked"):
            reduce_tokens(model, unit | at(block, TopK(Ratio(0.5))))
    with pytest.raises(ReducerError, match="cannot be stacked"):
        Stack(STViTR(), TopK(Ratio(0.5)))
    trace = reduce_tokens(model, unit | at(7, TopK(Count(5)))).trace(images)[1]
    assert trace.tokens[0].tolist()[-2:] == [37, 6]


@pytest.mark.parametrize("setting", ["centres", "pooled_keys", "residual"])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ReducerError, match=setting):
        build({"name": "stvit_r", setting: "perhaps"})
