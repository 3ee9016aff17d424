"""transformers' TimeSformer: frames as units, attention over time by place, the class token shared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reducers import (
    ATS,
    Count,
    Decision,
    Drop,
    EViT,
    Identity,
    Placement,
    RandomDrop,
    Ratio,
    ReducerError,
    Stack,
    State,
    TokenReducer,
    ToMe,
    TopK,
    UnsupportedModel,
    at,
    available,
    build,
    reduce_tokens,
)  # fmt: skip
from reducers.hosts import host_of
from reducers.maps import keep_rows
from reducers.reducer import Traits
from reducers.runtime.block import account
from reducers.signals import Signals
from reducers.trace import Tracer
from tests.samples import sampled

from .clip_models import DEPTH, FRAMES, SIDE, TIMESFORMERS, make_clips, make_inputs
from .test_families import Halved
from .test_hf import KEEP_ALL, close, settings

tf = pytest.importorskip("transformers")

NAME = "TimesformerForVideoClassification"
PATCHES, WIDTH, HIDDEN = 9, 32, 48


@pytest.fixture
def model() -> Any:
    return make_clips(NAME)


@pytest.fixture
def clips(model: Any) -> Tensor:
    return make_inputs(model)


# --- without reduction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMESFORMERS)
@torch.no_grad()
def test_without_reduction_the_answer_is_the_librarys_and_the_cost_that_of_its_layers(name: str) -> None:
    model = make_clips(name)
    clips = make_inputs(model)
    expected = model(pixel_values=clips)
    for placement in (Placement(), at(range(DEPTH), Identity()), at([1, 3], TopK(Ratio(1.0), score="value_norm"))):
        fast = reduce_tokens(model, placement)
        close(fast(pixel_values=clips), expected)
        close(fast(clips, return_dict=True), expected)
    with FlopCounterMode(display=False) as counter:
        model(pixel_values=clips[:1])
    trace = reduce_tokens(model, at(range(DEPTH), Identity())).trace(clips)[1]
    assert trace.macs.tolist() == [counter.get_total_flops() / 2] * 3
    assert torch.equal(trace.macs, trace.reference_macs)
    class_tokens = FRAMES if name.endswith("space_only") else 1  # there each frame has its own
    assert (trace.tokens == class_tokens + FRAMES * PATCHES).all() and trace.tokens.shape == (3, DEPTH + 1)
    assert trace.kept(0).shape == (3, FRAMES * PATCHES) and trace.kept(DEPTH - 1).all()


@torch.no_grad()
def test_no_clip_at_all_is_a_batch(model: Any, clips: Tensor) -> None:
    for placement in (Placement(), at(1, Identity())):
        assert reduce_tokens(model, placement)(clips[:0]).logits.shape == (0, 7)


def test_gradients_without_reduction_are_the_librarys_and_with_it_reach_every_parameter(
    model: Any, clips: Tensor
) -> None:
    labels = torch.arange(3)
    twin = copy.deepcopy(model)
    theirs = twin(pixel_values=clips, labels=labels)
    theirs.loss.backward()
    ours = reduce_tokens(model, at(range(DEPTH), Identity()))(pixel_values=clips, labels=labels)
    close(ours, theirs)
    ours.loss.backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-9, msg=name)
    model.zero_grad()
    reduce_tokens(model, at([1, 2], TopK(Ratio(0.5))))(clips).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# --- what is left -----------------------------------------------------------------------------------------------------


class Given(TokenReducer):
    """Keeps what it is told, (clips, frames, patches) bool."""

    name = "given"

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        assert layout.uniform is not None
        chosen = F.pad(self.kept.flatten(0, 1), (1, 0), value=True)
        return Decision(keep_rows(layout, chosen.flatten()))


def attended(attn: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Of tokens (L, D) to those that are seen (L,), and to itself where a token is seen by nobody: head by head."""
    own = torch.eye(len(seen), dtype=torch.bool)
    heads = []
    for q1, k1, v1 in zip(*(part.chunk(attn.num_heads, dim=1) for part in (q, k, v)), strict=True):
        logits = q1 @ k1.T / q1.shape[1] ** 0.5
        heads.append(logits.masked_fill(~(seen[None] | own), -torch.inf).softmax(1) @ v1)
    return torch.cat(heads, dim=1)


