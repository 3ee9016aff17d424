"""Maps: applying one equals multiplying by its matrix, and composing two equals applying one after the other."""

from __future__ import annotations

import pytest
import torch

from reducers import Keep, Layout, Merge, Mix
from reducers.kit.pairs import bipartite_pairs, merge_pairs
from reducers.maps import Mask, keep_patches, keep_ranked, keep_rows
from reducers.methods.evit import fuse_the_rest
from reducers.tokens import Counts


def ragged(lengths=(6, 1, 4, 5), prefix=1) -> Layout:
    lengths = torch.tensor(lengths)
    return Layout.ragged(lengths, torch.full_like(lengths, prefix))


def alike(images=3, tokens=7, prefix=2) -> Layout:
    return Layout.alike(images, tokens, prefix, torch.device("cpu"))


def some_keep(layout: Layout) -> Keep:
    return keep_rows(layout, (torch.rand(layout.rows) < 0.6) | layout.is_prefix)


def some_merge(layout: Layout) -> Merge:
    metric = torch.randn(layout.rows, 5, dtype=torch.float64)
    best, partner = bipartite_pairs(metric, layout)
    return merge_pairs(
        layout, best, partner, Counts.of(layout, layout.patches // 2), torch.rand(layout.rows).double() + 0.5
    )


def some_fusion(layout: Layout) -> Merge:
    chosen = torch.rand(layout.valid_patches.shape) < 0.5
    return fuse_the_rest(layout, chosen & layout.valid_patches, torch.rand(layout.rows).double(), count=None)


def some_mix(layout: Layout) -> Mix:
    new = Layout.alike(layout.images, 3, 0, torch.device("cpu"))
    weights = torch.rand(layout.images, 3, layout.longest, dtype=torch.float64) * layout.valid[:, None]
    return Mix(layout, new, weights)


MAKERS = [some_keep, some_merge, some_fusion, some_mix]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("layout", [ragged(), alike(), ragged((3,)), ragged((4, 0, 2), prefix=0)], ids=str)
def test_apply_equals_the_matrix(make, layout):
    token_map = make(layout)
    x = torch.randn(layout.rows, 3, dtype=torch.float64)
    written_out = token_map.matrix() @ layout.pad(x)
    torch.testing.assert_close(token_map.new.pad(token_map.apply(x)), written_out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", MAKERS)
@pytest.mark.parametrize("second", MAKERS)
def test_composition_equals_one_after_the_other(first, second):
    one = first(ragged())
    two = second(one.new)
    both = one.then(two)
    x = torch.randn(one.old.rows, 4, dtype=torch.float64)
    torch.testing.assert_close(both.apply(x), two.apply(one.apply(x)), rtol=0, atol=1e-12)
    torch.testing.assert_close(both.matrix(), two.matrix() @ one.matrix(), rtol=0, atol=1e-12)
    if not isinstance(both, Mix):
        through = two.destination[one.destination.clamp(min=0)].masked_fill(one.destination < 0, -1)
        assert torch.equal(both.destination, through)


def test_composition_is_associative():
    one = some_keep(alike())
    two = some_merge(one.new)
    three = some_keep(two.new)
    left, right = one.then(two).then(three), one.then(two.then(three))
    torch.testing.assert_close(left.matrix(), right.matrix(), rtol=0, atol=1e-12)


def test_a_merge_conserves_sizes_and_the_weighted_sum_of_tokens():
    layout = ragged((9, 4, 12))
    size = torch.rand(layout.rows, dtype=torch.float64) + 0.5
    metric = torch.randn(layout.rows, 5, dtype=torch.float64)
    best, partner = bipartite_pairs(metric, layout)
    merge = merge_pairs(layout, best, partner, Counts.of(layout, torch.tensor([3, 1, 5])), size)
    new_size = merge.total(size)
    x = torch.randn(layout.rows, 2, dtype=torch.float64)
    before = layout.sum_rows(size * x[:, 0])
    after = merge.new.sum_rows(new_size * merge.apply(x)[:, 0])
    torch.testing.assert_close(layout.sum_rows(size), merge.new.sum_rows(new_size))
    torch.testing.assert_close(before, after)
    assert merge.new.lengths.tolist() == [6, 3, 7]
    assert torch.equal(merge.matrix().sum(1) > 0, layout.valid), "every token goes to exactly one new one"


def test_the_heaviest_member_lives_on_in_a_group_and_a_fused_token_is_nobody():
    layout = alike(images=1, tokens=5, prefix=1)
    fused = fuse_the_rest(
        layout, torch.tensor([[True, False, False, True]]), torch.tensor([0.9, 0.1, 0.3, 0.2, 0.4]), count=2
    )
    assert fused.source.tolist() == [0, 1, 4, -1]
    assert fused.destination.tolist() == [0, 1, 3, 3, 2]
    new = Layout.alike(1, 3, 1, torch.device("cpu"))
    group = torch.tensor([0, 1, 2, 1, -1])
    merge = Merge(layout, new, group, torch.tensor([1.0, 0.25, 1.0, 0.75, 0.0]))
    assert merge.source.tolist() == [0, 3, 2]


def test_selecting_by_rank_and_by_mask_agree():
    layout = alike(images=4, tokens=9, prefix=2)
    order = torch.rand(4, 7).argsort(dim=1)
    mask = torch.zeros(4, 7, dtype=torch.bool).scatter_(1, order[:, :3], True)
    by_rank, by_mask = keep_ranked(layout, order, 3), keep_patches(layout, mask)
    assert torch.equal(by_rank.rows, by_mask.rows)
    assert torch.equal(by_rank.new.lengths, by_mask.new.lengths)


def test_padding_and_packing_are_inverse():
    layout = ragged((3, 0, 5, 1))
    x = torch.randn(layout.rows, 2)
    assert torch.equal(layout.unpad(layout.pad(x)), x)
    assert layout.pad(x, fill=-1.0)[1].eq(-1).all()
    assert layout.counts == [3, 0, 5, 1]


LAYOUTS = [ragged(), alike(), ragged((3,)), ragged((4, 0, 2), prefix=0)]


def some_mask(layout: Layout) -> Mask:
    return Mask.of(layout, torch.where(layout.is_prefix, 1.0, torch.rand(layout.rows)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_mask_moves_nothing_and_weighs_nothing(layout):
    """It says how much of a key each token is; features, sizes and provenance pass through unchanged."""
    mask = some_mask(layout)
    x, rows = torch.randn(layout.rows, 3, dtype=torch.float64), torch.arange(layout.rows)
    assert mask.old is layout and mask.new is layout
    assert torch.equal(mask.apply(x), x) and torch.equal(mask.total(x[:, 0]), x[:, 0])
    assert torch.equal(mask.destination, rows) and torch.equal(mask.source, rows)
    assert torch.equal(mask.member_weights(), torch.ones(layout.rows, dtype=torch.float64))
    identity = torch.eye(layout.longest, dtype=torch.float64) * layout.valid[..., None]
    assert torch.equal(mask.matrix(), identity)
    assert (mask.weight[layout.is_prefix] == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_mask_hardens_to_the_gather_of_what_weighs_half_or_more(layout):
    mask = some_mask(layout)
    mask.weight[-1] = 0.5
    keep = mask.harden()
    assert isinstance(keep, Keep)
    expected = [row for row in range(layout.rows) if bool(layout.is_prefix[row]) or float(mask.weight[row]) >= 0.5]
    assert keep.rows.tolist() == expected
    assert keep.new.lengths.tolist() == [
        sum(int(layout.row_image[row]) == image for row in expected) for image in range(layout.images)
    ]
    assert torch.equal(keep.new.prefix, layout.prefix)
    nothing = Mask.of(layout, torch.zeros(layout.rows)).harden()
    assert torch.equal(nothing.new.lengths, layout.prefix), "prefix tokens stay whatever their weight says"
    assert nothing.new.is_prefix.all()


@pytest.mark.parametrize("make", MAKERS)
def test_a_mask_before_or_after_another_map_leaves_it_as_it_is(make):
    layout = ragged()
    token_map = make(layout)
    before, after = some_mask(layout).then(token_map), token_map.then(some_mask(token_map.new))
    for both in (before, after):
        torch.testing.assert_close(both.matrix(), token_map.matrix(), rtol=0, atol=1e-12)
        if not isinstance(token_map, Mix):
            assert torch.equal(both.destination, token_map.destination)
            assert torch.equal(both.source, token_map.source)


def test_values_of_patches_are_spread_over_rows_also_where_prefix_tokens_are_more():
    """Two images of five prefix tokens and of one patch and of none."""
    layout = Layout.ragged(torch.tensor([6, 5]), torch.tensor([5, 5]))
    assert layout.spread(torch.tensor([[7.0], [0.0]]), prefix=-1).tolist() == [*[-1] * 5, 7, *[-1] * 5]
    other = Layout.ragged(torch.tensor([2, 4]), torch.tensor([1, 1]))
    found = other.spread(torch.tensor([[7.0, 9, 9], [1, 2, 3]]), prefix=0.5)
    assert found.tolist() == [0.5, 7, 0.5, 1, 2, 3]
    empty = Layout.ragged(torch.tensor([2, 1]), torch.tensor([2, 1]))
    assert empty.spread(torch.zeros(2, 0), prefix=3).tolist() == [3, 3, 3], "no image has a patch left"
