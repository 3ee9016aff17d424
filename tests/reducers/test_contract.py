"""What every registered reducer must do, tested over the whole registry and over stacks: registered means tested."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from reducers import (
    ATS,
    Count,
    Drop,
    EViT,
    Identity,
    Mix,
    Placement,
    Ratio,
    ReducerError,
    Stack,
    TokenMap,
    TokenReducer,
    ToMe,
    TopK,
    at,
    available,
    build,
    reduce_tokens,
)
from reducers.decision import advance
from reducers.kit import semantic
from reducers.methods.sttabt import method as sttabt
from reducers.reducer import Finishes
from reducers.runtime import block as block_module
from tests.samples import in_turn, methods_first, reading, shared_out

from .conftest import DEPTH, KINDS, WITHOUT_CLASS_TOKEN, make_vit

BUDGETS = {"tome": Drop(5)}  # where a ratio of 0.6 is not the natural request
KEEP_ALL = {"tome": Drop(0), "ats": Count(4000), "avit": {"beta": -1e4}, "ia_red2": {"threshold": 0}}
# their own tests say what holds instead
NEVER_THE_IDENTITY = {"diffrate", "hvt_pool", "shrinking_pattern", "stvit", "stvit_r"}


def settings(name: str, budget: object | None = None) -> TokenReducer:
    """A reducer with its defaults and a budget, if it takes one."""
    cls = available()[name]
    if isinstance(budget, dict):  # a method without a budget keeps everything by a setting of its own
        return cls(**budget)
    takes_budget = "budget" in inspect.signature(cls).parameters
    return cls(budget or BUDGETS.get(name, Ratio(0.6))) if takes_budget else cls()


CASES: dict[str, TokenReducer] = {name: settings(name) for name in reading("images")}
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
    "avit halting": build({"name": "avit", "gamma": 2.0, "beta": -1.0}),
    "dynamicvit kl": build({"name": "dynamicvit", "budget": {"ratio": 0.6}, "token_distance": "kl"}),
    "dynamicvit threshold": build({"name": "dynamicvit", "budget": {"ratio": 0.6}, "threshold": 0.5}),
    "tps threshold": build({"name": "tps", "budget": {"ratio": 0.6}, "threshold": 0.5}),
    "etps attention received": build({"name": "etps", "budget": {"ratio": 0.6}, "score": "attention_received"}),
    "dpc_knn at the input": build({"name": "dpc_knn", "budget": {"ratio": 0.6}, "site": "input"}),
    "dpc_knn learned": build({"name": "dpc_knn", "budget": {"ratio": 0.6}, "weights": "learned", "site": "input"}),
    "bat without pairs": build({"name": "bat", "budget": {"ratio": 0.6}, "clusters": 3, "alike": 0.0}),
    "sit alone": build({"name": "sit", "budget": {"count": 9}, "recalibration": 0.0}),
    "sinkhorn sharp": build({"name": "sinkhorn", "budget": {"count": 9}, "epsilon": 0.1, "iterations": 6}),
    "stvit residual off": build({"name": "stvit", "budget": {"count": 9}, "residual": False, "pooled_keys": False}),
    "stvit_r released": build({"name": "stvit_r", "budget": {"count": 9}, "residual": False, "centres": False}),
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
    "gtp sparse": build({"name": "gtp", "budget": {"drop": 5}, "theta": 0.5}),
    "pitome bipartite": build({"name": "pitome", "budget": {"ratio": 0.6}, "bipartite": 2}),
    "hvt_pool at the input": build({"name": "hvt_pool", "site": "input"}),
    "hvt_pool positions": build({"name": "hvt_pool", "site": "input", "positions": True}),
    "sttabt concrete": build({"name": "sttabt", "operating_point": -0.3}),
    "stack zero_tprune gtp": Stack(*[build({"name": n, "budget": {"ratio": 0.8}}) for n in ("zero_tprune", "gtp")]),
    "stack gtp zero_tprune": Stack(*[build({"name": n, "budget": {"ratio": 0.8}}) for n in ("gtp", "zero_tprune")]),
    "stack evit ats": Stack(EViT(Ratio(0.7)), ATS(Ratio(0.7))),
    "stack ats evit": Stack(ATS(Ratio(0.7)), EViT(Ratio(0.7))),
    "stack ats tome": Stack(ATS(Ratio(0.8)), ToMe(Drop(4))),
    "stack tome ats": Stack(ToMe(Drop(4)), ATS(Ratio(0.8))),
    "stack topk tome evit": Stack(TopK(Ratio(0.9)), ToMe(Drop(3)), EViT(Ratio(0.7))),
}
PLACES = [1, 3]
each = pytest.mark.parametrize("reducer", CASES.values(), ids=CASES.keys())
some = in_turn(CASES)  # the others, and all variants of a method, in `make test-slow`


def fresh(reducer: TokenReducer) -> TokenReducer:
    """A copy for one model alone: a reducer that has parameters makes them for the model and the blocks it joins."""
    return copy.deepcopy(reducer)


def unit(reducer: TokenReducer) -> int:
    """Of how many blocks in a row a method acts in whole units."""
    return getattr(reducer, "unit", 1)


def placed(reducer: TokenReducer, *, at_blocks: Iterable[int] | int = PLACES) -> Placement:
    """A copy at the blocks, or as a unit in the first of them that there may be."""
    return at(at_blocks if unit(reducer) == 1 else range(unit(reducer)), fresh(reducer))


def model_for(reducer: TokenReducer, kind: str = "class", **changes: object) -> VisionTransformer:
    """A model with room for the method: a block is left behind a unit, too."""
    depth = DEPTH if unit(reducer) == 1 else unit(reducer) + 1
    return make_vit(kind, **{"depth": depth, **changes})


def reduced(reducer: TokenReducer, kind: str = "class", dtype: torch.dtype = torch.float64):
    return reduce_tokens(model_for(reducer, kind).to(dtype), placed(reducer))


@pytest.mark.parametrize("reducer", methods_first(CASES))
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


@some
@torch.no_grad()
def test_an_image_alone_is_the_same_image_in_a_batch_in_float32(reducer):
    model = reduced(reducer, dtype=torch.float32)
    many = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    together, trace = model.trace(many)
    for i in range(len(many)):
        alone, own = model.trace(many[i : i + 1])
        assert all(torch.equal(own.kept(b)[0], trace.kept(b)[i]) for b in range(DEPTH)), f"image {i}"
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


@some
@torch.no_grad()
def test_traced_and_plain_forward_agree_and_repeat(reducer, images):
    model = reduced(reducer)
    images = images.double()
    logits, trace = model.trace(images)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-12)
    again, second = model.trace(images)
    assert torch.equal(logits, again)
    assert torch.equal(trace.tokens, second.tokens)


@some
@torch.no_grad()
def test_prefix_tokens_stay_and_the_trace_is_consistent(reducer, images):
    for kind in ("class", "distilled", "registers"):
        model = reduced(reducer, kind)
        prefix = model.base.num_prefix_tokens
        may_finish = isinstance(reducer, Finishes)  # of an accumulated output an image may stop before the last block
        _, trace = model.trace(images.double())
        depth = len(model.base.blocks)
        assert trace.tokens.shape == (len(images), depth + 1)
        back = [unit(reducer)] if unit(reducer) > 1 else []  # behind a unit all tokens are there again
        assert (trace.tokens.diff(dim=1)[:, [b for b in range(depth) if b + 1 not in back]] <= 0).all()
        assert ((trace.tokens >= prefix) | (trace.tokens == 0)).all()
        for block in range(depth):
            left = trace.tokens[:, block + 1]
            owner, kept = trace.owner(block), trace.kept(block)
            finished = left == 0
            assert (trace.class_kept(block) | finished).all()
            assert may_finish or not finished.any()
            assert (owner < left[:, None]).all()
            carried = owner >= 0
            assert (owner[carried] >= prefix).all(), "no patch is carried by a prefix token"
            assert (kept.sum(1) <= (left - prefix).clamp(min=0)).all()
            assert (carried | ~kept).all(), "a patch with a row of its own is carried somewhere"
        assert (trace.macs > 0).all()
        assert (trace.reducer_macs >= 0).all()
        assert (trace.reference_macs >= trace.macs - trace.reducer_macs - 1e-3).all(), "we never compute more rows"


@pytest.mark.parametrize("name", [name for name in reading("images") if name not in NEVER_THE_IDENTITY])
@torch.no_grad()
def test_keeping_everything_is_the_plain_model(name, images):
    plain = make_vit().double()
    model = reduce_tokens(plain, at(range(DEPTH), settings(name, KEEP_ALL.get(name, Ratio(1.0)))))
    if name == "ats":  # with sample points enough for every token to be hit, nothing is left out
        _, trace = model.trace(images.double())
        assert (trace.tokens == trace.tokens[:, :1]).all()
    torch.testing.assert_close(model(images.double()), plain(images.double()), rtol=0, atol=1e-10)


@some
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


@some
def test_the_base_model_is_untouched(reducer, images):
    plain = model_for(reducer)
    before = copy.deepcopy(plain.state_dict())
    logits = plain(images)
    reduce_tokens(plain, placed(reducer))(images)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(plain(images), logits)


@some
@torch.no_grad()
def test_from_data_and_back(reducer, images):
    twin = build(reducer.spec())
    assert twin.spec() == reducer.spec()
    assert torch.equal(reduced(twin)(images.double()), reduced(reducer)(images.double()))


@some
@torch.no_grad()
def test_maps_stay_within_their_image_and_owners_only_ever_pool(reducer, images, monkeypatch):
    """Who is dropped stays dropped, who shares a token goes on to share it, and prefix tokens stay in their order."""
    maps: list[TokenMap] = []

    def noted(batch, decision, *features):
        maps.append(decision.map)
        return advance(batch, decision, *features)

    for module in (block_module, semantic, sttabt):
        monkeypatch.setattr(module, "advance", noted)
    model = reduced(reducer)
    _, trace = model.trace(images.double())
    for token_map in maps:
        old, new, where, origin = token_map.old, token_map.new, token_map.destination, token_map.source
        assert torch.equal(new.row_image[where[where >= 0]], old.row_image[where >= 0])
        assert torch.equal(old.row_image[origin[origin >= 0]], new.row_image[origin >= 0])
        lead = old.is_prefix & (new.lengths > 0)[old.row_image]
        assert torch.equal(new.row_index[where[lead]], old.row_index[lead])
    assigned = not any(isinstance(token_map, Mix) for token_map in maps)
    for image in range(len(images)):
        before = torch.arange(36)
        for block in range(DEPTH):
            owner, kept = trace.owner(block)[image], trace.kept(block)[image]
            assert (owner[before < 0] == -1).all()
            for token in before.unique():
                assert len(owner[before == token].unique()) == 1
            if assigned:  # under a dense map a patch may weigh most where another one lives on
                assert len(owner[kept].unique()) == int(kept.sum()), "a row of one's own is nobody else's"
            before = owner


@some
@torch.no_grad()
def test_trained_weights_go_from_one_reducer_to_its_twin(reducer, images):
    """A state_dict is all that a method has learned: loaded into another of the same settings it gives its result."""
    first, second = reduced(reducer), reduced(build(reducer.spec()))
    for parameter in first.reducers.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    state = copy.deepcopy(first.reducers.state_dict())
    assert second.reducers.load_state_dict(state) == ([], [])
    assert all(torch.equal(value, state[name]) for name, value in second.reducers.state_dict().items())
    assert torch.equal(second(images.double()), first(images.double()))
    first.reducers.load_state_dict(second.reducers.state_dict())


@pytest.mark.parametrize(
    "reducer", [r for r in CASES.values() if r.traits.trained and r.steps.attaches], ids=lambda r: str(r.spec())
)
def test_parameters_belong_to_one_model_and_its_blocks(reducer):
    placement, model = placed(reducer), model_for(reducer)
    (mine,) = set(placement.blocks.values())
    reduce_tokens(model, placement)
    made = {name: value.clone() for name, value in mine.state_dict().items()}
    reduce_tokens(model, placement)  # once more: they are not drawn again
    assert made.keys() == mine.state_dict().keys()
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in made.items())
    with pytest.raises(ReducerError, match="another model or other blocks"):
        reduce_tokens(model, at([2], mine))
    with pytest.raises(ReducerError, match="another model or other blocks"):
        reduce_tokens(model_for(reducer, embed_dim=48), placement)


# the methods by their names, and of their variants those that ask for another kind of model
ON_EVERY_KIND = {
    name: reducer
    for name, reducer in CASES.items()
    if name in available() or reducer.needs_class_token != CASES.get(name.split()[0], reducer).needs_class_token
}


@in_turn(ON_EVERY_KIND)
@torch.no_grad()
def test_every_kind_of_model_runs_or_is_refused_by_name(reducer, images):
    images = images[:2].double()
    for kind in KINDS:
        if reducer.needs_class_token and kind in WITHOUT_CLASS_TOKEN:
            with pytest.raises(ReducerError, match="needs a class token"):
                reduced(reducer, kind)
            continue
        model = reduced(reducer, kind)
        logits, trace = model.trace(images)
        assert logits.shape == (len(images), 7), kind
        assert torch.isfinite(logits).all(), kind
        torch.testing.assert_close(model.cost(images), trace.macs, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.parametrize(
    "reducer",
    shared_out(
        [r for r in CASES.values() if not isinstance(r, Stack) and r.only_decides and r.traits.site == "attention"],
        of=3,
    ),
    ids=lambda r: str(r.spec())[:60],
)
@torch.no_grad()
def test_identity_in_a_stack_changes_nothing(reducer, images):
    alone = reduced(reducer)(images.double())
    assert torch.equal(reduced(Stack(Identity(), reducer))(images.double()), alone)
    assert torch.equal(reduced(Stack(reducer, Identity()))(images.double()), alone)


@pytest.mark.parametrize("name", reading("images"))
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
    assert build(settings(name).spec()).name == name, "the name it is found by is the one it writes"
    assert cls.summary
    assert cls.source
    assert cls.__doc__


@torch.no_grad()
def test_permuting_the_patches_permutes_what_topk_evit_and_the_release_of_ats_keep():
    """They use neither order nor place; ToMe's sets alternate, and ATS's own CDF runs in token order."""
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
