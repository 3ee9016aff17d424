"""Ties and exact halves, each by hand: which of equal tokens is chosen, merged or lives on, and where a point falls.

Equal scores are no rarity: a plain background gives many, a dropped head gives zeros, integers give halves.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reducers import Keep, Layout, Merge
from reducers.kit.clustering import nearest_centre
from reducers.kit.pairs import bipartite_pairs, merge_pairs
from reducers.kit.selection import first_of, keep_highest, rank_patches
from reducers.methods.ats import cumulative, even_points, sample_inverse, sample_nearest, sample_official, significance
from reducers.methods.evit import fuse_the_rest
from reducers.methods.pitome import merge_by_rank
from reducers.noise import image_keys, stream, uniform
from reducers.runtime.plain import carriers
from reducers.tokens import Counts

CPU = torch.device("cpu")
SHARES = (0.0, 0.25, 0.5)  # few values, so that most draws tie


def alike(tokens: int, prefix: int = 1, images: int = 1) -> Layout:
    return Layout.alike(images, tokens, prefix, CPU)


def ragged(*lengths: int, prefix: int = 1) -> Layout:
    return Layout.ragged(torch.tensor(lengths), torch.full((len(lengths),), prefix))


def chosen(mask: Tensor) -> list[int]:
    return mask[0].nonzero().flatten().tolist()


# Which member of a group lives on


@settings(deadline=None)
@example([(0, 0.5), (1, 0.5), (1, 0.5), (1, 0.5)])  # equal members: the first
@example([(1, 0.25), (1, 0.5), (0, 0.0), (1, 0.5)])  # the heaviest two are equal: the first of them
@example([(-1, 0.5), (0, 0.0), (0, 0.0), (1, 0.25)])  # no weight at all is still a member; a dropped token is none
@given(st.lists(st.tuples(st.integers(-1, 2), st.sampled_from(SHARES)), min_size=1, max_size=8))
def test_of_equally_heavy_members_the_first_in_the_image_lives_on(members: list[tuple[int, float]]) -> None:
    """The specification says the heaviest; of equal ones it is the first, whichever of them the others joined."""
    group, weight = [g for g, _ in members], [w for _, w in members]
    expected = []
    for row in range(3):
        those = [i for i, g in enumerate(group) if g == row]
        expected.append(max(those, key=lambda i: weight[i]) if those else -1)
    merge = Merge(ragged(len(group), prefix=0), ragged(3, prefix=0), torch.tensor(group), torch.tensor(weight))
    assert merge.source.tolist() == expected


def test_the_member_that_lives_on_is_the_same_through_two_merges():
    old, middle, new = alike(5, 0), alike(3, 0), alike(1, 0)
    first = Merge(old, middle, torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0.5, 0.5, 0.25, 0.75, 1.0]))
    second = Merge(middle, new, torch.tensor([0, 0, 0]), torch.tensor([0.25, 0.5, 0.25]))
    assert first.source.tolist() == [0, 3, 4]
    both = first.then(second)
    assert both.member_weights().tolist() == [0.125, 0.125, 0.125, 0.375, 0.25]
    assert both.source.tolist() == [3] == first.source[second.source].tolist()


# The highest scores


@pytest.mark.parametrize("layout", [alike(41, 1, images=2), ragged(41, 30)], ids=["alike", "ragged"])
def test_of_equal_scores_the_lower_index_ranks_first_however_many_there_are(layout):
    """Long enough that an unstable sort would show."""
    scores = torch.tensor([float(i % 2) for i in layout.row_index.tolist()])
    order = rank_patches(layout, scores)
    for image, patches in enumerate(layout.patch_counts):
        ones = [i for i in range(patches) if i % 2 == 0]  # a patch's place in the image is one more
        assert order[image, :patches].tolist() == [*ones, *(i for i in range(patches) if i % 2)]
    count = torch.tensor([3, 3])
    assert chosen(first_of(order, count)) == [0, 2, 4]
    kept = keep_highest(layout, scores, Counts.of(layout, 3 if layout.uniform else count))
    assert isinstance(kept, Keep)
    assert layout.row_index[kept.rows].tolist() == [0, 1, 3, 5] * 2


def test_tied_scores_leave_the_later_patches_to_be_fused():
    layout = alike(6)
    scores = torch.tensor([0.9, 0.2, 0.3, 0.2, 0.2, 0.3])
    merge = fuse_the_rest(layout, first_of(rank_patches(layout, scores), torch.tensor([3])), scores, count=3)
    assert merge.group.tolist() == [0, 1, 2, 4, 4, 3]
    assert merge.source.tolist() == [0, 1, 2, 5, -1]


# ATS: where points meet the cumulative distribution


def cdf_of(*scores: float) -> tuple[Tensor, Tensor]:
    """(1, N + 2) with two places of padding."""
    valid = torch.tensor([[True] * len(scores) + [False] * 2])
    return cumulative(torch.tensor([[*scores, 9.0, 9.0]], dtype=torch.float64), valid), valid


@pytest.mark.parametrize(
    ("scores", "points", "tokens"),
    [
        ((1, 1, 1, 1), 2, [0, 2]),  # points 1/4 and 3/4 lie exactly on the CDF: the first that reaches them
        ((0, 1, 0, 1, 0), 1, [1]),  # 1/2 is reached at 1, and again at 2, which adds nothing
        ((0, 1, 0, 1, 0), 2, [1, 3]),  # a token of no score is never chosen, not even where the CDF is 0
        ((3, 1), 2, [0]),  # 3/4 belongs to the first token still
        ((0, 0, 0), 3, [0, 1, 2]),  # no score at all: all alike
        ((1, 2, 1), 1, [1]),
    ],
)
def test_a_point_on_the_cdf_belongs_to_the_first_token_that_reaches_it(scores, points, tokens):
    cdf, valid = cdf_of(*scores)
    assert chosen(sample_inverse(cdf, points) & valid) == tokens
    assert chosen(sample_inverse(cdf, torch.tensor([points])) & valid) == tokens


@pytest.mark.parametrize(
    ("scores", "points", "tokens"),
    [
        ((1, 1), 2, [0]),  # CDF 1/2, 1: 3/4 is exactly half-way, and the lower token takes it
        ((0, 0, 1), 1, [0]),  # CDF 0, 0, 1: half-way to the first of two equal ones
        ((1, 0, 1), 1, [0]),  # CDF 1/2, 1/2, 1: the point is on both, the first takes it
        ((4, 0, 6), 1, [0]),  # CDF 0.4, 0.4, 1: 1/2 lies above both, the first takes it
        ((1, 5, 0, 4), 1, [1]),  # CDF 0.1, 0.6, 0.6, 1: 1/2 lies below both, the first takes it
        ((1, 2, 1), 2, [0, 1]),  # CDF 1/4, 3/4, 1: both points on the CDF
        ((1, 1, 2), 2, [0, 1]),  # CDF 1/4, 1/2, 1: 3/4 half-way between the last two
    ],
)
def test_a_point_half_way_between_two_cdf_values_belongs_to_the_lower_token(scores, points, tokens):
    """Nearest lookup; the published formula is silent on ties."""
    cdf, valid = cdf_of(*scores)
    grid, used = even_points(torch.tensor([points]), points + 1, cdf.dtype)  # one place of padding here, too
    assert chosen(sample_nearest(cdf, valid, grid, used)) == tokens


def test_an_image_without_candidates_has_no_share_and_no_token():
    """Beside one that has two; 0 and not the quotient of zeros."""
    scores = torch.tensor([[3.0, 1.0], [5.0, 5.0]])
    valid = torch.tensor([[True, True], [False, False]])
    assert significance(scores, valid).tolist() == [[0.75, 0.25], [0, 0]]
    assert cumulative(scores, valid).tolist() == [[0.75, 1], [0, 0]]
    for found in (sample_inverse(cumulative(scores, valid), 2), sample_official(significance(scores, valid), valid, 2)):
        assert not (found & valid)[1].any() and (found & valid)[0].any()


def test_the_release_ranks_equal_scores_in_token_order():
    """Four alike: CDF 0, 1/3, 2/3, 1; points 1/3, 5/9, 7/9, 1 fall on the second, the third twice, and the last."""
    valid = torch.tensor([[True] * 4 + [False] * 2])
    shares = significance(torch.tensor([[1.0, 1, 1, 1, 9, 9]], dtype=torch.float64), valid)
    assert shares.tolist() == [[0.25, 0.25, 0.25, 0.25, 0, 0]]
    assert chosen(sample_official(shares, valid, 4)) == [1, 2, 3]
    lower = significance(torch.tensor([[2.0, 1, 2, 1, 9, 9]], dtype=torch.float64), valid)
    assert chosen(sample_official(lower, valid, 4)) == [0, 2, 3], "of two equal lowest ones the first is lost"


def test_the_release_ranks_many_equal_scores_in_token_order():
    """Forty alike and forty that are half as much, by turns; a sort that is not stable loses another one."""
    scores = torch.tensor([[2.0 if i % 2 else 1.0 for i in range(80)]], dtype=torch.float64)
    valid = torch.ones(1, 80, dtype=torch.bool)
    order = [*range(0, 80, 2), *range(1, 80, 2)]
    running, total = [], 0.0
    for i in order:
        total += float(scores[0, i])
        running.append(total)
    cdf = [(value - running[0]) / (running[-1] - running[0]) for value in running]
    points = [cdf[1] + k * (1 - cdf[1]) / 29 for k in range(30)]
    nearest = {order[min(range(80), key=lambda i, p=point: (abs(cdf[i] - p), i))] for point in points}
    assert chosen(sample_official(significance(scores, valid), valid, 30)) == sorted(nearest)


# Merging pairs of equal similarity


@pytest.mark.parametrize("count", [2, torch.tensor([2])], ids=["alike", "each its own"])
def test_of_equal_pairs_the_lower_even_place_merges_into_the_lowest_odd_one(count):
    """All similarities are 1. Places 2 and 4 merge, and their partner is place 1, not a neighbour of their own."""
    layout = alike(7)
    best, partner = bipartite_pairs(torch.ones(7, 3), layout)
    merge = merge_pairs(layout, best, partner, Counts.of(layout, count), torch.ones(7))
    assert merge.group.tolist() == [0, 2, 2, 3, 2, 4, 1]
    assert merge.source.tolist() == [0, 6, 1, 3, 5]
    assert merge.weight.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1, 1 / 3, 1, 1])


@pytest.mark.parametrize("layout", [alike(81, images=2), ragged(81, 60)], ids=["alike", "ragged"])
def test_of_many_equal_pairs_the_lower_places_merge_first(layout):
    """Long enough that an unstable sort would show: every second even place is as similar as the others of its kind."""
    best = torch.tensor([[-torch.inf] + [1.0 if place % 4 == 2 else 0.5 for place in range(2, 82, 2)]] * 2)
    best = best[:, : (layout.longest + 1) // 2].masked_fill(~layout.valid[:, 0::2], -torch.inf)
    count = Counts.of(layout, 25 if layout.uniform is not None else torch.tensor([25, 20]))
    merge = merge_pairs(layout, best, torch.zeros(best.shape, dtype=torch.int64), count, torch.ones(layout.rows))
    for image, first in enumerate(layout.starts.tolist()):
        even = range(2, layout.counts[image], 2)
        in_order = [*(p for p in even if p % 4 == 2), *(p for p in even if p % 4 == 0)]
        pairs = 25 if image == 0 or layout.uniform is not None else 20
        host = merge.group[first + 1]  # the lowest odd place is everybody's partner
        into = [place for place in even if merge.group[first + place] == host]
        assert into == sorted(in_order[:pairs])


def test_equal_pairs_merge_alike_beside_another_image():
    layout = ragged(9, 7, 4)
    best, partner = bipartite_pairs(torch.ones(layout.rows, 3), layout)
    merge = merge_pairs(layout, best, partner, Counts.of(layout, torch.tensor([1, 2, 0])), torch.ones(layout.rows))
    assert (merge.group[9:16] - 8).tolist() == [0, 2, 2, 3, 2, 4, 1]
    assert (merge.group[16:] - 13).tolist() == [0, 1, 2, 3], "nothing to merge: the order stays"


def test_a_merged_pair_of_equal_sizes_is_continued_by_the_first_and_of_others_by_the_larger():
    """The odd member hosts the pair, but it is the even one that lives on where it comes first."""
    layout = alike(5)
    metric = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.0], [0.0, 0.9]])
    best, partner = bipartite_pairs(metric, layout)
    equal = merge_pairs(layout, best, partner, Counts.of(layout, 2), torch.ones(5))
    assert equal.group.tolist() == [0, 1, 2, 2, 1]
    assert equal.source.tolist() == [0, 1, 2]
    larger = merge_pairs(layout, best, partner, Counts.of(layout, 2), torch.tensor([1.0, 1.0, 1.0, 3.0, 2.0]))
    assert larger.source.tolist() == [0, 4, 3]


def test_pitome_takes_the_lowest_rank_of_equal_partners():
    layout = alike(7)
    metric = torch.ones(1, 6, 1)
    label = merge_by_rank(layout, metric, torch.arange(6)[None], torch.tensor([2]))
    assert label.tolist() == [[2, 2, 2, 3, 0, 1]]


def test_of_equally_near_centres_the_first_owns_a_patch():
    distance = torch.tensor([[[0.0, 2, 1], [2, 0, 1], [1, 1, 0]]])
    assert nearest_centre(distance, torch.tensor([[True, True, False]])).tolist() == [[0, 1, 0]]


# Halves


def test_a_centre_on_the_border_of_two_smaller_patches_belongs_to_the_one_that_begins_there():
    """Three patches over two: the middle one's centre is exactly where the second begins."""
    cover, original = carriers((1, 3), (1, 2), CPU)
    assert cover.tolist() == [0, 1, 1]
    assert original.tolist() == [0, 2]


