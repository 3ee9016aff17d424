"""Shrinking radial patterns, and HVT's pooling with learned positions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reducers import ATS, Count, EViT, Ratio, ReducerError, ToMe, TopK, at, reduce_tokens
from reducers.methods import HVTPool, ShrinkingPattern
from reducers.methods.hvt_pool import pooled_length
from reducers.methods.shrinking_pattern import counts_within, distances, radius_at

from .conftest import make_vit, nested_squares

NORMS = ["l1", "l2", "linf"]


def published_mask(norm, start, end, block):
    """The pattern of a block on 14 x 14 patches, as the definition reads."""
    axis = torch.linspace(-7, 7, 14, dtype=torch.float64)
    y, x = axis[:, None].abs(), axis[None].abs()
    z = {"l1": x + y, "l2": (x**2 + y**2).sqrt(), "linf": torch.maximum(x.expand(14, 14), y.expand(14, 14))}[norm]
    steps = torch.linspace(float(z.max()), 1.0, end - start + 3, dtype=torch.float64)[1:-1]
    return z <= steps[block - start] + 1e-9


@pytest.mark.parametrize("norm", NORMS)
def test_counts_are_those_of_the_published_radii(norm):
    far = torch.tensor(distances((14, 14), norm), dtype=torch.float64).view(14, 14)
    assert far.max() == {"l1": 14.0, "l2": pytest.approx(98**0.5), "linf": 7.0}[norm]
    for start, end in ((3, 11), (0, 11), (3, 5)):
        for block in range(start, end + 1):
            radius = radius_at(block, start, end, (14, 14), norm)
            mask = published_mask(norm, start, end, block)
            assert torch.equal(far <= radius + 1e-9, mask)
            assert counts_within((14, 14), norm, radius) == int(mask.sum())


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_shrinking_patterns_are_symmetric_nested_and_the_same_for_every_image(norm, images):
    _, trace = reduce_tokens(make_vit(), at([0, 1, 2, 3], ShrinkingPattern(norm=norm))).trace(images)
    far = torch.tensor(distances((6, 6), norm)).view(6, 6)
    for block, square in enumerate(nested_squares(trace, range(4))):
        assert torch.equal(square, far <= max(radius_at(block, 0, 3, (6, 6), norm), float(far.min())) + 1e-5)


@torch.no_grad()
def test_a_block_that_is_left_out_changes_no_other_radius(images):
    everywhere = reduce_tokens(make_vit(), at([1, 2, 3], ShrinkingPattern(start=1, end=3))).trace(images)[1]
    some = reduce_tokens(make_vit(), at([1, 3], ShrinkingPattern(start=1, end=3))).trace(images)[1]
    assert torch.equal(everywhere.kept(1), some.kept(1)) and torch.equal(everywhere.kept(3), some.kept(3))
    assert some.tokens[0, 2] == some.tokens[0, 3] > everywhere.tokens[0, 3]


@torch.no_grad()
def test_a_shrinking_pattern_after_other_reducers_keeps_the_middle_of_what_is_left(images):
    far = torch.tensor(distances((6, 6), "l2"))
    for before in (TopK(Ratio(0.7)), ATS(Ratio(0.7)), EViT(Ratio(0.7))):
        first = reduce_tokens(make_vit(), at(0, before)).trace(images)[1]
        _, trace = reduce_tokens(make_vit(), at(0, before) | at(2, ShrinkingPattern())).trace(images)
        within = counts_within((6, 6), "l2", radius_at(2, 0, 3, (6, 6), "l2"))
        assert (trace.kept(2).sum(1) == first.kept(0).sum(1).clamp(max=within)).all()
        for image in range(len(images)):
            kept, dropped = trace.kept(2)[image], first.kept(0)[image] & ~trace.kept(2)[image]
            if dropped.any():
                assert far[kept].max() <= far[dropped].min()


def test_a_shrinking_pattern_outside_its_blocks_is_refused(images):
    with pytest.raises(ReducerError, match="blocks 1 to 2 and was placed at block 3"):
        reduce_tokens(make_vit(), at(3, ShrinkingPattern(start=1, end=2)))(images)
    with pytest.raises(ReducerError, match="end=1.*2 or more"):
        ShrinkingPattern(start=2, end=1)
    with pytest.raises(ReducerError, match="choose one of"):
        ShrinkingPattern(norm="l3")


def hvt(kind="average", blocks=(1, 2, 3), **changes):
    torch.manual_seed(0)
    base = make_vit(kind, **changes).double()
    return reduce_tokens(base, at(list(blocks), HVTPool(site="input", positions=True)))


def slow_hvt(model, tables, images):
    """Average-pooled ViT; max pooling and new positions after the blocks before those of the tables."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for index, block in enumerate(model.blocks):
        if str(index) in tables:
            x = F.max_pool1d(x.transpose(1, 2), 3, 2).transpose(1, 2) + tables[str(index)]
        x = block(x)
    return model.forward_head(model.norm(x))


