"""The contract in single and half precision: the model may be coarse, the bookkeeping of tokens may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reducers import Drop, Identity, Ratio, TokenReducer, ToMe, at, every, reduce_tokens
from reducers.methods import ATC, PiToMe, ToFu
from reducers.methods.ats import cumulative, significance
from tests.samples import in_turn

from .conftest import DEPTH, KINDS, make_vit
from .test_contract import CASES, PLACES, fresh

some = in_turn(CASES)
half = torch.bfloat16


class Probe(TokenReducer):
    """Writes down what arrives in a block, and leaves it alone."""

    name = "probe"

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.biases: list[Tensor | None] = []

    def decide(self, signals, state) -> None:
        self.sizes.append(signals.size)
        self.sums.append(signals.layout.sum_rows(signals.size))
        self.biases.append(signals.batch.key_bias)


def float_type(dtype: torch.dtype, automatic: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=automatic)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (half, 0.06)], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_no_reduction_is_the_plain_model_in_its_own_precision(kind, dtype, atol, images):
    plain = make_vit(kind).to(dtype)
    logits = reduce_tokens(plain, at(range(DEPTH), Identity()))(images.to(dtype))
    expected = plain(images.to(dtype))
    assert logits.dtype == expected.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=0.02 if dtype == half else 0, atol=atol)


@pytest.mark.parametrize("automatic", [False, True], ids=["bfloat16", "autocast"])
@some
@torch.no_grad()
def test_in_half_precision_everything_holds_that_needs_no_digits(reducer, automatic, images):
    probe = Probe()
    dtype = torch.float32 if automatic else half
    placement = at(PLACES, fresh(reducer)) | at([0, 2], probe)
    model = reduce_tokens(make_vit().to(dtype), placement)
    with float_type(half, automatic):
        logits, trace = model.trace(images.to(dtype))
        plain = model(images.to(dtype))
    assert logits.dtype == half
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, plain), "traced or not"
    assert trace.macs.dtype == torch.float64
    assert all(size.dtype == torch.float32 for size in probe.sizes)
    assert all(bias is None or bias.dtype == torch.float32 for bias in probe.biases)
    if not reducer.adaptive:  # how many stay is arithmetic of whole numbers
        placement = at(PLACES, fresh(reducer)) | at([0, 2], probe)
        _, exact = reduce_tokens(make_vit().double(), placement).trace(images.double())
        assert torch.equal(trace.tokens, exact.tokens)


@pytest.mark.parametrize("automatic", [False, True], ids=["bfloat16", "autocast"])
@torch.no_grad()
def test_sizes_add_up_exactly_in_half_precision(automatic):
    """577 is no number of bfloat16, whose whole numbers end at 256: sizes kept in it would be wrong."""
    dtype = torch.float32 if automatic else half
    model = make_vit(img_size=192).to(dtype)
    probe = Probe()
    driven = reduce_tokens(model, every(1, ToMe(Drop(140)), depth=3) | at(3, probe))
    with float_type(half, automatic):
        driven(torch.randn(2, 3, 192, 192, dtype=dtype))
    assert probe.sums[-1].tolist() == [577.0, 577.0]
    assert probe.sizes[-1].dtype == torch.float32


@pytest.mark.parametrize("reducer", [ToMe, ToFu, PiToMe, ATC])
@torch.no_grad()
def test_the_weights_of_a_merge_are_not_of_half_precision(reducer, images):
    """A token of 257 patches weighs 257, not 256."""
    weights = []

    class Seen(reducer):  # type: ignore[valid-type, misc]
        def decide(self, signals, state):
            decision = super().decide(signals, state)
            weights.append(decision.map.weight)
            return decision

    reduce_tokens(make_vit().to(half), at(3, Seen(Ratio(0.6))))(images.to(half))
    assert [weight.dtype for weight in weights] == [torch.float32]


@pytest.mark.parametrize("automatic", [False, True], ids=["bfloat16", "autocast"])
def test_cumulative_scores_are_in_single_precision(automatic):
    scores = torch.rand(3, 577, dtype=half)
    valid = torch.ones(3, 577, dtype=torch.bool)
    with float_type(half, automatic):
        assert significance(scores, valid).dtype == torch.float32
        cdf = cumulative(scores, valid)
    assert cdf.dtype == torch.float32
    exact = scores.double().cumsum(1) / scores.double().sum(1, keepdim=True)
    torch.testing.assert_close(cdf.double(), exact, rtol=0, atol=1e-6)


@some
def test_gradients_are_finite_in_half_precision(reducer, images):
    model = reduce_tokens(make_vit().to(half), at(PLACES, fresh(reducer))).train()
    model(images.to(half)).float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.base.parameters())