def masked(model: Any, clip: Tensor, kept: list[Tensor]) -> Tensor:
    """Logits of one clip by dense steps, written apart: all tokens go on to the end, and those that a block dropped,
    ``kept`` (frames, patches) of each block, are hidden from the others from then on.
    """
    tower, frames = model.timesformer, len(clip)
    x = tower.embeddings(clip[None])[0]
    cls, patches = x[0], x[1:].unflatten(0, (-1, frames))  # (N, F, D)
    alive = torch.ones(frames, len(patches), dtype=torch.bool)
    for layer, left in zip(tower.encoder.layer, kept, strict=True):
        over_time, over_space = layer.temporal_attention, layer.attention
        moved = torch.empty_like(patches)
        for place in range(len(patches)):
            q, k, v = over_time.attention.qkv(layer.temporal_layernorm(patches[place])).chunk(3, dim=1)
            added = over_time.output.dense(attended(over_time.attention, q, k, v, alive[:, place]))
            moved[place] = patches[place] + layer.temporal_dense(added)
        added_to_class = []
        for frame in range(frames):
            tokens = torch.cat([cls[None], moved[:, frame]])
            q, k, v = over_space.attention.qkv(layer.layernorm_before(tokens)).chunk(3, dim=1)
            seen = torch.cat([torch.ones(1, dtype=torch.bool), alive[frame]])
            added = over_space.output.dense(attended(over_space.attention, q, k, v, seen))
            added_to_class.append(added[0])
            moved[:, frame] += added[1:]
        cls = cls + torch.stack(added_to_class).mean(0)
        cls, moved = (x + layer.output(layer.intermediate(layer.layernorm_after(x))) for x in (cls, moved))
        patches, alive = moved, left
    return model.classifier(tower.layernorm(cls))


def one_frame_each() -> Tensor:
    """Place p in frame p alone, modulo the frames, in the second clip; frame 2 is left without any patch there."""
    kept = torch.ones(3, FRAMES, PATCHES, dtype=torch.bool)
    frames = torch.arange(PATCHES) % FRAMES
    kept[1] = torch.arange(FRAMES)[:, None] == frames
    kept[1, 2] = False
    kept[2, 1:, 4:] = False
    return kept


