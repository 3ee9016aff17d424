"""What reducers see after others have decided, value by value: by hand, and against a ViT computed one token at a time.

Within a block ``Signals.through`` carries what the block computed; ``advance`` carries tokens, and what belongs to
them, to the next one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from reducers import (
    ATS,
    Decision,
    Drop,
    EViT,
    Keep,
    Layout,
    Merge,
    Mix,
    Ratio,
    ReducerError,
    Stack,
    State,
    TokenBatch,
    TokenReducer,
    ToMe,
    at,
    build,
    reduce_tokens,
)
from reducers.decision import advance
from reducers.scores import find_score
from reducers.signals import NO_PREVIOUS, Signals

from . import reference as slow
from .conftest import make_vit

# By hand: two images of three and two patches behind a class token, two heads, features of one number


def packed(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BEFORE = Layout.ragged(torch.tensor([4, 3]), torch.tensor([1, 1]))
AFTER = Layout.ragged(torch.tensor([3, 2]), torch.tensor([1, 1]))
FUSED = Merge(  # the last two patches of the first image become nobody's continuation; the last of the second is lost
    BEFORE,
    AFTER,
    torch.tensor([0, 1, 2, 2, 3, 4, -1]),
    packed(1, 1, 0.125, 0.375, 1, 1, 0.75),
    torch.tensor([False, False, True, False, False]),
)
KEYS = packed([1, 1], [2, 6], [4, 8], [12, 0], [1, 3], [5, 7], [9, 9])[..., None]  # (T, H, d)
VALUES = packed([3, 1], [0, 2], [2, 0], [6, 4], [1, 1], [2, 8], [7, 7])[..., None]
FROM_CLASS = packed([0.1, 0.4], [0.2, 0.3], [0.3, 0.2], [0.4, 0.1], [0.5, 0.2], [0.2, 0.2], [0.3, 0.6])
FIRST = [  # (H, L, L), rows are queries
    [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.5, 0.3, 0.1, 0.1]],
    [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]],
]
SECOND = [[[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [1, 0, 0]], [[0.2, 0.2, 0.6], [0.3, 0.3, 0.4], [0, 0, 1]]]


class Given(Signals):
    """A block's signals as numbers."""

    def __init__(self, layout: Layout = BEFORE) -> None:
        super().__init__(layout, packed(1, 2, 1, 3, 1, 1, 1).float(), layout.starts, None)

    def keys(self) -> Tensor:
        return KEYS

    def values(self) -> Tensor:
        return VALUES

    def class_attention(self) -> Tensor:
        return FROM_CLASS

    def attention(self) -> Tensor:
        maps = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
        maps[0], maps[1, :, :3, :3] = packed(*FIRST), packed(*SECOND)
        return maps

    def previous_attention(self) -> Tensor:
        return packed(0.1, 0.3, 0.5, 0.25, 0.75, 0.125, 0.5)

    def output(self) -> Tensor:
        return packed([1], [2], [8], [16], [3], [4], [5])

    def positions(self) -> Tensor:
        return torch.tensor([-1, 0, 1, 2, -1, 0, 1])


def same(found: Tensor, *expected: float | list[float]) -> None:
    torch.testing.assert_close(found.double().squeeze(-1), packed(*expected).squeeze(-1), rtol=0, atol=1e-9)


def test_after_a_merge_keys_and_values_are_means_and_attention_is_a_sum():
    """A fused token's weights are 1/8 and 3/8, and add up to a half: means divide by it."""
    after = Given().through(Decision(FUSED))
    same(after.keys(), [1, 1], [2, 6], [10, 2], [1, 3], [5, 7])
    same(after.values(), [3, 1], [0, 2], [5, 3], [1, 1], [2, 8])
    same(after.class_attention(), [0.1, 0.4], [0.2, 0.3], [0.7, 0.3], [0.5, 0.2], [0.2, 0.2])
    same(after.previous_attention(), 0.1, 0.3, 0.75, 0.75, 0.125)
    same(after.size, 1, 2, 4, 1, 1)
    same(after.output(), [1], [2], [7], [3], [4])  # features are what the map says, undivided
    assert after.positions().tolist() == [-1, 0, -1, -1, 0]
    assert after.cls.tolist() == [0, 3] and after.is_class_token.tolist() == [True, False, False, True, False]
    assert after.layout is AFTER


