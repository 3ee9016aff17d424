"""transformers' ViViT and VideoMAE: a clip is one unit, whose tubelets are told step by step in time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reducers import (
    ATS,
    Count,
    Identity,
    Placement,
    Ratio,
    ReducerError,
    ToMe,
    TopK,
    UnsupportedModel,
    at,
    available,
    build,
    reduce_tokens,
)  # fmt: skip
from reducers.hosts import TYPES
from reducers.hosts.hf_clips import CLIP_MODELS
from reducers.hosts.hf_timesformer import HFTimesformer
from reducers.runtime.block import account
from reducers.tokens import TokenBatch
from reducers.trace import Tracer
from tests.samples import sampled

from .clip_models import DEPTH, SIDE, TIMESFORMERS, WHOLE_CLIPS, make_clips, make_inputs
from .test_contract import placed, unit
from .test_families import Halved
from .test_hf import KEEP_ALL, NEVER, close, settings

tf = pytest.importorskip("transformers")

STEPS, PATCHES = 3, 27  # six frames in tubelets of two, 3 x 3 each
VIVIT, VIDEOMAE = "VivitForVideoClassification", "VideoMAEForVideoClassification"
JOINT = "TimesformerForVideoClassification joint_space_time"


def test_every_class_of_the_tables_is_made_here() -> None:
    known = CLIP_MODELS | dict(HFTimesformer.table)
    assert {path for path, module in TYPES.items() if module.endswith(("hf_clips", "hf_timesformer"))} == set(known)
    made = {name.split(" ")[0] for name in WHOLE_CLIPS + TIMESFORMERS}
    assert made == {path.rpartition(".")[2] for path in known}
    for path in known:
        module, _, name = path.rpartition(".")
        assert getattr(tf, name).__module__ == module


@pytest.mark.parametrize("name", WHOLE_CLIPS)
@torch.no_grad()
def test_without_reduction_the_answer_is_the_librarys_and_the_cost_that_of_its_layers(name: str) -> None:
    model = make_clips(name)
    clips = make_inputs(model)
    expected = model(pixel_values=clips)
    for placement in (Placement(), at(range(DEPTH), Identity()), at([1, 3], TopK(Ratio(1.0), score="value_norm"))):
        fast = reduce_tokens(model, placement)
        close(fast(pixel_values=clips), expected)
        close(fast(clips), expected)
    with FlopCounterMode(display=False) as counter:
        model(pixel_values=clips[:1])
    fast = reduce_tokens(model, at(range(DEPTH), Identity()))
    logits, trace = fast.trace(clips)
    assert trace.macs.tolist() == [counter.get_total_flops() / 2] * 3
    assert (trace.tokens == PATCHES + fast.host.prefix).all() and fast.host.grid == (STEPS * 3, 3)
    assert fast.host.steps == STEPS and torch.isfinite(logits).all()
    if expected.get("last_hidden_state") is not None:
        found = fast.features(clips, restore="owner")
        torch.testing.assert_close(found, expected.last_hidden_state[:, fast.host.prefix :], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [VIVIT, VIDEOMAE])
def test_gradients_without_reduction_are_the_librarys_and_with_it_reach_every_parameter(name: str) -> None:
    one, other, labels = make_clips(name), make_clips(name), torch.arange(3)
    clips = make_inputs(one)
    theirs = other(pixel_values=clips, labels=labels)
    theirs.loss.backward()
    ours = reduce_tokens(one, at(range(DEPTH), Identity()))(pixel_values=clips, labels=labels)
    close(ours, theirs)
    ours.loss.backward()
    for (key, parameter), same in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=0, atol=1e-9, msg=key)
    one.zero_grad()
    fast = reduce_tokens(one, at([1, 2], TopK(Ratio(0.5), score="attention_received")))
    fast(clips).logits.square().sum().backward()
    for key, parameter in one.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", [VIVIT, VIDEOMAE, JOINT])
@torch.no_grad()
def test_a_gathered_pass_is_the_librarys_layers_on_the_tokens_that_are_left(name: str) -> None:
    model = make_clips(name)
    clips = make_inputs(model)
    score = "attention_received" if name == VIDEOMAE else "class_attention"
    fast = reduce_tokens(model, at(1, ATS(Ratio(0.7), score=score)))
    found, trace = fast.trace(clips)
    assert len(set(trace.tokens[:, 2].tolist())) > 1, "clips keep different numbers"
    host = fast.host
    for number, kept in enumerate(trace.kept(1)):
        x = host.embed(clips[number : number + 1]).x[None]
        rows = torch.cat([torch.arange(host.prefix), kept.nonzero().flatten() + host.prefix])
        for index, layer in enumerate(host.layers):
            x = layer(x)[0] if name == JOINT else layer(x)
            if index == 1:  # attention over all, then the MLP row by row: gathering commutes
                x = x[:, rows]
        x = host.token_features(x)
        expected = model.classifier(model.fc_norm(x.mean(1)) if name == VIDEOMAE else x[:, 0])
        torch.testing.assert_close(found[number : number + 1], expected, rtol=0, atol=1e-9)
    gathered, under = (reduce_tokens(model, at(1, Halved(gather)))(clips).logits for gather in (True, False))
    torch.testing.assert_close(under, gathered, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [VIVIT, VIDEOMAE, JOINT])
@torch.no_grad()
def test_patches_are_told_step_by_step(name: str) -> None:
    """A change of one pixel reaches, in the embedding, the patch in which it lies and no other."""
    model = make_clips(name)
    clips = make_inputs(model, 1)
    host = reduce_tokens(model, Placement()).host
    deep = 1 if name == JOINT else 2
    for frame, row, column in ((0, 0, 23), (3, 9, 8), (4, 23, 0)):
        other = clips.clone()
        other[0, frame, :, row, column] += 1
        changed = (host.embed(clips).x != host.embed(other).x).any(1)[host.prefix :]
        assert changed.nonzero().flatten().tolist() == [frame // deep * 9 + row // 8 * 3 + column // 8]


def trained(model: Any, name: str) -> Any:
    """A method with its defaults at two blocks, or as a unit; its own parameters as wide as the model's."""
    reducer = build(settings(name))
    return reduce_tokens(model, placed(reducer, at_blocks=[1, 3])).double()


