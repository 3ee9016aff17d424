"""What every registered reducer must do, tested over the whole registry and over stacks: registered means tested."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor

from reducers import (
    ATS,
    Count,
    Drop,
    EViT,
    Identity,
    Ratio,
    Stack,
    TokenReducer,
    ToMe,
    TopK,
    at,
    available,
    build,
    reduce_tokens,
)

from .conftest import DEPTH, KINDS, WITHOUT_CLASS_TOKEN, make_vit

BUDGETS = {"tome": Drop(5)}  # where a ratio of 0.6 is not the natural request
KEEP_ALL = {"tome": Drop(0), "ats": Count(4000)}
NEVER_THE_IDENTITY = {"hvt_pool"}  # its own test says what holds instead


def settings(name: str, budget: object | None = None) -> TokenReducer:
    """A reducer with its defaults and a budget, if it takes one."""
    cls = available()[name]
    takes_budget = "budget" in inspect.signature(cls).parameters
    return cls(budget or BUDGETS.get(name, Ratio(0.6))) if takes_budget else cls()


CASES: dict[str, TokenReducer] = {name: settings(name) for name in available()}
CASES |= {
    "ats official": ATS(Ratio(1.0), variant="official"),
    "ats unsorted": ATS(Ratio(0.6), variant="unsorted"),
    "ats gumbel": ATS(Ratio(0.6), variant="gumbel"),
    "ats nearest per head": ATS(Ratio(0.6), lookup="nearest", heads="per_head"),
    "ats attention received": ATS(Ratio(0.6), score="attention_received"),
    "ats value norm": ATS(Ratio(0.6), score="value_norm"),
    "ats random": ATS(Ratio(0.6), score="random"),
    "evit drop": EViT(Ratio(0.6), fuse=False),
    "evit of ats": EViT(Ratio(0.8), select=ATS(Ratio(0.7))),
    "dpc_knn at the input": build({"name": "dpc_knn", "budget": {"ratio": 0.6}, "site": "input"}),
    "kmedoids equal": build({"name": "kmedoids", "budget": {"ratio": 0.6}, "weights": "equal"}),
    "kmedoids at the input": build({"name": "kmedoids", "budget": {"ratio": 0.6}, "site": "input"}),
    "token_pooling at the input": build({"name": "token_pooling", "budget": {"ratio": 0.6}, "site": "input"}),
    "atc single": build({"name": "atc", "budget": {"ratio": 0.6}, "linkage": "single"}),
    "atc complete": build({"name": "atc", "budget": {"ratio": 0.6}, "linkage": "complete"}),
    "tofu prunes": build({"name": "tofu", "budget": {"drop": 5}, "switch": 1.0}),
    "tofu merges": build({"name": "tofu", "budget": {"drop": 5}, "switch": 0.0}),
    "pitome proportional": build({"name": "pitome", "budget": {"ratio": 0.6}, "proportional": True}),
    "gtp cosine": build({"name": "gtp", "budget": {"drop": 5}, "graph": "cosine"}),
    "fixed_pattern l1": build({"name": "fixed_pattern", "budget": {"ratio": 0.6}, "norm": "l1"}),
    "hvt_pool at the input": build({"name": "hvt_pool", "site": "input"}),
    "stack zero_tprune gtp": Stack(*[build({"name": n, "budget": {"ratio": 0.8}}) for n in ("zero_tprune", "gtp")]),
    "stack gtp zero_tprune": Stack(*[build({"name": n, "budget": {"ratio": 0.8}}) for n in ("gtp", "zero_tprune")]),
    "stack evit ats": Stack(EViT(Ratio(0.7)), ATS(Ratio(0.7))),
    "stack ats evit": Stack(ATS(Ratio(0.7)), EViT(Ratio(0.7))),
    "stack ats tome": Stack(ATS(Ratio(0.8)), ToMe(Drop(4))),
    "stack tome ats": Stack(ToMe(Drop(4)), ATS(Ratio(0.8))),
    "stack topk tome evit": Stack(TopK(Ratio(0.9)), ToMe(Drop(3)), EViT(Ratio(0.7))),
}
PLACES = [1, 3]
both = pytest.mark.parametrize("reducer", CASES.values(), ids=CASES.keys())


def reduced(reducer: TokenReducer, kind: str = "class", dtype: torch.dtype = torch.float64):
    return reduce_tokens(make_vit(kind).to(dtype), at(PLACES, reducer))


@both
@torch.no_grad()
def test_an_image_alone_is_the_same_image_in_a_batch_in_float64(reducer, images):
    model = reduced(reducer)
    images = images.double()
    together, trace = model.trace(images)
    for i in range(len(images)):
        alone, own = model.trace(images[i : i + 1])
        assert torch.equal(own.tokens[0], trace.tokens[i])
        assert all(torch.equal(own.kept(b)[0], trace.kept(b)[i]) for b in range(DEPTH))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        torch.testing.assert_close(own.macs[0], trace.macs[i])


@both
@torch.no_grad()
def test_an_image_alone_is_the_same_image_in_a_batch_in_float32(reducer):
    model = reduced(reducer, dtype=torch.float32)
    many = torch.randn(64, 3, 48, 48)
    together, trace = model.trace(many)
    same = 0
    for i in range(len(many)):
        alone, own = model.trace(many[i : i + 1])
        if all(torch.equal(own.kept(b)[0], trace.kept(b)[i]) for b in range(DEPTH)):
            same += 1
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    assert same >= 0.999 * len(many)


@both
@torch.no_grad()
def test_traced_and_plain_forward_agree_and_repeat(reducer, images):
    model = reduced(reducer)
    images = images.double()
    logits, trace = model.trace(images)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-12)
    again, second = model.trace(images)
    assert torch.equal(logits, again)
    assert torch.equal(trace.tokens, second.tokens)


@both
@torch.no_grad()
def test_prefix_tokens_stay_and_the_trace_is_consistent(reducer, images):
    for kind in ("class", "distilled", "registers"):
        model = reduced(reducer, kind)
        prefix = model.base.num_prefix_tokens
        _, trace = model.trace(images.double())
        assert trace.tokens.shape == (len(images), DEPTH + 1)
        assert (trace.tokens.diff(dim=1) <= 0).all()
        assert (trace.tokens >= prefix).all()
        for block in range(DEPTH):
            left = trace.tokens[:, block + 1]
            owner, kept = trace.owner(block), trace.kept(block)
            assert trace.class_kept(block).all()
            assert (owner < left[:, None]).all()
            carried = owner >= 0
            assert (owner[carried] >= prefix).all(), "no patch is carried by a prefix token"
            assert (kept.sum(1) <= left - prefix).all()
            assert (carried | ~kept).all(), "a patch with a row of its own is carried somewhere"
        assert (trace.macs > 0).all()
        assert (trace.reducer_macs >= 0).all()
        assert (trace.reference_macs >= trace.macs - trace.reducer_macs - 1e-3).all(), "we never compute more rows"


@pytest.mark.parametrize("name", [name for name in available() if name not in NEVER_THE_IDENTITY])
@torch.no_grad()
def test_keeping_everything_is_the_plain_model(name, images):
    plain = make_vit().double()
    model = reduce_tokens(plain, at(range(DEPTH), settings(name, KEEP_ALL.get(name, Ratio(1.0)))))
    if name == "ats":  # with sample points enough for every token to be hit, nothing is left out
        _, trace = model.trace(images.double())
        assert (trace.tokens == trace.tokens[:, :1]).all()
    torch.testing.assert_close(model(images.double()), plain(images.double()), rtol=0, atol=1e-10)


@both
def test_gradients_reach_inputs_and_weights(reducer, images):
    model = reduced(reducer)
    images = images[:3].double().requires_grad_()
    model.train()(images).square().sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
    assert all(images.grad[i].abs().sum() > 0 for i in range(3))
    silent = [name for name, p in model.base.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not silent
    assert model.base.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@both
def test_the_base_model_is_untouched(reducer, images):
    plain = make_vit()
    before = copy.deepcopy(plain.state_dict())
    logits = plain(images)
    reduce_tokens(plain, at(PLACES, reducer))(images)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(plain(images), logits)


@both
@torch.no_grad()
def test_from_data_and_back(reducer, images):
    twin = build(reducer.spec())
    assert twin.spec() == reducer.spec()
    assert torch.equal(reduced(twin)(images.double()), reduced(reducer)(images.double()))
    twin.load_state_dict(reducer.state_dict())


@both
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_model_runs_or_is_refused_by_name(reducer, kind, images):
    needs_class = reducer.needs_class_token
    if needs_class and kind in WITHOUT_CLASS_TOKEN:
        with pytest.raises(ValueError, match="needs a class token"):
            reduced(reducer, kind)
        return
    logits, trace = reduced(reducer, kind).trace(images.double())
    assert logits.shape == (len(images), 7)
    assert torch.isfinite(logits).all()
    assert isinstance(trace.macs, Tensor)


@pytest.mark.parametrize(
    "reducer",
    [r for r in CASES.values() if not isinstance(r, Stack) and r.only_decides and r.site == "attention"],
    ids=lambda r: str(r.spec())[:60],
)
@torch.no_grad()
def test_identity_in_a_stack_changes_nothing(reducer, images):
    alone = reduced(reducer)(images.double())
    assert torch.equal(reduced(Stack(Identity(), reducer))(images.double()), alone)
    assert torch.equal(reduced(Stack(reducer, Identity()))(images.double()), alone)


@pytest.mark.parametrize("name", available())
@torch.no_grad()
def test_half_precision_runs(name, images):
    model = reduced(settings(name), dtype=torch.bfloat16)
    logits, trace = model.trace(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    assert trace.macs.dtype == torch.float64


@pytest.mark.parametrize("name", available())
def test_a_registered_method_says_what_it_is(name):
    cls = available()[name]
    assert cls.name == name
    assert cls.summary
    assert cls.source
    assert cls.__doc__


@torch.no_grad()
def test_permuting_the_patches_permutes_the_selection():
    """True of every method that neither uses order nor draws by place (ToMe's sets alternate; ATS's CDF runs in
    token order).
    """
    model = make_vit().double()
    with torch.no_grad():
        model.pos_embed.zero_()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    order = torch.randperm(36)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(2, 3, 36, 8, 8)[:, :, order]
    shuffled = patches.reshape(2, 3, 6, 6, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 48, 48)
    for reducer in (TopK(Ratio(0.5)), EViT(Ratio(0.5)), ATS(Ratio(0.5), variant="official")):
        driven = reduce_tokens(model, at(PLACES, reducer))
        _, first = driven.trace(images)
        _, second = driven.trace(shuffled)
        assert torch.equal(first.kept(3)[:, order], second.kept(3))
