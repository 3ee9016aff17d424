"""Where mechanisms meet: stacks and placements of several methods against a ViT computed one token at a time.

Each reference carries features, sizes, provenance and the bias of later attention through the reducers of a block and
from block to block, image by image; the runtime gives the same in a batch whose images keep different numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reducers import ATS, Count, Drop, EViT, Placement, Ratio, ReducedViT, Stack, State, TokenBatch, ToMe, at, build
from tests.samples import shared_out

from . import reference as slow
from .conftest import DEPTH, make_vit

GRID = (4, 5)
LARGER = 12  # patches, between what ATS leaves of the two images


class Watched(ReducedViT):
    """Remembers the tokens that leave each block it drives itself."""

    def __init__(self, base: torch.nn.Module, placement: Placement) -> None:
        super().__init__(base, placement)
        self.left: dict[int, TokenBatch] = {}

    def _block(self, run: Any, batch: TokenBatch, state: State, *, decide_only: bool) -> TokenBatch:
        self.left[state.block] = super()._block(run, batch, state, decide_only=decide_only)
        return self.left[state.block]


def gtp(drop: int) -> torch.nn.Module:
    return build({"name": "gtp", "budget": {"drop": drop}, "alpha": 0.3})


SLOW_GTP = slow.gtp(4, 0.3, GRID)
EVIT, THEN_ATS = EViT(Ratio(0.7)), ATS(Ratio(0.7))
CASES: dict[str, tuple[Placement, dict[int, list[slow.Reducer]]]] = {
    "evit and ats in one block": (at(1, Stack(EVIT, THEN_ATS)), {1: [slow.evit("0.7"), slow.ats("0.7")]}),
    "evit and ats over blocks": (
        at([0, 2], Stack(EVIT, THEN_ATS)) | at([1, 3], EVIT),
        {b: [slow.evit("0.7"), *([] if b % 2 else [slow.ats("0.7")])] for b in range(4)},
    ),
    "evit and ats, nearest": (
        at([0, 2], Stack(EVIT, ATS(Ratio(0.6), lookup="nearest"))),
        {b: [slow.evit("0.7"), slow.ats("0.6", lookup="nearest")] for b in (0, 2)},
    ),
    "evit and tome in one block": (
        at([0, 2], Stack(EVIT, ToMe(Drop(6)))),
        {b: [slow.evit("0.7"), slow.tome(drop=6)] for b in (0, 2)},
    ),
    "ats and evit": (
        at([0, 2], Stack(THEN_ATS, EVIT)) | at(3, EViT(Ratio(0.5))),
        {0: [slow.ats("0.7"), slow.evit("0.7")], 2: [slow.ats("0.7"), slow.evit("0.7")], 3: [slow.evit("0.5")]},
    ),
    "tome and evit later": (
        at([0, 1, 2], ToMe(Drop(4))) | at([1, 3], EViT(Ratio(0.6))),
        {
            0: [slow.tome(drop=4)], 1: [slow.tome(drop=4), slow.evit("0.6")], 2: [slow.tome(drop=4)],
            3: [slow.evit("0.6")],
        },
    ),
    "tome and ats": (
        at([0, 2], Stack(ToMe(Drop(4)), ATS(Ratio(0.8)))) | at([1, 3], ToMe(Drop(2))),
        {b: [slow.tome(drop=2)] if b % 2 else [slow.tome(drop=4), slow.ats("0.8")] for b in range(4)},
    ),
    "gtp and ats": (
        at([0, 1], gtp(4)) | at([1, 3], ATS(Ratio(0.7))),
        {0: [SLOW_GTP], 1: [SLOW_GTP, slow.ats("0.7")], 3: [slow.ats("0.7")]},
    ),
    "gtp and evit and tome": (
        at([0, 2], gtp(4)) | at([1, 2], EViT(Ratio(0.8))) | at(3, ToMe(Drop(3))),
        {0: [SLOW_GTP], 1: [slow.evit("0.8")], 2: [SLOW_GTP, slow.evit("0.8")], 3: [slow.tome(drop=3)]},
    ),
    "ats, tome in the larger images alone, evit": (
        at(0, ATS(Ratio(0.8))) | at(1, ToMe(Count(LARGER))) | at([2, 3], EViT(Ratio(0.6))),
        {0: [slow.ats("0.8")], 1: [slow.tome(keep=LARGER)], 2: [slow.evit("0.6")], 3: [slow.evit("0.6")]},
    ),
}  # fmt: skip


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(2, 3, 8 * GRID[0], 8 * GRID[1], dtype=torch.float64, generator=torch.Generator().manual_seed(37))


def same(found: Tensor, expected: object, what: str) -> None:
    expected = torch.as_tensor(np.array(expected), dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-9, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("kind", ["qk_norm", "registers"])  # LayerScale, norms of queries and keys, one prefix or five
@pytest.mark.parametrize("case", shared_out(CASES))
@torch.no_grad()
def test_reducers_that_meet_equal_the_slow_reference(case, kind, pictures):
    placement, stages = CASES[case]
    model = make_vit(kind, img_size=(8 * GRID[0], 8 * GRID[1])).double()
    driven = Watched(model, placement)
    logits, trace = driven.trace(pictures)
    for i, picture in enumerate(pictures):
        left, expected = slow.run(model, picture, stages)
        for block, batch in sorted(driven.left.items()):
            tokens, where = left[block], f"{case}, image {i}, block {block}"
            rows = slice(int(batch.layout.starts[i]), int(batch.layout.starts[i] + batch.layout.lengths[i]))
            assert batch.pos is not None
            assert batch.pos[rows].tolist() == [t.patch for t in tokens], where
            assert batch.layout.is_prefix[rows].tolist() == [t.prefix for t in tokens], where
            assert batch.size[rows].tolist() == [t.size for t in tokens], where
            bias = torch.zeros(batch.layout.rows) if batch.key_bias is None else batch.key_bias
            same(bias[rows], [t.bias or 0.0 for t in tokens], f"{where}, key bias")
            same(batch.x[rows], [t.x for t in tokens], f"{where}, features")
            owner = [next((n for n, t in enumerate(tokens) if p in t.carries), -1) for p in range(GRID[0] * GRID[1])]
            assert trace.owner(block)[i].tolist() == owner, where
            assert trace.kept(block)[i].nonzero().flatten().tolist() == sorted(t.patch for t in tokens if t.patch >= 0)
        same(logits[i], expected, f"{case}, image {i}")
    assert len(left) == DEPTH