REDUCERS = {
    "ats": ATS(Ratio(0.6)),
    "topk": TopK(Ratio(0.5)),
    "random": RandomDrop(Ratio(0.5)),
    "a place in one frame alone": Given(one_frame_each()),
}


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
@torch.no_grad()
def test_a_gathered_pass_is_a_dense_one_in_which_what_was_dropped_is_hidden(
    reducer: TokenReducer, model: Any, clips: Tensor
) -> None:
    blocks = 1 if isinstance(reducer, Given) else [1, 2]
    found, trace = reduce_tokens(model, at(blocks, reducer)).trace(clips)
    kept = [trace.kept(block).view(3, FRAMES, PATCHES) for block in range(DEPTH)]
    assert not kept[-1].all()
    assert trace.class_kept(DEPTH - 1).all()
    for number, clip in enumerate(clips):
        expected = masked(model, clip, [each[number] for each in kept])
        torch.testing.assert_close(found[number], expected, rtol=0, atol=1e-9)
    everything = [torch.ones(FRAMES, PATCHES, dtype=torch.bool)] * DEPTH
    torch.testing.assert_close(masked(model, clips[0], everything), model(clips[:1]).logits[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_gathered_pass_equals_one_under_a_training_mask(model: Any, clips: Tensor) -> None:
    gathered, under = (reduce_tokens(model, at(1, Halved(gather)))(clips).logits for gather in (True, False))
    torch.testing.assert_close(under, gathered, rtol=0, atol=1e-4)
    assert (gathered - model(clips).logits).abs().max() > 1e-2


@torch.no_grad()
def test_costs_are_those_of_the_formula(model: Any, clips: Tensor) -> None:
    """5 D² Σ n + 2 D Σ g² over time; Σ 2 D² (n + 1) + 2 D² (m + 1) + 2 D (m + 1)(n + 1) over space; the MLP once for
    the class token. ``n`` patches of a frame enter and ``m`` leave, a place is left in ``g`` frames.
    """
    reducer = ATS(Ratio(0.6), score="class_attention")
    fast = reduce_tokens(model, at([1, 2], reducer))
    trace = fast.trace(clips)[1]
    square, mlp = WIDTH**2, 2 * WIDTH * HIDDEN
    embedding, head = FRAMES * PATCHES * 3 * 64 * WIDTH, 7 * WIDTH
    for number in range(3):
        before, executed, published = torch.ones(FRAMES, PATCHES, dtype=torch.bool), embedding + head, embedding + head
        for block in range(DEPTH):
            after = trace.kept(block)[number].view(FRAMES, PATCHES)
            n, m, g = before.sum(1), after.sum(1), before.sum(0)
            shared = 5 * square * n.sum() + 2 * WIDTH * g.square().sum() + mlp * (1 + m.sum())
            executed += shared + (2 * square * (n + 1) + 2 * square * (m + 1) + 2 * WIDTH * (m + 1) * (n + 1)).sum()
            published += (
                shared
                + (3 * square * (n + 1) + square * (m + 1) + WIDTH * (n + 1) ** 2 + WIDTH * (m + 1) * (n + 1)).sum()
            )
            before = after
        assert trace.tokens[number, -1] == 1 + before.sum() < 1 + FRAMES * PATCHES
        # a class row's query that the score asked for is computed once more with the rows that stay
        own = trace.reducer_macs[number]
        torch.testing.assert_close(trace.macs[number] - own, executed.double(), rtol=1e-12, atol=0)
        torch.testing.assert_close(trace.reference_macs[number], published.double(), rtol=1e-12, atol=0)
    assert torch.equal(fast.cost(clips), trace.macs)


ALONE = {
    "ats": ATS(Ratio(0.6)),
    "random": RandomDrop(Ratio(0.5)),
    "evit": EViT(Count(4)),
    "tome": ToMe(Drop(2)),
    "stack": Stack(ATS(Ratio(0.8)), ToMe(Drop(1))),
}


@torch.no_grad()
def alone_as_in_a_batch(fast: Any, clips: Tensor) -> Any:
    together, trace = fast.trace(clips)
    torch.testing.assert_close(fast(clips).logits, together, rtol=0, atol=1e-12)
    for i in range(len(clips)):
        alone, own = fast.trace(clips[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[i])
        assert torch.equal(own.owner(DEPTH - 1)[0], trace.owner(DEPTH - 1)[i])
        torch.testing.assert_close(own.macs[0], trace.macs[i])
    return trace


@pytest.mark.parametrize("name", ALONE)
def test_a_clip_alone_is_the_clip_in_a_batch(name: str, model: Any, clips: Tensor) -> None:
    clips[1, 0] = 0.25  # its frames keep different numbers of tokens
    trace = alone_as_in_a_batch(reduce_tokens(model, at([1, 2], ALONE[name])), clips)
    assert (trace.tokens[:, -1] < 1 + FRAMES * PATCHES).all()


def test_each_frame_draws_numbers_of_its_own(model: Any, clips: Tensor) -> None:
    clips[:, 1:] = clips[:, :1]
    kept = reduce_tokens(model, at(1, RandomDrop(Ratio(0.5)))).trace(clips)[1].kept(1).view(3, FRAMES, PATCHES)
    assert (kept[:, 1:] != kept[:, :-1]).any(2).any(1).all()


# --- time -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_with_one_frame_attention_over_time_is_the_path_of_the_values() -> None:
    model = make_clips(NAME, num_frames=1)
    clips = make_inputs(model)
    tower = model.timesformer
    x = tower.embeddings(clips)
    for layer in tower.encoder.layer:
        over_time = layer.temporal_attention
        values = over_time.attention.qkv(layer.temporal_layernorm(x[:, 1:])).chunk(3, dim=2)[2]
        x = torch.cat([x[:, :1], x[:, 1:] + layer.temporal_dense(over_time.output.dense(values))], dim=1)
        x = x + layer.attention(layer.layernorm_before(x))[0]
        x = x + layer.output(layer.intermediate(layer.layernorm_after(x)))
    expected = model.classifier(tower.layernorm(x)[:, 0])
    for placement in (Placement(), at(range(DEPTH), Identity())):
        torch.testing.assert_close(reduce_tokens(model, placement)(clips).logits, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_frames_in_another_order_with_their_times_keep_the_same(model: Any, clips: Tensor) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    placement = at([1, 2], ATS(Ratio(0.6)))
    logits, trace = reduce_tokens(model, placement).trace(clips)
    model.timesformer.embeddings.time_embeddings.copy_(model.timesformer.embeddings.time_embeddings[:, order].clone())
    other, moved = reduce_tokens(model, placement).trace(clips[:, order])
    torch.testing.assert_close(other, logits, rtol=0, atol=1e-9)
    for block in range(DEPTH):
        kept, others = (each.kept(block).view(3, FRAMES, PATCHES) for each in (trace, moved))
        assert torch.equal(others, kept[:, order])
    torch.testing.assert_close(moved.macs, trace.macs)
    turned = reduce_tokens(model, placement)(clips).logits
    assert (turned - logits).abs().max() > 1e-3, "without their frames the times matter"


class Recorded(TokenReducer):
    """Reduces nothing, and remembers the features that enter its blocks."""

    name = "recorded"
    traits = Traits(site="input")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def decide(self, signals: Signals, state: State) -> Decision | None:
        self.seen.append(signals.output()[signals.cls])
        return None


@torch.no_grad()
def test_the_class_token_is_the_same_in_all_frames_after_every_block(model: Any, clips: Tensor) -> None:
    recorded = Recorded()
    fast = reduce_tokens(model, at(0, recorded) | at([1, 2], Stack(recorded, ATS(Ratio(0.5)))) | at(3, recorded))
    batch = fast._through(clips, None)[1]
    rows = [*recorded.seen, batch.x[batch.cls]]
    assert len(rows) == DEPTH + 1
    for row in rows:
        by_clip = row.view(3, FRAMES, WIDTH)
        assert torch.equal(by_clip, by_clip[:, :1].expand_as(by_clip))
    assert len(set(batch.layout.lengths.tolist())) > 1


@torch.no_grad()
def test_a_token_that_lies_nowhere_attends_over_time_to_itself(model: Any, clips: Tensor) -> None:
    """EViT's fused token: with all of time the same as far as places go, it changes nothing for the others."""
    fast = reduce_tokens(model, at(1, EViT(Count(4))))
    trace = fast.trace(clips)[1]
    assert (trace.tokens[:, -1] == 1 + FRAMES * (4 + 1)).all()
    batch = fast._through(clips, None)[1]
    lone = batch.units.sample[batch.layout.row_image[(batch.pos < 0) & ~batch.layout.is_prefix]]
    assert torch.bincount(lone).tolist() == [FRAMES] * 3
    kept = trace.kept(1).view(3, FRAMES, PATCHES)
    pairs = kept.sum(1).square().sum(1) + FRAMES
    layer = model.timesformer.encoder.layer[2]
    host = host_of(model)
    host_batch = reduce_tokens(model, at(1, EViT(Count(4))))._through(clips, Tracer())[1]
    fixed = host.block(2).fixed_macs(host_batch)
    each = sum(p.weight.numel() for p in (layer.temporal_attention.attention.qkv, layer.temporal_dense)) + WIDTH**2
    assert torch.equal(fixed, (each * FRAMES * 5 + 2 * WIDTH * pairs).double())


# --- the library's own words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["", " joint_space_time", " space_only"])
@torch.no_grad()
def test_last_hidden_state_lies_as_the_librarys_does(variant: str) -> None:
    model = make_clips("TimesformerModel" + variant)
    clips = make_inputs(model)
    fast = reduce_tokens(model, at(DEPTH - 1, TopK(Ratio(0.5))))
    expected = model(clips).last_hidden_state
    found = fast(clips, restore="zero").last_hidden_state
    assert found.shape == expected.shape
    kept = fast.trace(clips)[1].kept(DEPTH - 1).view(3, FRAMES, PATCHES)
    kept = kept.flatten(0, 1) if variant == " space_only" else kept.transpose(1, 2).flatten(1)
    kept = F.pad(kept, (1, 0), value=True)  # the last block's reducer acts behind its attention
    torch.testing.assert_close(found, expected * kept[..., None], rtol=0, atol=1e-9)
    with pytest.raises(ReducerError, match='topk at block 3 drops patches.*restore="zero"'):
        fast(clips)


@torch.no_grad()
def test_stochastic_depth_is_the_librarys_and_gradient_checkpointing_is_honoured(clips: Tensor) -> None:
    model = make_clips(NAME, drop_path_rate=1, hidden_dropout_prob=0.0).train()
    for layer in model.timesformer.encoder.layer[1:]:
        layer.drop_path.drop_prob = 1.0 - 1e-12  # every branch is dropped but that of the last linear over time
    expected = model(clips).logits
    torch.testing.assert_close(reduce_tokens(model, at(1, Identity()))(clips).logits, expected, rtol=0, atol=1e-9)
    grads = []
    for again in (False, True):
        model = make_clips(NAME, hidden_dropout_prob=0.0).train()
        if again:
            model.activation_checkpointing_enable()
        fast = reduce_tokens(model, at([1, 2], Stack(EViT(Ratio(0.8)), ToMe(Drop(1)))))
        assert fast.host.checkpoints is again
        with torch.enable_grad():
            fast(clips).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


# --- published sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "side", "gmacs"), [(8, 224, 195.830), (16, 448, 1702.686), (96, 224, 2379.857)], ids=["base", "HR", "L"]
)
@torch.no_grad()
def test_the_published_models_cost_what_is_known(frames: int, side: int, gmacs: float) -> None:
    """A view; tables count three. Counted by the runtime from numbers of tokens, and by torch from the library."""
    with torch.device("meta"):
        model = tf.TimesformerForVideoClassification(
            tf.TimesformerConfig(num_frames=frames, image_size=side, num_labels=400)
        ).eval()
        clip = torch.empty(1, frames, 3, side, side)
        with FlopCounterMode(display=False) as counter:
            model(clip)
    fast = reduce_tokens(model, Placement())
    host, tracer = fast.host, Tracer(detail=False)
    batch = host._batch(torch.empty(frames, 1 + host.patches, 0), 1, track=False)  # type: ignore[attr-defined]
    tracer.start(batch)
    tracer.cost.both(host.embed_macs(clip))
    account(host, range(host.depth), batch, tracer)
    tracer.cost.both(host.head_macs(batch.layout))
    for found in (tracer.cost.executed, tracer.cost.reference):
        assert float(found[0]) == counter.get_total_flops() / 2
        assert round(float(found[0]) / 1e9, 3) == gmacs


# --- every method -----------------------------------------------------------------------------------------------------

REFUSED = {
    **dict.fromkeys(
        ("patch_merger", "sinkhorn", "sit", "token_learner", "hvt_pool"),
        "mixes all patches .* every block of this TimesformerForVideoClassification attends over time among frames",
    ),
    **dict.fromkeys(
        ("avit", "back_tracking", "stvit", "stvit_r"),
        "prepares images, plans, runs .* TimesformerForVideoClassification attends over time among frames; place",
    ),
    "sttabt": "sttabt reads images alone, and this TimesformerForVideoClassification reads clips",
    "diffrate": "learns its counts by a cost .* costs by the places that are left; use a method with a budget",
}
DRIVEN = [name for name in available() if name not in REFUSED]
NEVER = {"shrinking_pattern"}  # keeps less than all whatever it is told


def double(fast: Any) -> Any:
    """With the reducers' own parameters as wide as the model's."""
    return fast.double()


@pytest.mark.parametrize(
    "name", sampled(available(), quick={"ats", "tome", "sinkhorn", "hvt_pool", "stvit", "diffrate"})
)
def test_a_method_is_driven_in_each_frame_or_refused_by_name(name: str, model: Any, clips: Tensor) -> None:
    if name in REFUSED:
        with pytest.raises(ReducerError, match=REFUSED[name]):
            double(reduce_tokens(model, at([1, 2], build(settings(name)))))(clips)
        return
    trace = alone_as_in_a_batch(double(reduce_tokens(model, at([1, 2], build(settings(name))))), clips)
    assert (trace.macs > 0).all() and trace.class_kept(DEPTH - 1).all()


@pytest.mark.parametrize("name", sampled([name for name in DRIVEN if name not in NEVER], quick={"ats", "evit"}))
@torch.no_grad()
def test_keeping_everything_is_the_library(name: str, model: Any, clips: Tensor) -> None:
    spec = {**settings(name), **KEEP_ALL.get(name, {})}
    if name not in KEEP_ALL and "budget" in spec:
        spec["budget"] = {"ratio": 1.0}
    fast = double(reduce_tokens(model, at(1 if "threshold" in spec else range(DEPTH), build(spec))))
    torch.testing.assert_close(fast(clips).logits, model(clips).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sampled(DRIVEN, quick={"topk", "dynamicvit"}))
def test_gradients_are_finite_in_training(name: str, model: Any, clips: Tensor) -> None:
    fast = double(reduce_tokens(model, at([1, 2], build(settings(name))))).train()
    fast(pixel_values=clips, labels=torch.arange(3)).loss.backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


# --- refusals ---------------------------------------------------------------------------------------------------------


def _spoil(model: Any, where: str) -> None:
    layer = model.timesformer.encoder.layer[2]
    if where == "layer":
        model.timesformer.encoder.layer[2] = nn.Sequential(layer)
    elif where == "attention over time":
        layer.temporal_attention = nn.Identity()
    elif where == "qkv":
        layer.temporal_attention.attention.qkv = nn.Sequential(layer.temporal_attention.attention.qkv)
    elif where == "mlp":
        layer.intermediate = nn.Linear(WIDTH, HIDDEN)
    elif where == "drop path":
        layer.drop_path = nn.Dropout(0.5)
    elif where == "hook":
        layer.attention.register_forward_hook(lambda *_: None)
    elif where == "mixed":
        layer.attention_type = "space_only"
    else:
        model.timesformer.encoder.forward = lambda *_: None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("layer", "layer 2 is a Sequential, not transformers' TimesformerLayer.*put the plain one back"),
        ("attention over time", "layer 2's temporal_attention is a Identity, not transformers' TimeSformerAttention"),
        ("qkv", "layer 2's temporal_attention has the qkv Sequential.*plain Linear"),
        ("mlp", "layer 2's intermediate is a Linear, not transformers' TimesformerIntermediate"),
        ("drop path", "layer 2 has its drop_path replaced by a Dropout"),
        ("hook", "layer 2's attention has a forward hook, which would be bypassed"),
        ("mixed", "layer 2 has attention_type='space_only' and layer 0 another"),
        ("encoder", "the forward of TimesformerForVideoClassification's encoder was replaced"),
    ],
)
def test_an_unknown_part_is_refused_by_name_also_after_wrapping(
    where: str, message: str, model: Any, clips: Tensor
) -> None:
    fast = reduce_tokens(model, Placement())
    _spoil(model, where)
    for ask in (fast, lambda _: reduce_tokens(model, Placement())):
        with pytest.raises(UnsupportedModel, match=message):
            ask(clips)


def test_what_cannot_be_asked_is_refused_by_name(model: Any, clips: Tensor) -> None:
    fast = reduce_tokens(model, at(1, TopK(Ratio(0.5))))
    for images, message in (
        (clips[:, 0], r"reads clips \(B, F, 3, H, W\); got \(3, 3, 24, 24\)"),
        (clips[:, :4], f"4 frames of {SIDE} x {SIDE} px and this .* was made for {FRAMES} of"),
        (clips[..., :16], "5 frames of 24 x 16 px"),
    ):
        with pytest.raises(ReducerError, match=message):
            fast(images)
    with pytest.raises(ReducerError, match="does not answer interpolate_pos_encoding=…; it takes labels, pixel_values"):
        fast(pixel_values=clips, interpolate_pos_encoding=True)
    dropping = ATS(Ratio(0.5), score="value_norm", keep_class_token=False)
    with pytest.raises(ReducerError, match="ats at block 1 may drop the class token, of which every frame has a copy"):
        reduce_tokens(model, at(1, dropping))
    with pytest.raises(ReducerError, match="has no option 'fill'"):
        reduce_tokens(model, Placement(), host={"fill": "zero"})


# --- what a budget counts ---------------------------------------------------------------------------------------------


def frames_of(trace: Any, block: int) -> Tensor:
    kept: Tensor = trace.kept(block).view(3, FRAMES, PATCHES)
    return kept


@torch.no_grad()
def scores_of(model: Any, clip: Tensor) -> Tensor:
    """(F, N) what top-K goes by in block 0: attention of the frame's class token, summed over heads."""
    layer, tower = model.timesformer.encoder.layer[0], model.timesformer
    x = tower.embeddings(clip[None])
    patches = x[:, 1:].unflatten(1, (PATCHES, FRAMES))[0]
    patches = patches + layer.temporal_dense(layer.temporal_attention(layer.temporal_layernorm(patches))[0])
    tokens = torch.cat([x[0, :1].expand(FRAMES, 1, -1), patches.transpose(0, 1)], dim=1)
    shares = layer.attention(layer.layernorm_before(tokens), output_attentions=True)[1]
    return shares[:, :, 0, 1:].sum(1)


@pytest.mark.parametrize(("over", "count"), [("frame", 4), ("clip", 13), ("tube", 4)])
@torch.no_grad()
def test_top_k_keeps_the_highest_of_what_it_is_counted_over(over: str, count: int, model: Any, clips: Tensor) -> None:
    reducer = TopK(Count(count), score="class_attention")
    fast = reduce_tokens(model, at(0, reducer), host={"over": over})
    logits, trace = fast.trace(clips)
    for number, clip in enumerate(clips):
        scores = scores_of(model, clip)
        expected = torch.zeros(FRAMES, PATCHES, dtype=torch.bool)
        if over == "clip":
            expected.view(-1)[scores.flatten().topk(count).indices] = True
            assert trace.tokens[number, 1] == 1 + count and len(set(expected.sum(1).tolist())) > 1
        else:
            scores = scores if over == "frame" else scores.mean(0).expand(FRAMES, -1)
            expected.scatter_(1, scores.topk(count).indices, True)
        assert torch.equal(frames_of(trace, 0)[number], expected)
        torch.testing.assert_close(logits[number], masked(model, clip, [expected] * DEPTH), rtol=0, atol=1e-9)


OVER = {
    "ats": (ATS(Ratio(0.6)), [1, 2]),
    "random": (RandomDrop(Ratio(0.5)), [1, 2]),
    "stack": (Stack(ATS(Ratio(0.8)), TopK(Ratio(0.7))), [1, 2]),
    "received": (ATS(Ratio(0.6), score="attention_received"), [0, 2]),
}


@pytest.mark.parametrize("over", ["clip", "tube"])
@pytest.mark.parametrize("name", OVER)
@torch.no_grad()
def test_choices_over_clips_and_tubes_are_carried_out_in_frames(
    name: str, over: str, model: Any, clips: Tensor
) -> None:
    reducer, blocks = OVER[name]
    fast = reduce_tokens(model, at(blocks, reducer), host={"over": over})
    trace = alone_as_in_a_batch(fast, clips)
    logits = fast(clips).logits
    kept = [frames_of(trace, block) for block in range(DEPTH)]
    assert not kept[-1].all(2).any()
    for number, clip in enumerate(clips):
        expected = masked(model, clip, [each[number] for each in kept])
        torch.testing.assert_close(logits[number], expected, rtol=0, atol=1e-9)
    alike = (kept[-1] == kept[-1][:, :1]).all()
    assert alike if over == "tube" else not alike


@pytest.mark.parametrize("over", ["clip", "tube"])
@torch.no_grad()
def test_merging_over_clips_and_tubes(over: str, model: Any, clips: Tensor) -> None:
    """ToMe finds for tokens of any frame the token that is most alike, or the same pairs in all frames."""
    fast = reduce_tokens(model, at([1, 2], ToMe(Drop(3 if over == "clip" else 2))), host={"over": over})
    trace = alone_as_in_a_batch(fast, clips)
    gone = 2 * 3 if over == "clip" else FRAMES * 2 * 2
    assert (trace.tokens[:, -1] == 1 + FRAMES * PATCHES - gone).all()
    batch = fast._through(clips, Tracer())[1]
    assert torch.equal(batch.units.sum(batch.layout.sum_rows(batch.size)).long(), torch.full((3,), FRAMES * 10))
    owner = trace.owner(DEPTH - 1).view(3, FRAMES, PATCHES)
    assert (owner >= 0).all()
    lengths = batch.layout.lengths.view(3, FRAMES)
    frame = torch.searchsorted(lengths.cumsum(1), owner.flatten(1), right=True).view_as(owner)
    crossed = frame != torch.arange(FRAMES)[:, None]
    if over == "tube":
        assert not crossed.any() and torch.equal(
            owner - (lengths.cumsum(1) - lengths)[..., None], owner[:, :1].expand(-1, FRAMES, -1)
        )
    else:
        assert crossed.any()


@pytest.mark.parametrize("over", ["clip", "tube"])
@torch.no_grad()
def test_keeping_everything_over_clips_and_tubes_is_the_library(over: str, model: Any, clips: Tensor) -> None:
    for reducer in (Identity(), TopK(Ratio(1.0)), ToMe(Drop(0)), ATS(Count(4000))):
        fast = reduce_tokens(model, at(range(DEPTH), reducer), host={"over": over})
        torch.testing.assert_close(fast(clips).logits, model(clips).logits, rtol=0, atol=1e-9)
    gathered, under = (
        reduce_tokens(model, at(1, Halved(gather)), host={"over": over})(clips).logits for gather in (True, False)
    )
    torch.testing.assert_close(under, gathered, rtol=0, atol=1e-4)
    assert (gathered - model(clips).logits).abs().max() > 1e-2


@torch.no_grad()
def test_the_whole_map_of_a_clip_has_nothing_between_its_frames(model: Any, clips: Tensor) -> None:
    maps: dict[str, Tensor] = {}

    class Heard(Given):
        def decide(self, signals: Signals, state: State) -> Decision | None:
            maps[fast.host.chosen["over"]] = signals.attention()
            return None

    for over in ("frame", "clip", "tube"):
        fast = reduce_tokens(model, at(1, Heard(torch.ones(0))), host={"over": over})
        fast(clips)
    own, clip = maps["frame"].unflatten(0, (3, FRAMES)), maps["clip"]
    torch.testing.assert_close(maps["tube"], own.mean(1), rtol=0, atol=1e-12)
    assert clip.shape[-2:] == (FRAMES * 10, FRAMES * 10)
    for frame in range(FRAMES):
        rows = torch.cat([torch.tensor([frame]), FRAMES + frame * PATCHES + torch.arange(PATCHES)])
        torch.testing.assert_close(clip[:, :, rows][..., rows], own[:, frame], rtol=0, atol=0)
    torch.testing.assert_close(clip.sum(-1), torch.ones_like(clip[..., 0]), rtol=0, atol=1e-12)


NOT_OVER = {
    ("clip", "evit"): "evit leaves tokens that are no one patch's .* decided on together.*evit with fuse=False",
    ("clip", "gtp"): "gtp mixes tokens of all frames, and this model's are decided on together",
    ("tube", "gtp"): "gtp makes features of its own, and what it sees here is the mean of all frames",
    ("tube", "tofu"): "tofu makes features of its own, and what it sees here is the mean of all frames",
    **{("tube", name): f"{name} keeps other places in each frame" for name in ("evs", "rlt", "vidcom2")},
}
QUICK_OVER = {"evit", "gtp", "tofu"}


@pytest.mark.parametrize("over", ["clip", "tube"])
@pytest.mark.parametrize("name", sampled(DRIVEN, quick=QUICK_OVER))
def test_a_method_over_clips_and_tubes_is_the_same_alone_or_refused_by_name(
    name: str, over: str, model: Any, clips: Tensor
) -> None:
    placement = at([1, 2], build(settings(name)))
    if (over, name) in NOT_OVER:
        with pytest.raises(ReducerError, match=NOT_OVER[over, name]):
            reduce_tokens(model, placement, host={"over": over})(clips)
        return
    trace = alone_as_in_a_batch(double(reduce_tokens(model, placement, host={"over": over})), clips)
    assert trace.class_kept(DEPTH - 1).all()
    if over == "tube":
        for kept in frames_of(trace, DEPTH - 1):
            there = kept[kept.any(1)]  # fewer_frames leaves none of some frames
            assert (there == there[:1]).all() and (len(there) == FRAMES) == (name != "fewer_frames")


@pytest.mark.parametrize("over", ["clip", "tube"])
@pytest.mark.parametrize("name", sampled(DRIVEN, quick={"dynamicvit", "tps"}))
def test_gradients_over_clips_and_tubes_are_finite(name: str, over: str, model: Any, clips: Tensor) -> None:
    placement = at([1, 2], build(settings(name)))
    if (over, name) in NOT_OVER or name == "tps":  # whose masks know of other tokens
        with pytest.raises(ReducerError, match=NOT_OVER.get((over, name), f"{name} (mixes|makes|leaves)")):
            double(reduce_tokens(model, placement, host={"over": over})).train()(clips)
        return
    fast = double(reduce_tokens(model, placement, host={"over": over})).train()
    fast(pixel_values=clips, labels=torch.arange(3)).loss.backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_what_budgets_cannot_count_is_refused_by_name(model: Any) -> None:
    with pytest.raises(
        ReducerError, match="'over' of TimesformerForVideoClassification is one of 'frame', 'clip', 'tu"
    ):
        reduce_tokens(model, Placement(), host={"over": "window"})
    for variant, word in (("joint_space_time", "the clip, which is one sequence"), ("space_only", "each frame by its")):
        with pytest.raises(UnsupportedModel, match=f"attention_type='{variant}', where over='clip' .*{word}"):
            reduce_tokens(make_clips(f"{NAME} {variant}"), Placement(), host={"over": "clip"})
