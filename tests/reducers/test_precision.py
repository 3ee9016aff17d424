"""The contract in single and half precision: the model may be coarse, the bookkeeping of tokens may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reducers import Drop, Identity, Placement, Ratio, TokenReducer, ToMe, at, every, reduce_tokens
from reducers.hosts.protocol import add_residual
from reducers.kit.clustering import squared_distances
from reducers.kit.ranked_merge import nearest_hosts
from reducers.methods import ATC, PiToMe, ToFu, pitome
from reducers.methods.atc import cosine_distances
from reducers.methods.ats import cumulative, significance
from reducers.methods.bat import alike_pairs
from reducers.methods.gtp import cosine_graph
from reducers.methods.tps import affinity, nearest_host
from reducers.noise import image_keys
from tests.samples import in_turn

from .conftest import DEPTH, KINDS, make_vit
from .test_contract import CASES, model_for, placed, unit

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


def probed(reducer: TokenReducer, probe: Probe) -> Placement:
    """A method and a probe beside it, of a unit behind it."""
    return placed(reducer) | at([0, 2] if unit(reducer) == 1 else unit(reducer), probe)


@pytest.mark.parametrize("automatic", [False, True], ids=["bfloat16", "autocast"])
@some
@torch.no_grad()
def test_in_half_precision_everything_holds_that_needs_no_digits(reducer, automatic, images):
    probe = Probe()
    dtype = torch.float32 if automatic else half
    model = reduce_tokens(model_for(reducer).to(dtype), probed(reducer, probe))
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
        _, exact = reduce_tokens(model_for(reducer).double(), probed(reducer, probe)).trace(images.double())
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
    model = reduce_tokens(model_for(reducer).to(half), placed(reducer)).train()
    model(images.to(half)).float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.base.parameters())


ALL, RANKS = torch.ones(2, 40, dtype=torch.bool), torch.arange(40).expand(2, 40)
COMPARING = {
    "squared distances": lambda x: squared_distances(x, ALL),
    "cosine distances": lambda x: cosine_distances(x, ALL),
    "the cosine graph": lambda x: cosine_graph(x, ALL, neighbours=3),
    "hosts by rank": lambda x: nearest_hosts(x, RANKS, 20, 40)[0],
    "similarities by rank": lambda x: nearest_hosts(x, RANKS, 20, 40)[1],
    "hosts of guests": lambda x: nearest_host(x[:, :20], x[:, 20:], ALL[:, 20:]),
    "affinities": lambda x: affinity(x[0], x[1]),
    "pairs of ranks": lambda x: alike_pairs(x, torch.tensor([40, 30]), torch.tensor([9, 7])),
}


@pytest.mark.parametrize("name", COMPARING)
def test_tokens_in_half_precision_are_compared_in_single(name):
    """What they hold is all that is lost: comparing them loses no more. They are nearly alike, as in late blocks."""
    x = (1 + 0.1 * torch.randn(2, 40, 24)).to(half)
    found, expected = COMPARING[name](x), COMPARING[name](x.float())
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_pitome_compares_keys_of_half_precision_in_single(images, monkeypatch):
    seen, real = [], pitome.energy

    def energy(metric: Tensor, valid: Tensor, **more: float) -> Tensor:
        seen.append(metric)
        return real(metric, valid, **more)

    monkeypatch.setattr(pitome, "energy", energy)
    reduce_tokens(make_vit().to(half), at(1, PiToMe(Drop(4))))(images.to(half))
    (metric,) = seen
    assert metric.dtype == torch.float32
    torch.testing.assert_close(metric.norm(dim=2), torch.ones(metric.shape[:2]), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_residual_stream_keeps_its_width_where_a_branch_is_narrower():
    """Under autocast a branch ends in half precision; what was summed up before must not."""
    x, added = 1 + torch.rand(7, 5) / 300, torch.rand(7, 5).to(half)
    summed = add_residual(x, added.clone(), (), ())
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed, x + added, rtol=0, atol=0)


def test_images_that_differ_beyond_half_precision_have_keys_of_their_own():
    image = torch.rand(3, 8, 8).half().float()
    images = torch.stack([image, image * (1 + 1e-6)])
    assert torch.equal(*images.half())
    one, other = image_keys(images).tolist()
    assert one != other
    narrow = images.to(half)
    assert torch.equal(image_keys(narrow), image_keys(narrow.float())), "its pixels, however they are stored"
