"""The masked softmax of training passes, and ``TokenBatch.alive``, against slow references and the gathered pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reducers import Drop, ReducerError, TokenReducer, ToMe, at, reduce_tokens
from reducers.decision import Decision, advance
from reducers.hosts.timm_vit import TimmCore
from reducers.maps import Mask, Merge, Mix, keep_rows
from reducers.masking import masked_softmax
from reducers.runtime.attention import PackedAttention
from reducers.tokens import Layout, TokenBatch

from .conftest import make_vit

EPS = 1e-6


def slow_softmax(logits: list[float], weight: list[float]) -> list[float]:
    """(exp(l - max) w + eps / N) / (sum + eps), over tokens that are there."""
    largest = max(logits)
    shares = [math.exp(logit - largest) * w for logit, w in zip(logits, weight, strict=True)]
    return [(share + EPS / len(shares)) / (sum(shares) + EPS) for share in shares]


def random_weight(layout: Layout, *, hard: bool = False) -> Tensor:
    """(T,) float64, 1 for prefix tokens."""
    weight = torch.rand(layout.rows, dtype=torch.float64)
    return torch.where(layout.is_prefix, 1.0, (weight < 0.5).double() if hard else weight)


# --- the softmax ------------------------------------------------------------------------------------------------------


def test_the_masked_softmax_is_the_published_formula():
    torch.manual_seed(0)
    logits, weight = 3 * torch.randn(4, 7, dtype=torch.float64), torch.rand(4, 7, dtype=torch.float64)
    lengths = [7, 4, 1, 0]
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    logits = logits.masked_fill(~valid, 50.0)  # what padding holds must not matter
    for dim in (1, 0):
        arguments = (logits, weight, valid) if dim == 1 else (logits.T, weight.T, valid.T)
        found = masked_softmax(*arguments, dim)
        found = found if dim == 1 else found.T
        for row, n in enumerate(lengths):
            if n:
                expected = slow_softmax(logits[row, :n].tolist(), weight[row, :n].tolist())
                torch.testing.assert_close(found[row, :n], torch.tensor(expected, dtype=torch.float64))
                torch.testing.assert_close(found[row].sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
            assert (found[row, n:] == 0).all()


def test_whole_weights_are_the_softmax_of_those_that_are_left():
    torch.manual_seed(0)
    logits, valid = 3 * torch.randn(5, 9, dtype=torch.float64), torch.ones(5, 9, dtype=torch.bool)
    ones = torch.ones_like(logits)
    torch.testing.assert_close(masked_softmax(logits, ones, valid, 1), logits.softmax(1), rtol=0, atol=1e-6)
    left = torch.rand(5, 9) < 0.5
    left[:, 0] = True
    logits[:, 0] = 4.0  # one that is left is among the largest, as a token always sees itself
    found = masked_softmax(logits, left.double(), valid, 1)
    expected = logits.masked_fill(~left, -torch.inf).softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    nobody = masked_softmax(logits, torch.zeros_like(logits), valid, 1)
    torch.testing.assert_close(nobody, torch.full_like(nobody, 1 / 9)), "defined, where none is left"


def test_gradients_reach_logits_and_weights():
    torch.manual_seed(0)
    valid = torch.arange(6) < torch.tensor([6, 4])[:, None]
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: masked_softmax(a, w, valid, 1), (logits, weight))
    dropped = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]] * 2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 6, dtype=torch.float64)
    (masked_softmax(logits, dropped, valid, 1) * values).sum().backward()
    assert dropped.grad is not None
    assert (dropped.grad[valid] != 0).all(), "of what is hidden too: it may come back"
    assert (dropped.grad[~valid] == 0).all()


# --- attention --------------------------------------------------------------------------------------------------------


def some_layout(ragged: bool) -> Layout:
    if ragged:
        return Layout.ragged(torch.tensor([9, 1, 6, 7]), torch.tensor([1, 1, 1, 1]))
    return Layout.alike(3, 8, 2, torch.device("cpu"))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_a_token_counts_as_a_key_by_its_weight_and_always_sees_itself(ragged, biased):
    """Map, class rows and output against a reference that goes query by query."""
    layout = some_layout(ragged)
    attn = make_vit("qk_norm").double().blocks[0].attn
    x, weight = torch.randn(layout.rows, 32, dtype=torch.float64), random_weight(layout)
    bias = torch.rand(layout.rows, dtype=torch.float64) if biased else None
    core = PackedAttention(TimmCore(attn, x, layout), bias, weight)
    attention, out = core.map(), core.rows_out(None, layout)
    rows = torch.arange(layout.rows)[::2]
    torch.testing.assert_close(core.rows_out(rows, layout), out[rows])
    class_rows = core.row(layout.starts)
    q, k, v = attn.qkv(x).view(layout.rows, 3, attn.num_heads, -1).unbind(1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    for image, first in enumerate(layout.starts.tolist()):
        n = layout.counts[image]
        own, summed = slice(first, first + n), torch.empty(n, attn.num_heads, v.shape[2], dtype=torch.float64)
        for head in range(attn.num_heads):
            for i in range(n):
                logits = [float(q[first + i, head] @ key) * attn.scale for key in k[own, head]]
                if bias is not None:
                    logits = [logit + float(b) for logit, b in zip(logits, bias[own], strict=True)]
                seen = [1.0 if j == i else float(weight[first + j]) for j in range(n)]
                shares = torch.tensor(slow_softmax(logits, seen), dtype=torch.float64)
                torch.testing.assert_close(attention[image, head, i, :n], shares)
                summed[i, head] = shares @ v[own, head]
                if i == 0:
                    torch.testing.assert_close(class_rows[own, head], shares)
        torch.testing.assert_close(out[own], attn.proj(attn.norm(summed.flatten(1))))
        assert (attention[image, :, n:] == 0).all() and (attention[image, :, :, n:] == 0).all()


@pytest.mark.parametrize("automatic", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_probabilities_are_in_single_precision(automatic, masked):
    """Whatever the precision of queries and keys: the map and the class rows are the softmax of exact products."""
    layout = some_layout(ragged=False)
    dtype = torch.float32 if automatic else torch.bfloat16
    attn, x = make_vit().to(dtype).blocks[0].attn, torch.randn(layout.rows, 32).to(dtype)
    weight = random_weight(layout).float() if masked else None
    with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
        core = PackedAttention(TimmCore(attn, x, layout), None, weight)
        attention, class_rows = core.map(), core.row(layout.starts)
        q, k = (layout.pad(part.double()).transpose(1, 2) for part in (core.queries(), core.keys))
        assert q.dtype == torch.float64 and core.keys.dtype == torch.bfloat16
        assert core.rows_out(None, layout).dtype == torch.bfloat16
    assert attention.dtype == class_rows.dtype == torch.float32
    logits = q @ k.transpose(2, 3) * attn.scale
    if weight is None:
        expected = logits.softmax(3)
    else:
        seen = layout.pad(weight.double())[:, None, None] * torch.ones(8, 1, dtype=torch.float64)
        seen = seen + (1 - seen) * torch.eye(8, dtype=torch.float64)
        expected = masked_softmax(logits, seen, layout.valid[:, None, None], 3)
    torch.testing.assert_close(attention.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(class_rows.double(), layout.unpad(expected[:, :, 0].transpose(1, 2)), rtol=0, atol=1e-5)


# --- a model ----------------------------------------------------------------------------------------------------------


class Choose(TokenReducer):
    """Keeps the patches of a table, block by block: by a mask, or by gathering them."""

    name = "choose"
    uses_positions = True

    def __init__(self, tables: dict[int, Tensor], *, masks: bool, site: str = "attention") -> None:
        super().__init__()
        self.tables, self.masks, self.site = tables, masks, site

    def decide(self, signals, state):
        layout, pos = signals.layout, signals.positions()
        kept = self.tables[state.block][layout.row_image, pos.clamp(min=0)]
        if self.masks:
            return Decision(Mask.of(layout, torch.where(layout.is_prefix, 1.0, kept)))
        return Decision(keep_rows(layout, (kept > 0.5) | layout.is_prefix))


def tables(blocks: list[int]) -> dict[int, Tensor]:
    """Another number of patches in each image: many, few, one, none, all."""
    share = torch.tensor([0.7, 0.2, 0.0, 0.0, 1.1])[:, None]
    found = {block: (torch.rand(5, 36) < share).float() for block in blocks}
    for table in found.values():
        table[2, 7] = 1
    return found


def passes(model, kept: dict[int, Tensor], images: Tensor, *, site: str, before=None) -> tuple[Tensor, Tensor]:
    """The gathered pass and the masked one."""
    found = []
    for masks in (False, True):
        placement = at(sorted(kept), Choose(kept, masks=masks, site=site))
        found.append(reduce_tokens(model, placement if before is None else before | placement)(images))
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["class", "distilled", "registers", "qk_norm", "average_with_class"])
@pytest.mark.parametrize("site", ["attention", "input"])
@torch.no_grad()
def test_a_mask_of_whole_weights_is_the_gathered_pass(kind, site, images):
    model = make_vit(kind).double()
    gathered, masked = passes(model, tables([0, 2]), images.double(), site=site)
    # the formula's epsilon tells where a hidden key had by far the largest logit: most where nobody else is left
    torch.testing.assert_close(masked, gathered, rtol=0, atol=2e-3)
    torch.testing.assert_close(masked[:3], gathered[:3], rtol=0, atol=2e-4)
    assert not torch.allclose(gathered[:4], model(images.double())[:4], atol=1e-2)


@torch.no_grad()
def test_a_mask_after_a_merge_honours_sizes(images):
    """Proportional attention: the bias of merged tokens stays beside the mask."""
    model = make_vit().double()
    kept = tables([1, 2])
    gathered, masked = passes(model, kept, images.double(), site="attention", before=at(0, ToMe(Drop(9))))
    torch.testing.assert_close(masked, gathered, rtol=0, atol=1e-4)
    with pytest.raises(ReducerError, match="masked again or gathered, not merged"):
        reduce_tokens(model, at(0, Choose(tables([0]), masks=True)) | at(1, ToMe(Drop(9))))(images.double())


def test_gradients_reach_the_weights_of_a_mask(images):
    """Those of patches, hidden or not, from every later block; prefix tokens have none to learn."""
    model = make_vit().double()
    kept = {block: table.double().requires_grad_() for block, table in tables([0, 2]).items()}
    logits = reduce_tokens(model, at([0, 2], Choose(kept, masks=True)))(images.double())
    logits.square().sum().backward()
    for table in kept.values():
        assert table.grad is not None and torch.isfinite(table.grad).all()
    still = kept[0].detach() > 0  # a patch that block 0 hid stays hidden, whatever block 2 says
    assert (kept[2].grad[still] != 0).all()
    assert (kept[2].grad[~still] == 0).all()
    assert (kept[0].grad[kept[2].detach() > 0] != 0).all()


def batch_of(layout: Layout) -> TokenBatch:
    x = torch.randn(layout.rows, 3)
    cls = layout.starts.clone()
    return TokenBatch(x, layout, 1 + torch.rand(layout.rows), cls, key_bias=torch.rand(layout.rows))


@pytest.mark.parametrize("ragged", [False, True])
def test_what_is_alive_multiplies_is_gathered_and_is_never_merged(ragged):
    layout = some_layout(ragged)
    batch = batch_of(layout)
    assert batch.alive is None
    first, second = random_weight(layout, hard=True), random_weight(layout)
    once = advance(batch, Decision(Mask.of(layout, first)))
    assert torch.equal(once.alive, first)
    assert once.layout is layout and torch.equal(once.x, batch.x) and torch.equal(once.size, batch.size)
    assert torch.equal(once.cls, batch.cls)
    torch.testing.assert_close(once.key_bias, batch.key_bias)
    twice = advance(once, Decision(Mask.of(layout, second)))
    torch.testing.assert_close(twice.alive, first * second), "who is dropped once stays dropped"
    assert (twice.alive[layout.is_prefix] == 1).all()
    keep = keep_rows(layout, layout.is_prefix | (torch.rand(layout.rows) < 0.5))
    assert torch.equal(advance(twice, Decision(keep)).alive, twice.alive[keep.rows])
    assert advance(batch, Decision(keep)).alive is None
    rows = torch.arange(layout.rows)
    eye = torch.eye(layout.longest).expand(layout.images, -1, -1)
    for token_map in (Merge(layout, layout, rows, torch.ones(layout.rows)), Mix(layout, layout, eye)):
        assert advance(batch, Decision(token_map)).alive is None
        with pytest.raises(ReducerError, match="train them apart"):
            advance(twice, Decision(token_map))