def deep_enough(name: str, method: str) -> Any:
    return make_clips(name, num_hidden_layers=max(DEPTH, unit(build(settings(method)))))


NOT_FOR_CLIPS = {
    "sttabt": "sttabt reads images alone, and this VivitForVideoClassification reads clips",
}
DRIVEN = [name for name in available() if name not in NOT_FOR_CLIPS]


@pytest.mark.parametrize("method", sampled(available(), quick={"ats", "tome", "sinkhorn", *NOT_FOR_CLIPS}))
@torch.no_grad()
def test_a_clip_alone_is_the_clip_in_a_batch_or_the_method_is_refused(method: str) -> None:
    model = deep_enough(VIVIT, method)
    clips = make_inputs(model)
    if method in NOT_FOR_CLIPS:
        with pytest.raises(ReducerError, match=NOT_FOR_CLIPS[method]):
            trained(model, method)(clips)
        return
    fast = trained(model, method)
    together, trace = fast.trace(clips)
    torch.testing.assert_close(fast(pixel_values=clips).logits, together, rtol=0, atol=1e-12)
    for i in range(len(clips)):
        alone, own = fast.trace(clips[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[i])
        torch.testing.assert_close(own.macs[0], trace.macs[i])


@pytest.mark.parametrize("method", sampled([m for m in DRIVEN if m not in NEVER], quick={"ats", "evit"}))
@torch.no_grad()
def test_keeping_everything_is_the_library(method: str) -> None:
    model = make_clips(VIVIT)
    clips = make_inputs(model)
    spec = {**settings(method), **KEEP_ALL.get(method, {})}
    if method not in KEEP_ALL and "budget" in spec:
        spec["budget"] = {"ratio": 1.0}
    fast = reduce_tokens(model, at(range(DEPTH), build(spec))).double()
    torch.testing.assert_close(fast(clips).logits, model(clips).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", sampled(DRIVEN, quick={"topk", "dynamicvit"}))
def test_gradients_are_finite_in_training(method: str) -> None:
    model = deep_enough(VIVIT, method)
    trained(model, method).train()(pixel_values=make_inputs(model), labels=torch.arange(3)).loss.backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


@pytest.mark.parametrize(("kind", "gmacs"), [("Vivit", 451.52), ("VideoMAE", 180.34)])
@torch.no_grad()
def test_the_published_models_cost_what_is_known(kind: str, gmacs: float) -> None:
    """A view. Counted by the runtime from numbers of tokens, and by torch from the library."""
    with torch.device("meta"):
        model = getattr(tf, f"{kind}ForVideoClassification")(getattr(tf, f"{kind}Config")(num_labels=400)).eval()
        clip = torch.empty(1, model.config.num_frames, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            model(clip)
    host, tracer = reduce_tokens(model, Placement()).host, Tracer(detail=False)
    x = torch.empty(1, host.prefix + host.patches, 0)
    batch = TokenBatch.from_images(x, prefix=host.prefix, has_class_token=host.has_class_token, track=False)
    tracer.start(batch)
    tracer.cost.both(float(host.embed_macs(clip)))
    account(host, range(host.depth), batch, tracer)
    tracer.cost.both(host.head_macs(batch.layout))
    assert float(tracer.cost.executed[0]) == counter.get_total_flops() / 2
    assert round(float(tracer.cost.executed[0]) / 1e9, 2) == gmacs


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unknown_part_is_refused_by_name_also_after_wrapping() -> None:
    for name, spoil, message in (
        (VIVIT, "attention", "layer 2 attends with Identity, not transformers' VivitAttention"),
        (VIVIT, "mlp", "layer 2 has the MLP Identity, which is not known to act token by token"),
        (VIDEOMAE, "attention", "layer 2's attention is a Identity, not transformers' VideoMAEAttention"),
        (VIDEOMAE, "intermediate", "layer 2's intermediate is a Identity, not transformers' VideoMAEIntermediate"),
    ):
        model = make_clips(name)
        fast = reduce_tokens(model, Placement())
        setattr(fast.host.layers[2], spoil, nn.Identity())
        for ask in (fast, lambda _, model=model: reduce_tokens(model, Placement())):
            with pytest.raises(UnsupportedModel, match=message):
                ask(make_inputs(model))
    model = make_clips(VIDEOMAE)
    fast = reduce_tokens(model, Placement())
    fast.host.layers[1].output.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModel, match="layer 1's output has a forward hook"):
        fast(make_inputs(model))
    model.config._attn_implementation = model.videomae.config._attn_implementation = "mine"
    with pytest.raises(UnsupportedModel, match="attn_implementation='mine'"):
        reduce_tokens(model, Placement())


def test_what_cannot_be_asked_is_refused_by_name() -> None:
    model = make_clips(VIVIT)
    clips = make_inputs(model)
    fast = reduce_tokens(model, at(1, TopK(Ratio(0.5))))
    for images, message in (
        (clips[:, 0], r"reads clips \(B, F, 3, H, W\); got \(3, 3, 24, 24\): prepare them"),
        (clips[:, :4], f"4 frames of {SIDE} x {SIDE} px and this VivitForVideoClassification was made for 6 of"),
        (F.pad(clips, (0, 8)), "6 frames of 24 x 32 px"),
    ):
        with pytest.raises(ReducerError, match=message):
            fast(images)
    with pytest.raises(ReducerError, match="does not answer interpolate_pos_encoding=…"):
        fast(pixel_values=clips, interpolate_pos_encoding=True)
    with pytest.raises(ReducerError, match=r"is called as fast\(pixel_values=…\), \(B, F, C, H, W\)"):
        fast()
    with pytest.raises(ReducerError, match="topk needs a class token"):
        reduce_tokens(make_clips(VIDEOMAE), at(1, TopK(Count(9))))
    with pytest.raises(UnsupportedModel, match="made with use_mean_pooling=False, so that its head reads the first"):
        reduce_tokens(make_clips(VIDEOMAE, use_mean_pooling=False), Placement())
    with pytest.raises(UnsupportedModel, match="VideoMAEForPreTraining is not supported.*TimeSformer, ViViT and"):
        reduce_tokens(tf.VideoMAEForPreTraining(tf.VideoMAEConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, decoder_hidden_size=8,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=1, decoder_intermediate_size=8,
        )), Placement())  # fmt: skip


@torch.no_grad()
def test_a_clip_that_is_merged_is_restored_in_its_places() -> None:
    model = make_clips("VideoMAEModel")
    clips = make_inputs(model)
    fast = reduce_tokens(model, at([1, 2], ToMe(Ratio(0.8))))
    found, owner = fast(clips).last_hidden_state, fast.trace(clips)[1].owner(DEPTH - 1)
    assert found.shape == (3, PATCHES, 32)
    assert type(found) is Tensor and len(set(owner[0].tolist())) < PATCHES
    for number in range(3):
        for token in set(owner[number].tolist()):
            alike = found[number][owner[number] == token]
            assert torch.equal(alike, alike[:1].expand_as(alike))