def test_after_a_merge_rows_of_the_map_are_means_and_columns_are_sums():
    found = Given().through(Decision(FUSED)).attention()
    assert found.shape == (2, 2, 3, 3)
    expected = [
        [[0.1, 0.2, 0.7], [0.4, 0.3, 0.3], [0.4375, 0.2875, 0.275]],  # a quarter of one row, three of the other
        [[0.4, 0.3, 0.3], [0.1, 0.2, 0.7], [0.25, 0.1, 0.65]],
    ]
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    expected = [[[0.5, 0.2, 0], [0.1, 0.6, 0], [0, 0, 0]], [[0.2, 0.2, 0], [0.3, 0.3, 0], [0, 0, 0]]]
    torch.testing.assert_close(found[1], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_attention_received_is_a_mean_over_queries_and_heads_and_a_sum_over_members():
    """Over the four and three queries that the block had, whatever became of them."""
    before = Given()
    each = [(1.25 + 1.3) / 8, (1.05 + 0.7) / 8, (0.85 + 1.0) / 8, (0.85 + 1.0) / 8]
    each += [(1.6 + 0.5) / 6, (0.8 + 0.5) / 6, (0.6 + 2.0) / 6]
    same(before.attention_received(), *each)
    same(before.through(Decision(FUSED)).attention_received(), *each[:2], each[2] + each[3], *each[4:6])


def test_a_decision_on_a_decision_carries_on_from_there():
    """The patch that stayed and the fused token, as much of one as of the other."""
    last = Layout.ragged(torch.tensor([2, 2]), torch.tensor([1, 1]))
    second = Merge(AFTER, last, torch.tensor([0, 1, 1, 2, 3]), packed(1, 0.25, 0.25, 1, 1))
    after = Given().through(Decision(FUSED)).through(Decision(second))
    same(after.keys(), [1, 1], [6, 4], [1, 3], [5, 7])
    same(after.values(), [3, 1], [2.5, 2.5], [1, 1], [2, 8])
    same(after.class_attention(), [0.1, 0.4], [0.9, 0.6], [0.5, 0.2], [0.2, 0.2])
    same(after.previous_attention(), 0.1, 1.05, 0.75, 0.125)
    same(after.size, 1, 6, 1, 1)
    same(after.output(), [1], [2.25], [3], [4])
    assert after.positions().tolist() == [-1, 0, -1, 0]


def test_features_of_a_decision_are_the_output_that_later_ones_see():
    features = packed([1], [2], [70], [3], [4])
    same(Given().through(Decision(FUSED, features)).output(), *features.tolist())


def test_members_of_no_weight_leave_nothing_to_divide():
    nothing = replace(FUSED, weight=packed(1, 1, 0, 0, 1, 1, 0))
    after = Given().through(Decision(nothing))
    same(after.keys(), [1, 1], [2, 6], [0, 0], [1, 3], [5, 7])


def without_prefix(*lengths: int) -> Layout:
    return Layout.ragged(torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.int64))


def test_without_prefix_tokens_too_a_fused_token_is_at_no_place():
    """Row 0 is a patch here: what is no one's continuation must not pass for it."""
    old, new = without_prefix(4, 3), without_prefix(3, 2)
    merge = replace(FUSED, old=old, new=new)
    no_class = torch.tensor([-1, -1])
    given = Given(old)
    given.cls = no_class
    given.positions = lambda: torch.tensor([0, 1, 2, 3, 0, 1, 2])
    after = given.through(Decision(merge))
    assert after.positions().tolist() == [0, 1, -1, 0, 1]
    assert after.cls.tolist() == [-1, -1] and not after.is_class_token.any()
    batch = TokenBatch(given.output(), old, given.size, no_class, pos=given.positions())
    left = advance(batch, Decision(merge))
    assert left.pos.tolist() == [0, 1, -1, 0, 1] and left.cls.tolist() == [-1, -1]