# Random numbers belong to the whole image


@pytest.mark.parametrize("size", [16, 48, 224])
def test_every_part_of_an_image_tells_it_from_another(size):
    """A change in any eighth of the rows or the columns, of one channel alone, is another image's key."""
    image = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))
    part = size // 8
    others = []
    for channel in range(3):
        for first in range(0, size, part):
            for where in (slice(first, first + part), slice(None)), (slice(None), slice(first, first + part)):
                changed = image.clone()
                changed[channel, where[0], where[1]] += 1.0
                others.append(changed)
    keys = image_keys(torch.stack([image, *others]))
    assert len(keys.unique()) == len(keys)
    assert torch.equal(image_keys(image[None]), keys[:1])


def test_every_use_of_random_numbers_has_its_own():
    """Of another seed, block, reducer of a stack or kind of use, and of another image: none repeats."""
    keys, counter = torch.tensor([[3], [4]]), torch.arange(500)
    uses = [(s, b, d, k) for s in (0, 1) for b in (0, 1, 11) for d in (0, 1, 2) for k in (0, 1)]
    drawn = torch.cat([uniform(keys, counter, seed=s, stream=stream(b, d, kind=k)).flatten() for s, b, d, k in uses])
    assert len(drawn.unique()) == len(drawn) == 36 * 2 * 500
    assert ((drawn > 0) & (drawn < 1)).all()
    assert drawn.mean() == pytest.approx(0.5, abs=5 * (12 * len(drawn)) ** -0.5)
    again = uniform(keys[1:], counter[7:8], seed=1, stream=stream(11, 2, kind=1))
    assert again.item() == drawn[-493], "whatever else is drawn with it"
