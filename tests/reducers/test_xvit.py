"""X-ViT: frames are units, keys and values are shifted in time by place; what is left is what a filled one computes."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, ClassVar

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
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
    ReducedViT,
    ReducerError,
    Stack,
    State,
    TokenReducer,
    ToMe,
    TopK,
    Trace,
    UnsupportedModel,
    at,
    available,
    build,
    reduce_tokens,
)  # fmt: skip
from reducers.backbones.xvit import XViT, shift_in_time, xvit_b_8, xvit_b_16
from reducers.hosts import host_of
from reducers.hosts.xvit import ShiftedCore
from reducers.maps import Mask, keep_patches
from reducers.methods import DynamicViT
from reducers.reducer import Traits
from reducers.signals import Signals
from reducers.tokens import Layout
from tests.samples import sampled

DEPTH, PATCHES = 4, 9
SIZES: dict[str, Any] = {  # heads of 4 channels: an eighth is a head and a half, as in the full model
    "num_frames": 5, "img_size": 24, "patch_size": 8, "embed_dim": 48, "num_heads": 12, "depth": DEPTH,
    "num_classes": 7, "drop_rate": 0.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "one group": {},
    "two groups": {"num_frames": 4, "group": 2},
    "alone": {"num_frames": 3, "group": 1},
    "one frame": {"num_frames": 1},
    "scaled": {"init_values": 0.5, "pre_norm": True, "qkv_bias": False, "num_frames": 3},
}
each = pytest.mark.parametrize("name", MODELS)
some = pytest.mark.parametrize("name", sampled(MODELS, quick=("one group", "two groups")))
both = pytest.mark.parametrize("missing", ["zero", "self"])


def made(name: str = "one group", **changes: Any) -> XViT:
    """A model whose every parameter matters, in float64."""
    torch.manual_seed(0)
    model = XViT(**{**SIZES, **MODELS[name], **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def clips_for(model: XViT, count: int = 3) -> Tensor:
    shape = (count, model.num_frames, 3, 24, 24)
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Chosen(TokenReducer):
    """Drops patches by place and frame, or by place alone (``tube``); in training it masks what inference drops."""

    name = "chosen"
    traits: ClassVar[Traits] = Traits(uses_positions=True)  # type: ignore[misc]

    def __init__(self, *, tube: bool = False) -> None:
        super().__init__()
        self.tube = tube

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, place = signals.layout, signals.positions() + state.block
        stays = (place if self.tube else place + 2 * layout.row_image) % 3 > 0
        if state.training:
            return Decision(Mask.of(layout, (stays | layout.is_prefix).double()))
        return Decision(keep_patches(layout, layout.pad_patches(stays)))


# --- without reduction ------------------------------------------------------------------------------------------------


def slow_shift(part: Tensor, group: int) -> Tensor:
    """(B, F, n, H, d): channel head * d + c; the first eighth from frame t + 1, the second from t - 1, zeros beyond."""
    _, frames, _, heads, width = part.shape
    if group == 1:
        return part
    found = torch.zeros_like(part)
    for t in range(frames):
        for channel in range(heads * width):
            source = t + 1 if channel < heads * width // 8 else t - 1 if channel < heads * width // 4 else t
            if 0 <= source < frames and source // group == t // group:
                head, c = divmod(channel, width)
                found[:, t, :, head, c] = part[:, source, :, head, c]
    return found


def restated(model: XViT, clips: Tensor) -> Tensor:
    """Logits of X-ViT from its parameters alone."""
    batch, frames = clips.shape[:2]
    projected = F.conv2d(clips.flatten(0, 1), model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    x = projected.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
    cls = model.cls_token.expand(batch, frames, -1, -1)
    x = torch.cat([cls, x], dim=2) + model.pos_embed
    x = model.norm_pre(x + model.time_embed[:, torch.arange(frames) % model.group])
    for block in model.blocks:
        attn: Any = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
        k, v = slow_shift(k, model.group), slow_shift(v, model.group)
        logits = torch.einsum("bfihc,bfjhc->bfhij", q, k) / math.sqrt(q.shape[-1])
        summed = torch.einsum("bfhij,bfjhc->bfihc", logits.softmax(-1), v).flatten(3)
        x = x + block.ls1(attn.proj(summed))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    head = model.head
    x = torch.cat([head.cls_token.expand(batch, -1, -1), model.norm(x)[:, :, 0]], dim=1)
    q, k, v = head.block.attn.qkv(head.block.norm1(x)).unflatten(-1, (3, model.blocks[0].attn.num_heads, -1)).unbind(2)
    logits = torch.einsum("bihc,bjhc->bhij", q, k) / math.sqrt(q.shape[-1])
    x = x + head.block.attn.proj(torch.einsum("bhij,bjhc->bihc", logits.softmax(-1), v).flatten(2))
    x = x + head.block.mlp(head.block.norm2(x))
    read = F.layer_norm(x[:, 0], x.shape[-1:], head.norm.weight, head.norm.bias, 1e-5)
    return head.fc(F.gelu(head.pre_logits(read)))


@each
@torch.no_grad()
def test_the_module_and_the_driven_model_are_the_restatement(name: str) -> None:
    model = made(name)
    clips = clips_for(model)
    expected = restated(model, clips)
    torch.testing.assert_close(model(clips), expected, rtol=0, atol=1e-9)
    frames = model.num_frames
    for placement in (
        Placement(),
        at(1, Identity()),
        at(range(DEPTH), Identity()),
        at([0, 2], TopK(Ratio(1.0), score="value_norm")),
    ):
        fast = reduce_tokens(model, placement)
        found, trace = fast.trace(clips)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(fast(clips), expected, rtol=0, atol=1e-9)
        assert trace.tokens.tolist() == [[frames * (1 + PATCHES)] * (DEPTH + 1)] * 3
        assert trace.kept(DEPTH - 1).shape == (3, frames * PATCHES) and trace.kept(DEPTH - 1).all()
    assert reduce_tokens(model, at(1, ToMe(Ratio(0.5))))(clips[:0]).shape == (0, 7)
    dense = fast.features(clips, "owner")
    torch.testing.assert_close(
        dense, model.forward_features(clips)[:, :, 1:].flatten(1, 2), rtol=0, atol=1e-9
    )  # frame by frame
    torch.testing.assert_close(fast.features(clips), model.forward_head(model.forward_features(clips), True))


@torch.no_grad()
def test_frames_that_are_groups_of_their_own_are_images_of_a_plain_vit() -> None:
    model = made("alone")
    clips = clips_for(model)
    plain = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=48, num_heads=12, depth=DEPTH, num_classes=0
    ).double().eval()  # fmt: skip
    left = plain.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and all(key.startswith(("time_embed", "head.")) for key in left.unexpected_keys)
    plain.pos_embed += model.time_embed[:, 0]
    reducer = ATS(Ratio(0.6))
    for ours, theirs in ((model, plain), *[(reduce_tokens(m, at([1, 3], reducer)) for m in (model, plain))]):
        rows = theirs(clips.flatten(0, 1)).view(3, 3, -1)
        torch.testing.assert_close(ours(clips), model.head(rows), rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_shift_is_of_rows_and_nothing_leaves_a_group() -> None:
    x = torch.arange(2.0 * 4 * 3 * 16, dtype=torch.float64).view(8, 3, 16) + 1
    by_heads = x.view(2, 4, 3, 4, 4)
    for group in (1, 2, 4):
        assert torch.equal(shift_in_time(x, group), slow_shift(by_heads, group).view(8, 3, 16))
    assert (shift_in_time(x, 2) == 0).sum() == 8 * 3 * 2


@some
def test_gradients_are_those_of_the_module_and_reach_every_parameter_under_reduction(name: str) -> None:
    model = made(name)
    clips = clips_for(model)
    model(clips).square().sum().backward()
    expected = {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    reduce_tokens(model, at(range(DEPTH), Identity()))(clips).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-7, atol=1e-9, msg=key)
    for reducer in (ToMe(Ratio(0.7)), ATS(Ratio(0.7))):
        model.zero_grad()
        reduce_tokens(model, at(range(DEPTH), reducer))(clips).square().sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), key


def test_stochastic_depth_and_checkpoints_are_the_modules() -> None:
    model = made(drop_path_rate=0.5).train()
    clips = clips_for(model)
    fast = reduce_tokens(model, at(range(DEPTH), Identity()))
    for _ in range(2):
        torch.manual_seed(3)
        expected = model(clips)
        torch.manual_seed(3)
        torch.testing.assert_close(fast(clips), expected, rtol=0, atol=1e-9)
        model.set_grad_checkpointing()


# --- reduced: against a dense model whose dropped places are filled ---------------------------------------------------


def filled(model: XViT, clips: Tensor, kept: list[Tensor], missing: str) -> Tensor:
    """Logits of a dense X-ViT in which dropped tokens are no keys any more, and their neighbours in time hear zeros or
    themselves in their place.

    kept: for each block (B, F, n) bool, which tokens are left behind it, the class token first.
    """
    batch, frames, group = len(clips), model.num_frames, model.group
    x = model.tokens(clips).unflatten(0, (batch, frames))
    alive = torch.ones(x.shape[:3], dtype=torch.bool)
    for block, now in zip(model.blocks, kept, strict=True):
        attn: Any = block.attn
        q, *shifted = attn.qkv(block.norm1(x)).chunk(3, -1)
        for index, part in enumerate(shifted):
            shift = slow_shift(part.masked_fill(~alive[..., None], 0).unsqueeze(3), group).squeeze(3)
            if missing == "self":
                share = part.shape[-1] // 8
                for t in range(frames):
                    for first, source in ((0, t + 1), (share, t - 1)):
                        if 0 <= source < frames and source // group == t // group:
                            own = part[:, t, :, first : first + share]
                            there = alive[:, source, :, None]
                            shift[:, t, :, first : first + share] = torch.where(
                                there, shift[:, t, :, first : first + share], own
                            )
            shifted[index] = shift
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)) for part in (q, *shifted))
        logits = torch.einsum("bfihc,bfjhc->bfhij", q, k) * attn.head_dim**-0.5
        shares = logits.masked_fill(~alive[:, :, None, None], -torch.inf).softmax(-1)
        x = x + block.ls1(attn.proj(torch.einsum("bfhij,bfjhc->bfihc", shares, v).flatten(3)))
        alive = alive & now
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.head(model.norm(x)[:, :, 0])


def tokens_kept(model: XViT, trace: Trace) -> list[Tensor]:
    """(B, F, 1 + N) of each block."""
    kept = [trace.kept(block).unflatten(1, (model.num_frames, PATCHES)) for block in range(DEPTH)]
    return [F.pad(each, (1, 0), value=True) for each in kept]


@some
@both
@torch.no_grad()
def test_what_is_left_of_frames_is_what_a_filled_model_computes(name: str, missing: str) -> None:
    model = made(name)
    clips = clips_for(model)
    clips[1, 0] = 0.25  # its frames keep different numbers of tokens
    for reducer in (ATS(Ratio(0.7)), TopK(Ratio(0.7), score="value_norm"), Chosen()):
        fast = reduce_tokens(model, at(range(DEPTH), reducer), host={"missing": missing})
        found, trace = fast.trace(clips)
        assert trace.tokens[:, -1].max() < model.num_frames * (PATCHES + 1) // 2
        torch.testing.assert_close(found, filled(model, clips, tokens_kept(model, trace), missing), rtol=0, atol=1e-9)
        torch.testing.assert_close(fast(clips), found, rtol=0, atol=1e-12)
    other = reduce_tokens(model, at(range(DEPTH), Chosen()), host={"missing": "self" if missing == "zero" else "zero"})
    assert ((other(clips) - found).abs().max() > 1e-4) == (model.group > 1)


@both
@torch.no_grad()
def test_one_choice_for_all_frames_leaves_the_lattice_whole(missing: str) -> None:
    """Then nothing is missing, and the dense blocks of the module compute the same on the places that are left."""
    model = made()
    clips = clips_for(model)
    reducer = Chosen(tube=True)
    reducer.traits = Traits(uses_positions=True, site="input")
    found = reduce_tokens(model, at(0, reducer), host={"missing": missing})(clips)
    places = torch.arange(PATCHES)
    rows = F.pad(1 + places[places % 3 > 0], (1, 0))
    x = model.norm(model.blocks(model.tokens(clips)[:, rows]))[:, 0]
    torch.testing.assert_close(found, model.head(x.view(3, 5, -1)), rtol=0, atol=1e-9)


@torch.no_grad()
def test_top_k_over_a_clip_keeps_the_highest_of_all_frames_and_over_a_tube_the_same_places() -> None:
    model = made()
    clips = clips_for(model)
    block: Any = model.blocks[0]
    x = block.norm1(model.tokens(clips))
    q, k, _ = block.attn.qkv(x).chunk(3, -1)
    k = slow_shift(k.unflatten(0, (3, 5)).unsqueeze(3), model.group).squeeze(3).flatten(0, 1)
    q, k = (part.unflatten(-1, (12, 4)).transpose(1, 2) for part in (q, k))
    shares = (q[:, :, :1] @ k.mT * block.attn.head_dim**-0.5).softmax(-1)[:, :, 0, 1:].sum(1).view(3, 5, PATCHES)
    for over, count in (("clip", 17), ("tube", 4)):
        fast = reduce_tokens(model, at(0, TopK(Count(count), score="class_attention")), host={"over": over})
        _, trace = fast.trace(clips)
        expected = torch.zeros(3, 5, PATCHES, dtype=torch.bool)
        if over == "clip":
            expected.view(3, -1).scatter_(1, shares.flatten(1).topk(count).indices, True)
            assert len(set(expected.sum(2).flatten().tolist())) > 2 and (trace.tokens[:, 1] == 5 + count).all()
        else:
            expected |= F.one_hot(shares.mean(1).topk(count).indices, PATCHES).bool().any(1)[:, None]
        assert torch.equal(trace.kept(0).view(3, 5, PATCHES), expected)


@pytest.mark.parametrize("over", ["clip", "tube"])
@both
@torch.no_grad()
def test_what_is_chosen_over_clips_and_tubes_is_what_a_filled_model_computes(over: str, missing: str) -> None:
    for name in ("one group", "two groups"):
        model = made(name)
        clips = clips_for(model)
        for reducer in (ATS(Ratio(0.6)), TopK(Ratio(0.6), score="value_norm"), RandomDrop(Ratio(0.5))):
            fast = reduce_tokens(model, at([1, 3], reducer), host={"over": over, "missing": missing})
            trace = alone_as_in_a_batch(fast, clips)
            kept = tokens_kept(model, trace)
            expected = filled(model, clips, kept, missing)
            torch.testing.assert_close(fast(clips), expected, rtol=0, atol=1e-9)
            assert (kept[-1] == kept[-1][:, :1]).all() == (over == "tube") and not kept[-1].all()
        if over == "tube":  # of which nothing is ever missing
            other = reduce_tokens(model, at([1, 3], reducer), host={"over": over, "missing": "self"})
            torch.testing.assert_close(other(clips), fast(clips), rtol=0, atol=1e-9)


@pytest.mark.parametrize("over", ["clip", "tube"])
@torch.no_grad()
def test_keeping_everything_over_clips_and_tubes_is_the_module(over: str) -> None:
    model = made()
    clips = clips_for(model)
    for reducer in (Identity(), TopK(Ratio(1.0)), ToMe(Drop(0)), ATS(Count(4000))):
        fast = reduce_tokens(model, at(range(DEPTH), reducer), host={"over": over})
        torch.testing.assert_close(fast(clips), model(clips), rtol=0, atol=1e-9)
    merged = reduce_tokens(model, at([1, 2], ToMe(Drop(2))), host={"over": over})
    trace = alone_as_in_a_batch(merged, clips)
    assert (trace.tokens[:, -1] == 5 * (1 + PATCHES) - (4 if over == "clip" else 5 * 4)).all()


@pytest.mark.parametrize("over", ["frame", "clip", "tube"])
@both
def test_a_masked_pass_is_the_gathered_pass(missing: str, over: str) -> None:
    model = made()
    clips = clips_for(model)
    fast = reduce_tokens(model, at([0, 2, 3], Chosen()), host={"missing": missing, "over": over})
    with torch.no_grad():
        expected = fast(clips)
        found = fast.train()(clips)
    close = 2e-5 if over == "frame" else 5e-5  # the masked softmax adds 1e-6 to each sum
    torch.testing.assert_close(found, expected, rtol=0, atol=close)
    assert (expected - model(clips)).abs().max() > 1e-2


def test_gradients_reach_a_mask_through_the_neighbours_as_well() -> None:
    model = made(depth=2)
    clips = clips_for(model, 1)
    weight = torch.full((5, 1 + PATCHES), 0.5, dtype=torch.float64, requires_grad=True)

    class Soft(TokenReducer):
        name = "soft"

        def decide(self, signals: Signals, state: State) -> Decision | None:
            mask = weight.flatten().where(~signals.layout.is_prefix, torch.ones(()).double())
            return Decision(Mask.of(signals.layout, mask))

    features = reduce_tokens(model, at(0, Soft())).forward_features(clips)
    features[0, 0].square().sum().backward()  # of the first frame's class token
    assert weight.grad is not None and weight.grad[:2, 1:].all() and not weight.grad[2:].any()


@torch.no_grad()
def test_neighbours_are_found_by_place_whatever_was_merged_or_fused() -> None:
    """Against a loop over the rows: places, class tokens, and tokens that lie nowhere by their number."""
    model = made("two groups")
    clips = clips_for(model)
    host, seen = host_of(model), []

    class Looks(TokenReducer):
        name = "looks"

        def decide(self, signals: Any, state: State) -> Decision | None:
            seen.append(signals.batch)
            return None

    for reducer in (EViT(Ratio(0.5), select=ATS(Ratio(0.6))), Stack(ATS(Ratio(0.8)), ToMe(Ratio(0.7))), EViT(Count(3))):
        reduce_tokens(model, at([0, 1], reducer) | at(2, Looks()))(clips)
        batch = seen.pop()
        layout, pos = batch.layout, batch.pos.tolist()
        core = host.block(2).core(batch)
        assert isinstance(core, ShiftedCore)
        where: dict[tuple[int, str, int], int] = {}
        names: list[tuple[int, str, int]] = []
        for unit, count in enumerate(layout.counts):
            nowhere = 0
            for index in range(count):
                row = len(names)
                if index == 0:
                    name = (unit, "class", 0)
                elif pos[row] < 0:
                    name, nowhere = (unit, "nowhere", nowhere), nowhere + 1
                else:
                    name = (unit, "place", pos[row])
                where[name] = row
                names.append(name)
        for step in (1, -1):
            rows, has_neighbour = core._neighbours[step]
            expected = []
            for unit, kind, number in names:
                there = (unit % 4) // 2 == (unit % 4 + step) // 2 and 0 <= unit % 4 + step < 4
                expected.append((where.get((unit + step, kind, number), -1) if there else -1, there))
            assert list(zip(rows.tolist(), has_neighbour.tolist(), strict=True)) == expected
        assert any(kind == "nowhere" for _, kind, _ in names) == isinstance(reducer, EViT)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "gmacs"), [(xvit_b_8, 140.57), (xvit_b_16, 281.13)])
def test_the_published_models_cost_what_is_known(preset: Any, gmacs: float) -> None:
    """On the meta device, so that nothing is computed: what the driven model books, and what torch counts."""
    with torch.device("meta"):
        model = preset().eval()
        clips = torch.zeros(1, model.num_frames, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clips)
    host = host_of(model)
    layout = Layout.alike(host.frames, 1 + host.patches, 1, torch.device("cpu"))
    rows = layout.lengths
    blocks = [host.block(i).cost.macs(queries=rows, keys=rows, outputs=rows, mlp=rows).sum() for i in range(12)]
    booked = host.embed_macs(clips) + float(sum(blocks) + host.head_macs(layout)[0])
    assert booked == counter.get_total_flops() / 2 and round(booked / 1e9, 2) == gmacs
    assert sum(parameter.numel() for parameter in model.parameters()) == 93_790_864


@each
@torch.no_grad()
def test_dense_costs_are_what_torch_counts_of_the_module(name: str) -> None:
    model = made(name).requires_grad_(False)
    clips = clips_for(model, 1)
    with FlopCounterMode(display=False) as counter:
        model(clips)
    for placement in (Placement(), at(range(DEPTH), Identity())):
        trace = reduce_tokens(model, placement).trace(clips)[1]
        assert float(trace.macs[0]) == float(trace.reference_macs[0]) == counter.get_total_flops() / 2


@torch.no_grad()
def test_reduced_costs_are_those_of_frames_counted_by_hand() -> None:
    model = made()
    clips = clips_for(model)
    fast = reduce_tokens(model, at(range(DEPTH), TopK(Ratio(0.6), score="value_norm")))
    trace = fast.trace(clips)[1]
    assert trace.tokens[0].tolist() == [5 * count for count in (10, 6, 4, 2, 2)]
    dense, width = reduce_tokens(model, Placement()).trace(clips)[1].macs, 48

    def block(entering: int, leaving: int) -> int:
        rows = 2 * entering + 2 * leaving  # keys, values; queries, projection
        return rows * width**2 + 2 * leaving * entering * width + 8 * leaving * width**2

    counts = [10, 6, 4, 2, 2]
    saved = sum(block(1 + PATCHES, 1 + PATCHES) - block(*pair) for pair in itertools.pairwise(counts))
    assert torch.equal(trace.macs - trace.reducer_macs, dense - 5 * saved)
    assert torch.equal(fast.cost(clips), trace.macs)


# --- what every method does, and who is refused -----------------------------------------------------------------------

REFUSED = {"sttabt": "reads images alone"}
QUICK = {"ats", "evit", "tome", "patch_merger", "stvit", "random"} | set(REFUSED)


def settings(name: str) -> TokenReducer:
    known = {parameter.name for parameter in available()[name].settings()}
    return build({"name": name, **({"budget": {"ratio": 0.6}} if "budget" in known else {})})


@torch.no_grad()
def alone_as_in_a_batch(fast: ReducedViT, clips: Tensor) -> Trace:
    together, trace = fast.trace(clips)
    for i in range(len(clips)):
        alone, own = fast.trace(clips[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[i])
        assert all(torch.equal(own.kept(b)[0], trace.kept(b)[i]) for b in range(DEPTH))
        assert torch.equal(own.owner(DEPTH - 1)[0], trace.owner(DEPTH - 1)[i])
        torch.testing.assert_close(own.macs[0], trace.macs[i])
    torch.testing.assert_close(fast.cost(clips), trace.macs)
    return trace


@pytest.mark.parametrize("name", sampled(available(), quick=QUICK))
def test_every_method_acts_inside_frames_or_is_refused_by_name(name: str) -> None:
    model = made(depth=8) if name == "stvit_r" else made()
    clips, reducer = clips_for(model), settings(name)
    unit = getattr(reducer, "unit", 1)
    placement = at([1, 2] if unit == 1 else range(1, 1 + unit), reducer)
    if name in REFUSED:
        with pytest.raises(ReducerError, match=REFUSED[name]):
            reduce_tokens(model, placement)(clips)
        return
    trace = alone_as_in_a_batch(reduce_tokens(model, placement).double(), clips)
    if name in ("small_input", "fewer_frames"):
        assert (trace.tokens[:, 0] < model.num_frames * (1 + PATCHES)).all()
    elif name not in ("identity", "rlt"):  # nothing stands still here
        assert (trace.tokens.amin(1) < trace.tokens[:, 0]).all()


@torch.no_grad()
def test_each_frame_draws_numbers_of_its_own() -> None:
    model = made()
    clips = clips_for(model)
    clips[:] = clips[:1, :1]
    trace = alone_as_in_a_batch(reduce_tokens(model, at(1, RandomDrop(Count(4)))), clips)
    kept = trace.kept(1).view(3, 5, PATCHES)
    assert (kept.sum(2) == 4).all(), "a budget is of each frame"
    assert len({tuple(frame.tolist()) for frame in kept[0]}) > 2


def test_learned_dropping_trains() -> None:
    model = made()
    fast = reduce_tokens(model, at([1, 2], DynamicViT(Ratio(0.5), distill_weight=0, token_weight=0)))
    fast.double().train()(clips_for(model)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in fast.parameters())


def test_who_cannot_be_driven_is_refused_by_name() -> None:
    model = made()
    clips = clips_for(model)
    with pytest.raises(ValueError, match=r"takes \(B, 5, C, H, W\), 5 frames of a clip"):
        reduce_tokens(model, Placement())(clips[:, :4])
    with pytest.raises(ReducerError, match="the option 'missing' of XViT is one of 'zero', 'self'; got 'mean'"):
        reduce_tokens(model, Placement(), host={"missing": "mean"})
    with pytest.raises(ReducerError, match="places='mean' is not for this XViT"):
        reduce_tokens(model, Placement(), places="mean")
    for wrong, why in (({"num_frames": 8, "group": 3}, "no whole number"), ({"embed_dim": 36}, "multiple of 8")):
        with pytest.raises(ValueError, match=why):
            XViT(**{**SIZES, **wrong})
    for change, why in (
        (lambda m: m.blocks[2].attn.register_forward_hook(print), "block 2 has a forward hook on its attn"),
        (lambda m: m.head.register_forward_hook(print), "the model has a forward hook on its head"),
        (lambda m: setattr(m, "head", torch.nn.Identity()), "the head Identity"),
        (lambda m: setattr(m.blocks[1].attn, "group", 1), r"groups of \[1, 5\] frames and the model's group is 5"),
        (lambda m: setattr(m, "tokens", print), "the model's tokens was replaced"),
        (
            lambda m: setattr(m.blocks[1], "attn", VisionTransformer(embed_dim=48, depth=1).blocks[0].attn),
            "attends with",
        ),
    ):
        other = copy.deepcopy(model)
        fast = reduce_tokens(other, Placement())
        change(other)
        with pytest.raises(UnsupportedModel, match=why):
            fast(clips)


@torch.no_grad()
def test_another_head_and_none() -> None:
    model = made()
    clips = clips_for(model)
    model.reset_classifier(0)
    fast = reduce_tokens(model, at(1, TopK(Ratio(0.5))))
    pooled = fast(clips)
    assert pooled.shape == (3, 48) and host_of(model).classes == 0
    model.reset_classifier(11)
    model.double()
    torch.testing.assert_close(fast(clips), model.head.fc(pooled))