def test_a_dense_map_too_tells_what_comes_from_nowhere():
    """The second token out is made of nothing, the last token in goes nowhere."""
    old, new = without_prefix(3), without_prefix(2)
    mix = Mix(old, new, torch.tensor([[[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]]))
    assert mix.source.tolist() == [1, -1] and mix.destination.tolist() == [0, 0, -1]


def test_a_class_token_that_is_dropped_is_nowhere_and_one_that_was_stays_so():
    old = Layout.ragged(torch.tensor([3, 3]), torch.tensor([1, 1]))
    new = Layout.ragged(torch.tensor([2, 3]), torch.tensor([0, 1]))
    keep = Keep(old, new, torch.tensor([1, 2, 3, 4, 5]))
    batch = TokenBatch(torch.zeros(6, 1), old, torch.ones(6), old.starts)
    dropped = advance(batch, Decision(keep))
    assert dropped.cls.tolist() == [-1, 2]
    fewer = Layout.ragged(torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert advance(dropped, Decision(Keep(new, fewer, torch.tensor([0, 2, 4])))).cls.tolist() == [-1, 1]


# What travels on to the next block, by hand


def batch(**more: object) -> TokenBatch:
    given = Given()
    return TokenBatch(given.output(), BEFORE, given.size, given.cls, **more)


def test_attention_received_in_the_block_before_adds_up_over_members():
    left = advance(batch(received=packed(0.1, 0.3, 0.5, 0.25, 0.75, 0.125, 0.5)), Decision(FUSED))
    same(left.received, 0.1, 0.3, 0.75, 0.75, 0.125)


def test_a_bias_is_a_number_of_keys_and_adds_up_over_members():
    """Tokens that count as 1, 2, 3 … keys; two of them become one that counts as their sum, in whatever weights."""
    left = advance(batch(key_bias=packed(1, 2, 3, 4, 5, 6, 7).log()), Decision(FUSED))
    same(left.key_bias.exp(), 1, 2, 7, 5, 6)
    assert left.biased is None


ALL = Merge(  # nothing but the first image's last two patches merges
    BEFORE, Layout.ragged(torch.tensor([3, 3]), torch.tensor([1, 1])), torch.tensor([0, 1, 2, 2, 3, 4, 5]),
    packed(1, 1, 0.25, 0.75, 1, 1, 1),
)  # fmt: skip
OTHER = Merge(  # and then the second image's
    ALL.new, Layout.ragged(torch.tensor([3, 2]), torch.tensor([1, 1])), torch.tensor([0, 1, 2, 3, 4, 4]),
    packed(1, 1, 1, 1, 0.5, 0.5),
)  # fmt: skip


def test_an_image_of_which_nothing_merges_gets_no_bias_and_one_that_has_one_keeps_it():
    """Sizes (1, 2, 4) of the first image count from its own merge on, those of the second from its own."""
    first = advance(batch(), Decision(ALL, proportional=True))
    same(first.key_bias.exp(), 1, 2, 4, 1, 1, 1)
    assert first.biased.tolist() == [True, False]
    second = advance(first, Decision(OTHER, proportional=True))
    same(second.size, 1, 2, 4, 1, 2)
    same(second.key_bias.exp(), 1, 2, 4, 1, 2)
    assert second.biased.tolist() == [True, True]
    everything = Layout.ragged(torch.tensor([2, 2]), torch.tensor([1, 1]))
    third = advance(second, Decision(Merge(OTHER.new, everything, torch.tensor([0, 1, 1, 2, 3]), torch.ones(5))))
    same(third.key_bias.exp(), 1, 6, 1, 2)


def test_a_merge_without_sizes_counts_members_only_where_there_is_a_bias():
    first = advance(batch(), Decision(ALL, proportional=True))
    second = advance(first, Decision(OTHER))
    same(second.key_bias.exp(), 1, 2, 4, 1, 1)
    assert second.biased.tolist() == [True, False]


def test_a_bias_of_all_images_stays_one_of_all_images():
    first = advance(batch(key_bias=packed(1, 2, 3, 4, 5, 6, 7).log()), Decision(ALL, proportional=True))
    same(first.key_bias.exp(), 1, 2, 4, 5, 6, 7)  # sizes where something merged, as it was elsewhere
    assert first.biased is None
    second = advance(first, Decision(OTHER))
    same(second.key_bias.exp(), 1, 2, 4, 5, 13)


# Against the slow reference


class Watch(TokenReducer):
    """Reduces nothing; keeps what the block's signals say."""

    name = "watch"
    uses_positions = True

    def __init__(self, *names: str, site: str = "attention", previous: bool = False) -> None:
        super().__init__()
        self.names, self.site, self.uses_previous_attention = names, site, previous
        self.seen: dict[str, Tensor] = {}

    def decide(self, signals: Signals, state: State) -> Decision | None:
        self.layout, self.size = signals.layout, signals.size
        self.seen = {name: getattr(signals, name)() for name in self.names}


GRID = (4, 5)
GTP = build({"name": "gtp", "budget": {"drop": 4}, "alpha": 0.3})
BEFORE_IT = {
    "evit": ([EViT(Ratio(0.7))], [slow.evit("0.7")]),
    "tome": ([ToMe(Drop(6))], [slow.tome(drop=6)]),
    "gtp": ([GTP], [slow.gtp(4, 0.3, GRID)]),
    "ats and evit": ([ATS(Ratio(0.7)), EViT(Ratio(0.7))], [slow.ats("0.7"), slow.evit("0.7")]),
    "evit and tome": ([EViT(Ratio(0.7)), ToMe(Drop(4))], [slow.evit("0.7"), slow.tome(drop=4)]),
    "tome and evit": ([ToMe(Drop(4)), EViT(Ratio(0.7))], [slow.tome(drop=4), slow.evit("0.7")]),
}


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(2, 3, 8 * GRID[0], 8 * GRID[1], dtype=torch.float64, generator=torch.Generator().manual_seed(37))


@pytest.fixture
def model():
    return make_vit("registers", qk_norm=True, img_size=(8 * GRID[0], 8 * GRID[1])).double()


def watched(model, picture: Tensor, reducers: list[slow.Reducer]) -> tuple[int, list[slow.Token], list[slow.Seen]]:
    """Tokens that enter block 0, those that its reducers leave, and what the attention says of these."""
    entering: list[int] = []
    after: list[tuple[list[slow.Token], list[slow.Seen]]] = []
    count, watch = lambda t, s: entering.append(len(t)), lambda t, s: after.append((t, s))
    slow.run(model, picture, {0: [count, *reducers, watch]})
    return entering[0], *after[0]


def agree(found: Tensor, expected: list[object], what: str) -> None:
    expected = torch.as_tensor(np.array(expected), dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-9, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("case", BEFORE_IT)
@torch.no_grad()
def test_signals_behind_others_equal_the_slow_reference(case, model, pictures):
    reducers, slowly = BEFORE_IT[case]
    names = ("keys", "values", "class_attention", "attention_received", "output", "positions")
    watch = Watch(*names)
    reduce_tokens(model, at(0, Stack(*reducers, watch)))(pictures)
    for i, picture in enumerate(pictures):
        queries, tokens, seen = watched(model, picture, slowly)
        start, count = int(watch.layout.starts[i]), len(tokens)
        assert watch.layout.counts[i] == count
        found = {name: part[start : start + count] for name, part in watch.seen.items()}
        agree(found["keys"], [s.key for s in seen], "keys")
        agree(found["values"], [s.value for s in seen], "values")
        agree(found["class_attention"], [s.from_class for s in seen], "class attention")
        agree(found["attention_received"], [np.mean(s.received) / queries for s in seen], "attention received")
        agree(found["output"], [t.x for t in tokens], "output")
        assert found["positions"].tolist() == [t.patch for t in tokens]
        assert watch.size[start : start + count].tolist() == [t.size for t in tokens]


@pytest.mark.parametrize("site", ["attention", "input"])
@pytest.mark.parametrize("case", BEFORE_IT)
@torch.no_grad()
def test_attention_in_the_block_before_equals_the_slow_reference(case, site, model, pictures):
    """Of what that block's reducers left; and to a later reducer of the same block, of what the first one leaves."""
    reducers, slowly = BEFORE_IT[case]
    watch = Watch("previous_attention", site=site, previous=True)
    before = reducers[0] if len(reducers) == 1 else Stack(*reducers)
    reduce_tokens(model, at(0, before) | at(1, watch))(pictures)
    for i, picture in enumerate(pictures):
        queries, tokens, seen = watched(model, picture, slowly)
        start = int(watch.layout.starts[i])
        found = watch.seen["previous_attention"][start : start + len(tokens)]
        agree(found, [np.mean(s.received) / queries for s in seen], "attention received in the block before")


@torch.no_grad()
def test_signals_of_images_of_several_lengths_equal_the_slow_reference(model, pictures):
    """In a batch the shorter image is padded, and what stands there is nobody's query and nobody's key."""
    watch = Watch("keys", "class_attention", "attention_received", "attention")
    reduce_tokens(model, at(0, ATS(Ratio(0.7))) | at(1, watch))(pictures)
    assert len(set(watch.layout.counts)) == 2
    for i, picture in enumerate(pictures):
        after: list[tuple[list[slow.Token], list[slow.Seen]]] = []
        slow.run(model, picture, {0: [slow.ats("0.7")], 1: [lambda t, s, found=after: found.append((t, s))]})
        ((tokens, seen),) = after
        start, count = int(watch.layout.starts[i]), len(tokens)
        found = {name: part[start : start + count] for name, part in watch.seen.items() if name != "attention"}
        agree(found["keys"], [s.key for s in seen], "keys")
        agree(found["class_attention"], [s.from_class for s in seen], "class attention")
        agree(found["attention_received"], [np.mean(s.received) / count for s in seen], "attention received")
        maps = watch.seen["attention"][i]
        agree(maps.diagonal(dim1=1, dim2=2).T[:count], [s.itself for s in seen], "attention to itself")
        agree(maps.sum(1).T[:count], [s.received for s in seen], "columns of the map")
        assert (maps[:, count:] == 0).all() and (maps[:, :, count:] == 0).all()


# What cannot be told is refused


@pytest.mark.parametrize("site", ["attention", "input"])
def test_attention_before_the_first_block_is_refused(site, images):
    watch = Watch("previous_attention", site=site, previous=True)
    with pytest.raises(ReducerError) as refused:
        reduce_tokens(make_vit(), at(0, watch))(images)
    assert str(refused.value) == NO_PREVIOUS


@pytest.mark.parametrize("name", ["class_attention", "keys", "values", "attention"])
def test_what_attention_computes_is_refused_at_the_input(name, images):
    with pytest.raises(ReducerError, match="has the features alone"):
        reduce_tokens(make_vit(), at(1, Watch(name, site="input")))(images)


@pytest.mark.parametrize("site", ["attention", "input"])
def test_positions_that_nobody_tracks_are_refused(site, images):
    watch = Watch("positions", site=site)
    watch.uses_positions = False
    with pytest.raises(ReducerError, match="uses_positions"):
        reduce_tokens(make_vit(), at(1, watch))(images)


def test_random_numbers_without_the_images_keys_are_refused():
    """A method that draws them must say so: else the runtime spares itself the keys."""
    with pytest.raises(ReducerError, match="set uses_random"):
        find_score("random").compute(Given(), State(0, 4, 3), "concat", 0)


def test_a_map_to_attend_with_is_refused_behind_a_decision():
    with pytest.raises(ReducerError, match="put this reducer first in the stack"):
        Given().through(Decision(FUSED)).attend_with(Given().attention())
