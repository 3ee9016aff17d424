"""ToFu and PiToMe against slow references written from the specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from reducers import ATS, Count, Drop, Keep, Merge, Ratio, ReducerError, ToMe, at, every, reduce_tokens
from reducers.kit.pairs import bipartite_pairs, merge_pairs
from reducers.methods import PiToMe, ToFu
from reducers.methods.pitome import energy, margin_at, merge_best_pairs, merge_by_rank
from reducers.methods.tofu import group_peaks, norm_preserving, without_sources
from reducers.tokens import Counts, Layout

from .conftest import assert_same_alone_and_in_a_batch, make_vit
from .test_evit_tome_topk import attention_parts, embed, feed_forward


def some_merge(x, lengths, prefix=1, count=4):
    """ToMe's merge of packed random tokens."""
    lengths = torch.tensor(lengths)
    layout = Layout.ragged(lengths, torch.full_like(lengths, prefix))
    best, partner = bipartite_pairs(x, layout)
    pairs = torch.full((len(lengths),), count) if layout.uniform is None else count
    return merge_pairs(layout, best, partner, Counts.of(layout, pairs), torch.ones(len(x)))


def test_a_merged_token_has_the_norm_of_its_longest_member():
    x = torch.randn(30, 8, dtype=torch.float64)
    merge = some_merge(x, (17, 13))
    merged = norm_preserving(x, merge)
    for row in range(merge.new.rows):
        members = x[merge.group == row]
        longest = members.norm(dim=1).max()
        torch.testing.assert_close(merged[row].norm(), longest, rtol=1e-6, atol=0)
        direction = F.cosine_similarity(merged[row], members.mean(0), dim=0)
        torch.testing.assert_close(direction, torch.ones_like(direction), rtol=1e-6, atol=0)
        torch.testing.assert_close(group_peaks(x.norm(dim=1), merge)[row], longest)


def test_identical_members_are_unchanged_and_single_ones_untouched():
    x = torch.randn(1, 8, dtype=torch.float64).expand(12, 8).clone()
    x[:5] = torch.randn(5, 8, dtype=torch.float64)
    merge = some_merge(x, (12,), count=3)
    merged = norm_preserving(x, merge)
    for row in range(merge.new.rows):
        members = x[merge.group == row]
        if len(members) == 1:
            assert torch.equal(merged[row], members[0])
        elif (members == members[0]).all():
            torch.testing.assert_close(merged[row], members[0], rtol=1e-6, atol=1e-6)


def test_members_that_cancel_are_defined_with_gradients():
    x = torch.ones(3, 4, dtype=torch.float64)
    x[1] = -1
    x.requires_grad_()
    layout = Layout.alike(1, 3, 1, x.device)
    new = Layout.alike(1, 2, 1, x.device)
    merge = Merge(layout, new, torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.5, 0.5]))
    norm_preserving(x, merge).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_pruning_keeps_each_destination_as_it_was_in_tomes_order():
    x = torch.randn(30, 8)
    merge = some_merge(x, (17, 13))
    keep = without_sources(merge)
    assert isinstance(keep, Keep)
    assert torch.equal(merge.group[keep.rows], torch.arange(merge.new.rows)), "ToMe's order"
    for row in range(merge.new.rows):
        members = (merge.group == row).nonzero().squeeze(1)
        odd = [int(m) for m in members if merge.old.row_index[m] % 2 == 1]
        assert int(keep.rows[row]) == (odd[0] if len(members) > 1 else int(members[0]))


@torch.no_grad()
def test_tofu_prunes_first_and_merges_later(images):
    model = make_vit().double()
    _, trace = reduce_tokens(model, at([0, 1], ToFu(Drop(5)))).trace(images.double())
    assert ((trace.owner(1) >= 0) == trace.kept(1)).all(), "pruned: nobody carries the others"
    _, trace = reduce_tokens(model, at([2, 3], ToFu(Drop(5)))).trace(images.double())
    assert (trace.owner(3) >= 0).all(), "merged: every patch is carried"
    tome = reduce_tokens(model, at(3, ToMe(Drop(5)))).trace(images.double())[1]
    tofu = reduce_tokens(model, at(3, ToFu(Drop(5)))).trace(images.double())[1]
    assert torch.equal(tome.owner(3), tofu.owner(3)), "the same pairs"
    with pytest.raises(ReducerError, match="share of the depth, from 0 to 1"):
        ToFu(Drop(5), switch=2.0)


