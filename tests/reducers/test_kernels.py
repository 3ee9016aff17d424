"""Attention on packed rows: many short windows at once and one image after another give what plain softmax gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reducers.runtime import kernels
from reducers.runtime.kernels import MANY, SHORT, packed_attention
from reducers.tokens import Layout

HEADS, WIDTH = 2, 8
CPU = torch.device("cpu")
OF_MANY = [[3, 0, 5, 1, 4, 2, 0, 5] * 3, [5] * 23 + [1]]  # units without a token among them
OF_FEW = [[3, 0, 5], [1]]


def plainly(
    q: Tensor, k: Tensor, v: Tensor, counts: list[int], key_bias: Tensor | None, pair_bias: Tensor | None
) -> Tensor:
    """Softmax of each unit by itself."""
    out, first = [], 0
    for unit, count in enumerate(counts):
        own = slice(first, first + count)
        logits = torch.einsum("qhd,khd->hqk", q[own], k[own]) * WIDTH**-0.5
        if key_bias is not None:
            logits = logits + key_bias[own]
        if pair_bias is not None:
            logits = logits + pair_bias[unit % len(pair_bias), :, :count, :count]
        out.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[own]))
        first += count
    return torch.cat(out)


@pytest.mark.parametrize("counts", [*OF_MANY, *OF_FEW])
@pytest.mark.parametrize("biased", ["not", "keys", "pairs", "one for all pairs", "both"])
def test_units_of_any_lengths_are_what_each_is_alone_and_so_are_gradients(counts: list[int], biased: str) -> None:
    torch.manual_seed(0)
    layout, longest = Layout.listed(counts, CPU), max(counts)
    inputs = [torch.randn(sum(counts), HEADS, WIDTH, dtype=torch.float64) for _ in range(3)]
    key_bias = torch.randn(sum(counts), dtype=torch.float64) if biased in ("keys", "both") else None
    each = {"pairs": len(counts), "both": len(counts), "one for all pairs": 1}.get(biased)
    pair_bias = None if each is None else torch.randn(each, HEADS, longest, longest, dtype=torch.float64)
    given = [value.requires_grad_() for value in (*inputs, key_bias, pair_bias) if value is not None]
    found = packed_attention(
        *inputs, layout, layout, scale=WIDTH**-0.5, key_bias=key_bias, pair_bias=pair_bias
    )  # fmt: skip
    expected = plainly(*inputs, counts, key_bias, pair_bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        again = packed_attention(*inputs, layout, layout, scale=WIDTH**-0.5, key_bias=key_bias, pair_bias=pair_bias)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, given, weight), torch.autograd.grad(expected, given, weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_windows_go_all_at_once_and_images_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, each = [], kernels._image_by_image
    monkeypatch.setattr(kernels, "_image_by_image", lambda *given: (calls.append(1), each(*given))[1])
    limit = SHORT // (HEADS * WIDTH)  # tokens
    for units, tokens, alone in ((MANY, limit, False), (MANY - 1, limit, True), (MANY, limit + 1, True)):
        calls.clear()
        layout = Layout.listed([tokens] * (units - 1) + [1], CPU)
        q, k, v = (torch.randn(layout.rows, HEADS, WIDTH) for _ in range(3))
        packed_attention(q, k, v, layout, layout, scale=1.0)
        assert bool(calls) == alone
