"""Whatever images, prefixes and maps there are: a map is its matrix, and one map after another is their product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reducers import Keep, Layout, Merge, Mix, TokenMap
from reducers.maps import Mask, keep_patches, keep_rows

KINDS = ("keep", "merge", "whole merge", "mix", "mask")
EXACT = {"rtol": 0, "atol": 1e-10}
lengths = st.lists(st.integers(0, 7), min_size=1, max_size=4)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A few images, each with its own number of tokens and of prefix tokens, or all alike."""
    if draw(st.booleans()):
        tokens = draw(st.integers(0, 7))
        return Layout.alike(draw(st.integers(1, 4)), tokens, draw(st.integers(0, min(2, tokens))), torch.device("cpu"))
    counts = draw(lengths)
    prefix = [draw(st.integers(0, min(2, count))) for count in counts]
    return Layout.ragged(torch.tensor(counts), torch.tensor(prefix))


def numbers(draw: st.DrawFn, count: int) -> Tensor:
    """(count,) float64 in [0, 1], seeded: their values do not matter, only where they stand."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def some_merge(draw: st.DrawFn, layout: Layout, *, whole: bool) -> Merge:
    """Each token goes to any new token of its image, or to none."""
    counts = [draw(st.integers(1 if whole and count else 0, max(count, 1))) for count in layout.counts]
    new = Layout.ragged(torch.tensor(counts), torch.zeros(len(counts), dtype=torch.int64))
    starts = new.starts.tolist()
    group = []
    for image, count in enumerate(layout.counts):
        least = 0 if whole else -1
        for _ in range(count):
            place = draw(st.integers(least, counts[image] - 1))
            group.append(place if place < 0 else starts[image] + place)
    members = torch.tensor(group, dtype=torch.int64)
    return Merge(layout, new, members, numbers(draw, layout.rows), drops_none=whole)


def some_mix(draw: st.DrawFn, layout: Layout) -> Mix:
    rows = draw(st.integers(1, 4))
    new = Layout.alike(layout.images, rows, 0, torch.device("cpu"))
    weights = numbers(draw, layout.images * rows * layout.longest).view(layout.images, rows, layout.longest)
    return Mix(layout, new, weights * layout.valid[:, None])


def some_map(draw: st.DrawFn, layout: Layout, kind: str) -> TokenMap:
    match kind:
        case "keep":
            return keep_rows(layout, numbers(draw, layout.rows) < draw(st.sampled_from([0.0, 0.5, 1.0])))
        case "mask":
            return Mask.of(layout, numbers(draw, layout.rows).where(~layout.is_prefix, 1.0))
        case "mix":
            return some_mix(draw, layout)
        case _:
            return some_merge(draw, layout, whole=kind == "whole merge")


@st.composite
def maps(draw: st.DrawFn) -> TokenMap:
    return some_map(draw, draw(layouts()), draw(st.sampled_from(KINDS)))


@st.composite
def chains(draw: st.DrawFn, count: int) -> list[TokenMap]:
    """Maps that follow one another."""
    chain = [draw(maps())]
    while len(chain) < count:
        chain.append(some_map(draw, chain[-1].new, draw(st.sampled_from(KINDS))))
    return chain


def features(layout: Layout) -> Tensor:
    return torch.randn(layout.rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(layout.rows))


@settings(deadline=None)
@given(layouts())
def test_padding_and_packing_are_inverse(layout: Layout) -> None:
    x = features(layout)
    padded = layout.pad(x)
    assert torch.equal(layout.unpad(padded), x)
    assert padded.shape[:2] == (layout.images, layout.longest)
    assert int(layout.valid.sum()) == layout.rows == sum(layout.counts)
    assert torch.equal(layout.sum_rows(torch.ones(layout.rows)).long(), layout.lengths)
    assert torch.equal(layout.sum_rows(layout.is_prefix.long()), layout.prefix)


@settings(deadline=None, max_examples=80)
@given(maps())
def test_a_map_is_its_matrix(token_map: TokenMap) -> None:
    x = features(token_map.old)
    written_out = token_map.matrix() @ token_map.old.pad(x)
    torch.testing.assert_close(token_map.new.pad(token_map.apply(x)), written_out, **EXACT)
    assert token_map.apply(x).shape == (token_map.new.rows, 3)


@settings(deadline=None, max_examples=80)
@given(chains(2))
def test_one_map_after_another_is_their_product(chain: list[TokenMap]) -> None:
    one, two = chain
    both = one.then(two)
    assert (both.old, both.new) == (one.old, two.new)
    x = features(one.old)
    torch.testing.assert_close(both.apply(x), two.apply(one.apply(x)), **EXACT)
    torch.testing.assert_close(both.matrix(), two.matrix() @ one.matrix(), **EXACT)


@settings(deadline=None)
@given(chains(3))
def test_composition_is_associative(chain: list[TokenMap]) -> None:
    one, two, three = chain
    torch.testing.assert_close(one.then(two).then(three).matrix(), one.then(two.then(three)).matrix(), **EXACT)


@settings(deadline=None, max_examples=80)
@given(maps())
def test_no_token_comes_from_another_image_or_lives_on_where_it_did_not_go(token_map: TokenMap) -> None:
    old, new = token_map.old, token_map.new
    source, destination = token_map.source, token_map.destination
    assert source.shape == (new.rows,) and destination.shape == (old.rows,)
    living = (source >= 0).nonzero().flatten()
    assert torch.equal(old.row_image[source[living]], new.row_image[living])
    going = (destination >= 0).nonzero().flatten()
    assert torch.equal(new.row_image[destination[going]], old.row_image[going])
    if not isinstance(token_map, Mix):  # of a dense W, a token may lend its largest weight to several
        assert torch.equal(destination[source[living]], living)


@settings(deadline=None, max_examples=80)
@given(maps())
def test_sizes_are_neither_made_nor_lost_but_with_what_is_dropped(token_map: TokenMap) -> None:
    size = torch.rand(token_map.old.rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    if isinstance(token_map, Mix):
        expected = token_map.apply(size)
    else:
        expected = torch.zeros(token_map.new.rows, dtype=torch.float64)
        for row, place in enumerate(token_map.destination.tolist()):
            if place >= 0:
                expected[place] += size[row]
    torch.testing.assert_close(token_map.total(size), expected, **EXACT)


@settings(deadline=None)
@given(chains(2))
def test_where_a_token_went_follows_both_maps(chain: list[TokenMap]) -> None:
    one, two = chain
    both = one.then(two)
    if isinstance(both, Mix):
        return
    ends = [-1 if place < 0 else int(two.destination[place]) for place in one.destination.tolist()]
    assert both.destination.tolist() == ends


@settings(deadline=None)
@given(layouts(), st.integers(0, 2**31))
def test_choosing_patches_keeps_every_prefix_token_and_nothing_unchosen(layout: Layout, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(layout.valid_patches.shape, generator=generator) < 0.5) & layout.valid_patches
    kept = keep_patches(layout, chosen)
    assert isinstance(kept, Keep)
    expected = layout.spread(chosen, prefix=True).nonzero().flatten()
    assert torch.equal(kept.rows, expected)
    assert torch.equal(kept.new.prefix, layout.prefix)
    assert torch.equal(kept.new.lengths, layout.prefix + chosen.sum(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_tokens_passes_through_every_map(kind: str) -> None:
    @settings(deadline=None, max_examples=20)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        layout = Layout.ragged(torch.tensor([0, 3, 0]), torch.tensor([0, 1, 0]))
        token_map = data.draw(st.composite(lambda draw: some_map(draw, layout, kind))())
        out = token_map.apply(features(layout))
        assert torch.isfinite(out).all() and out.shape[0] == token_map.new.rows
        if kind != "mix":  # which makes the same number of tokens for every image
            assert token_map.new.counts[0] == token_map.new.counts[2] == 0 or kind in ("merge", "whole merge")

    check()