def slow_pitome(model, images, r):
    """One image at a time, tokens as lists."""
    logits, depth = [], len(model.blocks)
    prefix = model.num_prefix_tokens
    for image in images:
        x = embed(model, image[None])
        size = torch.ones(x.shape[1], dtype=x.dtype)
        for index, block in enumerate(model.blocks):
            _, keys, y = attention_parts(block, x)
            metric = F.normalize(keys[0].mean(0), dim=-1)[prefix:]
            n = len(metric)
            margin = 0.75 * (1 - index / depth)
            levels = []
            for i in range(n):
                cosines = [float(metric[i] @ metric[j]) - margin for j in range(n)]
                levels.append(sum(c if c > 0 else math.exp(c) - 1 for c in cosines) / n)
            ranked = sorted(range(n), key=lambda i: -levels[i])
            pairs = min(r, n // 2)
            first, second = ranked[: 2 * pairs : 2], ranked[1 : 2 * pairs : 2]
            groups = {b: [b] for b in second}
            for a in first:
                groups[max(second, key=lambda b: float(metric[a] @ metric[b]))].append(a)
            members = [[i] for i in range(prefix)]
            members += [[prefix + i] for i in ranked[2 * pairs :]]
            members += [[prefix + i for i in groups[b]] for b in second]
            rows = [sum(size[i] * y[0, i] for i in group) / sum(size[i] for i in group) for group in members]
            size = torch.stack([sum(size[i] for i in group) for group in members])
            x = feed_forward(block, torch.stack(rows)[None])
        logits.append(model.forward_head(model.norm(x)))
    return torch.cat(logits)


@pytest.mark.parametrize("kind", ["class", "registers", "qk_norm"])
@pytest.mark.parametrize("r", [3, 9])
@torch.no_grad()
def test_pitome_equals_the_slow_reference(kind, r, images):
    model = make_vit(kind).double()
    expected = slow_pitome(model, images[:3].double(), r)
    found = reduce_tokens(model, every(1, PiToMe(Drop(r)), depth=4))(images[:3].double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_energy_is_the_published_formula():
    metric = F.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=-1)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    found = energy(metric, valid, margin=0.3)
    for image, n in ((0, 7), (1, 4)):
        for i in range(n):
            off = [float(metric[image, i] @ metric[image, j]) - 0.3 for j in range(n)]
            expected = sum(o if o > 0 else math.exp(o) - 1 for o in off) / n
            assert float(found[image, i]) == pytest.approx(expected)
    assert found[1, 4:].isinf().all()
    assert [margin_at(b, 12) for b in (0, 6, 12)] == [0.75, 0.375, 0.0]


def test_pitome_leaves_an_image_without_pairs_in_its_order():
    metric = F.normalize(torch.randn(2, 6, 5), dim=-1)
    layout = Layout.alike(2, 7, 1, metric.device)
    order = torch.stack([torch.randperm(6), torch.randperm(6)])
    place = merge_by_rank(layout, metric, order, torch.tensor([0, 2]))
    assert torch.equal(place[0], torch.arange(6))
    assert sorted(set(place[1].tolist())) == [0, 1, 2, 3]


@torch.no_grad()
def test_pitome_says_when_a_budget_asks_for_more_than_half(images, caplog):
    _, trace = reduce_tokens(make_vit(), at(0, PiToMe(Count(4)))).trace(images)
    assert trace.tokens[0, 1] == 19
    assert "at most half" in caplog.text


RAGGED = [PiToMe(Count(12)), PiToMe(Ratio(0.7), proportional=True), PiToMe(Ratio(0.7), bipartite=4), ToFu(Count(12))]


@pytest.mark.parametrize("reducer", RAGGED)
@torch.no_grad()
def test_ragged_images_alone_and_in_a_batch(reducer, images):
    driven = reduce_tokens(make_vit().double(), at(0, ATS(Ratio(0.6))) | at([1, 3], reducer))
    trace = assert_same_alone_and_in_a_batch(driven, images)
    assert len(set(trace.tokens[:, 1].tolist())) > 1


def slow_best_pairs(metric, levels, r):
    """Places of the patches of one image: ranks alternate between two sets, the r best pairs merge."""
    ranked = sorted(range(len(metric)), key=lambda i: -levels[i])
    first, second = ranked[0::2], ranked[1::2]
    partner = {a: max(second, key=lambda b: float(metric[a] @ metric[b])) for a in first}
    merged = sorted(first, key=lambda a: -float(metric[a] @ metric[partner[a]]))[:r]
    order = [a for a in first if a not in merged] + second
    return [order.index(partner[i] if i in merged else i) for i in range(len(metric))]


def test_the_bipartite_form_merges_the_best_pairs_between_alternate_ranks():
    lengths = torch.tensor([9, 6, 4])  # with the class token: 8, 5 and 3 patches
    layout = Layout.ragged(lengths, torch.ones_like(lengths))
    metric = F.normalize(torch.randn(3, 8, 5, dtype=torch.float64), dim=-1)
    levels = energy(metric, layout.valid_patches, margin=0.3)
    order = levels.sort(dim=1, descending=True, stable=True).indices
    pairs = torch.tensor([3, 2, 0])
    found = merge_best_pairs(layout, metric, order, pairs)
    for image, (n, r) in enumerate(((8, 3), (5, 2))):
        expected = slow_best_pairs(metric[image, :n], levels[image, :n].tolist(), r)
        assert found[image, :n].tolist() == expected
        assert sorted(set(expected)) == list(range(n - r))
    assert found[2, :3].tolist() == [0, 1, 2], "without pairs an image keeps its order"


@torch.no_grad()
def test_pitome_is_bipartite_in_the_first_blocks_alone(images):
    model, images = make_vit().double(), images.double()
    plain, mixed = (reduce_tokens(model, at([1, 3], PiToMe(Drop(7), bipartite=n))) for n in (0, 2))
    (_, first), (_, second) = plain.trace(images), mixed.trace(images)
    assert torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.owner(1), second.owner(1))
    torch.testing.assert_close(first.macs, second.macs)
    late = [reduce_tokens(model, at(3, PiToMe(Drop(7), bipartite=n))).trace(images)[1].owner(3) for n in (0, 2, 4)]
    assert torch.equal(late[0], late[1])
    assert not torch.equal(late[0], late[2])
    with pytest.raises(ReducerError, match="bipartite=-1"):
        PiToMe(Drop(7), bipartite=-1)