def test_hvt_is_an_average_pooled_vit_with_pooling_and_new_positions(images):
    """Logits and every gradient, against timm's own blocks and torch's pooling."""
    driven = hvt()
    (reducer,) = driven.members()
    assert [len(table) for table in reducer.tables.values()] == [17, 8, 3]
    logits, trace = driven.trace(images.double())
    assert trace.tokens[0].tolist() == [36, 36, 17, 8, 3]
    expected = slow_hvt(driven.base, reducer.tables, images.double())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    names = [name for name, _ in driven.named_parameters()]
    for found, true in zip(
        torch.autograd.grad(logits.square().sum(), list(driven.parameters())),
        torch.autograd.grad(expected.square().sum(), list(driven.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, true, rtol=1e-7, atol=1e-9, msg=lambda m: f"{names}: {m}")


@torch.no_grad()
def test_hvt_that_pools_nowhere_is_the_vit_without_a_class_token(images):
    plain = make_vit("average").double()
    torch.testing.assert_close(reduce_tokens(plain, at([], HVTPool()))(images.double()), plain(images.double()))
    bare = make_vit("average").double()
    reducer = HVTPool(site="input", positions=True)
    driven = reduce_tokens(bare, at(2, reducer))
    for table in reducer.tables.values():
        table.zero_()
    pooled = reduce_tokens(bare, at(2, HVTPool(site="input")))
    assert torch.equal(driven(images.double()), pooled(images.double())), "without positions it is the adapted form"


def test_the_published_numbers_of_parameters():
    """HVT-S-1: 97 x 384 = 37 k on top of the plain model's; four stages: 97 + 48 + 23 + 11 vectors."""
    for blocks, places in (([1], 97), ([1, 4, 7, 10], 97 + 48 + 23 + 11)):
        model = make_vit("average", img_size=112, depth=12, embed_dim=16)
        reducer = HVTPool(site="input", positions=True)
        reduce_tokens(model, at(blocks, reducer))
        assert sum(p.numel() for p in reducer.parameters()) == places * 16
    assert 97 * 384 == 37248
    lengths = [196]
    for _ in range(4):
        lengths.append(pooled_length(lengths[-1]))
    assert lengths == [196, 97, 48, 23, 11]


def test_positions_start_small_and_are_never_decayed():
    reducer = HVTPool(site="input", positions=True)
    model = make_vit("average", img_size=112, depth=12, embed_dim=64)
    reduce_tokens(model, at([1, 4, 7, 10], reducer))
    values = torch.cat([table.flatten() for table in reducer.tables.values()])
    assert abs(float(values.detach().std()) - 0.02) < 0.002 and abs(float(values.detach().mean())) < 0.002
    assert reducer.no_weight_decay() == {"tables.1", "tables.4", "tables.7", "tables.10"}
    assert {name for name, _ in reducer.named_parameters()} == reducer.no_weight_decay()
    assert reducer.traits.trained and not HVTPool().traits.trained


@torch.no_grad()
def test_positions_are_refused_where_others_have_removed_patches(images):
    for before in (TopK(Count(20)), ATS(Ratio(0.6)), ToMe(Ratio(0.6))):
        driven = reduce_tokens(make_vit(), at(0, before) | at([1, 2], HVTPool(site="input", positions=True)))
        with pytest.raises(ReducerError, match="let no other remove patches before it"):
            driven(images)
    split = at(1, HVTPool(positions=True)) | at(2, HVTPool(positions=True))
    with pytest.raises(ReducerError, match="one reducer at all its blocks"):
        reduce_tokens(make_vit(), split)(images)
