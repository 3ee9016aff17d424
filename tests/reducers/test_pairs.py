"""Stacks of two: every ordered pair of methods that only decide and need no training, at one block and at two.

Each pair respects both budgets, leaves the class token alone, gives an image the same result alone and in a batch, and
is the plain model where both methods keep everything.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from reducers import Placement, Ratio, ReducedViT, Stack, TokenReducer, at, reduce_tokens
from reducers.methods.fixed_pattern import ring_counts
from reducers.methods.hvt_pool import pooled_length
from reducers.methods.shrinking_pattern import counts_within, radius_at
from reducers.runtime.plain import Listener
from tests.samples import reading

from .conftest import make_vit
from .test_contract import KEEP_ALL, NEVER_THE_IDENTITY, settings

GRID = (5, 5)
PATCHES = 25
FIRST, SECOND = Ratio(0.6, rounding="ceil"), Ratio(0.7, rounding="ceil")  # 25 patches, at most 15, at most 11
DEPTH = 3  # nothing acts at block 0: some methods look at what the block before saw
PLACED = ("one block", "two blocks")


def qualifies(name: str) -> bool:
    """Only decides, and needs no training."""
    reducer = settings(name)
    return reducer.only_decides and not reducer.traits.trained


NAMES = [name for name in reading("images") if qualifies(name)]
STEPS = (1, 8)  # of those pairs in ``make test``: every method comes first twice and second twice
PAIRS = [
    pytest.param(
        NAMES[i], NAMES[j], id=f"{NAMES[i]} then {NAMES[j]}",
        marks=[] if (j - i) % len(NAMES) in STEPS else pytest.mark.slow,
    )
    for i, j in itertools.product(range(len(NAMES)), repeat=2)
]  # fmt: skip
pairs = pytest.mark.parametrize(("first", "second"), PAIRS)


@functools.cache
def model() -> VisionTransformer:
    return make_vit(img_size=8 * GRID[0], depth=DEPTH).double()


@functools.cache
def pictures() -> Tensor:
    return torch.randn(2, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def placed(where: str, first: TokenReducer, second: TokenReducer, between: TokenReducer | None = None) -> Placement:
    """The second acts on what the first leaves: in the same block, or in the next."""
    if where == "two blocks":
        return at(1, first) | at(2, second)
    return at(1, Stack(*[part for part in (first, between, second) if part is not None]))


def allowed(reducer: TokenReducer, patches: int, block: int) -> range:
    """How many patches the method may leave of so many, by its own rules."""
    if reducer.name == "identity":
        return range(patches, patches + 1)
    if reducer.name == "hvt_pool":
        return range(pooled_length(patches), pooled_length(patches) + 1)
    if reducer.name == "shrinking_pattern":
        left = min(counts_within(GRID, "l2", radius_at(block, 0, DEPTH - 1, GRID, "l2")), patches)
        return range(left, left + 1)
    left = reducer.budget.count(patches, initial=PATCHES, prefix=1, rounding="ceil")
    if reducer.name == "ats":  # sample points may fall on one token
        return range(1, left + 1)
    if reducer.name == "evit":  # and the fused token, where something is left out
        left += left < patches
    if reducer.name in ("tome", "tofu", "pitome"):
        left = max(left, patches - patches // 2)
    if reducer.name == "fixed_pattern":
        left = min(min(ring_counts(GRID, "l2"), key=lambda ring: abs(ring - left)), patches)
    return range(left, left + 1)


@pairs
@torch.no_grad()
def test_both_budgets_hold_and_an_image_alone_is_itself_in_a_batch(first: str, second: str) -> None:
    for where in PLACED:
        one, other = settings(first, FIRST), settings(second, SECOND)
        between = Listener(lambda signals: signals.layout.lengths.tolist())
        driven = reduce_tokens(model(), placed(where, one, other, between))
        logits, trace = driven.trace(pictures())
        assert torch.isfinite(logits).all()
        middle = between.heard[0] if where == "one block" else trace.tokens[:, 2].tolist()
        for entering, left in zip(middle, trace.tokens[:, -1].tolist(), strict=True):
            assert entering - 1 in allowed(one, PATCHES, 1), f"{first}, {where}"
            assert left - 1 in allowed(other, entering - 1, 1 if where == "one block" else 2), f"{second}, {where}"
        assert trace.class_kept(2).all()
        for i in range(len(pictures())):
            alone, own = driven.trace(pictures()[i : i + 1])
            assert torch.equal(own.tokens[0], trace.tokens[i]), where
            assert torch.equal(own.owner(2)[0], trace.owner(2)[i]), where
            torch.testing.assert_close(alone[0], logits[i], rtol=0, atol=1e-9)
            torch.testing.assert_close(own.macs[0], trace.macs[i])


@functools.cache
def expected(name: str | None, block: int) -> Tensor:
    """Logits of the plain model, or with the one method alone that cannot keep everything."""
    return reduce_tokens(model(), Placement() if name is None else at(block, settings(name)))(pictures())


@pairs
@torch.no_grad()
def test_where_both_keep_everything_it_is_the_plain_model(first: str, second: str) -> None:
    reducing = [(name, block) for block, name in enumerate((first, second), 1) if name in NEVER_THE_IDENTITY]
    if len(reducing) == 2:
        pytest.skip("neither can keep everything")
    for where in PLACED:
        one, other = (settings(name, KEEP_ALL.get(name, Ratio(1.0))) for name in (first, second))
        driven: ReducedViT = reduce_tokens(model(), placed(where, one, other))
        name, block = reducing[0] if reducing else (None, 1)
        plain = expected(name, 1 if where == "one block" else block)
        torch.testing.assert_close(driven(pictures()), plain, rtol=0, atol=1e-10)
