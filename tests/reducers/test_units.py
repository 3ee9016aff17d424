"""Units: what attends among itself. Here they last from embedding to head: the two frames of a clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from reducers import (
    ATS,
    Count,
    EViT,
    Identity,
    Placement,
    RandomDrop,
    Ratio,
    ReducedViT,
    Stack,
    ToMe,
    TopK,
    Trace,
    at,
    reduce_tokens,
)  # fmt: skip
from reducers.hosts import TYPES
from reducers.hosts.timm_vit import TimmViT
from reducers.tokens import Layout, TokenBatch, Units

from .conftest import DEPTH, SIZES

FRAMES, PATCHES, CLASSES = 2, 36, 7
PLACES = [1, 3]


class Clips(VisionTransformer):
    """Frames by themselves, each with a class token; the head reads the mean of those."""

    def forward(self, clips: Tensor) -> Tensor:  # type: ignore[override]
        rows = self.forward_features(clips.flatten(0, 1))[:, 0]
        return self.head(rows.view(len(clips), FRAMES, -1).mean(1))


class ClipHost(TimmViT):
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (Clips,)

    def check(self) -> None:
        pass

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        return super().grid_of(images.flatten(0, 1))

    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        batch = super().embed(images.flatten(0, 1), track=track)
        return replace(batch, units=Units(len(images), torch.arange(FRAMES * PATCHES).view(FRAMES, PATCHES)))

    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        return FRAMES * super().embed_macs(images.flatten(0, 1))

    def pooled(self, batch: TokenBatch) -> Tensor:
        return super().pooled(batch).view(batch.samples, FRAMES, -1).mean(1)

    def head_macs(self, layout: Layout) -> Tensor:
        return super().head_macs(layout)[::FRAMES]


HOST = ClipHost


@pytest.fixture
def clips_model(monkeypatch: pytest.MonkeyPatch) -> Clips:
    monkeypatch.setitem(TYPES, f"{__name__}.Clips", __name__)
    torch.manual_seed(0)
    model = Clips(**SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.fixture
def clips() -> Tensor:
    return torch.randn(3, FRAMES, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def still(model: Clips) -> VisionTransformer:
    """The same weights for images."""
    plain = VisionTransformer(**SIZES).double().eval()
    plain.load_state_dict(model.state_dict())
    return plain


def by_clip(values: Tensor) -> Tensor:
    return values.view(-1, FRAMES, *values.shape[1:])


@torch.no_grad()
def test_without_reduction_a_clip_is_its_frames_and_the_trace_sums_them(clips_model: Clips, clips: Tensor) -> None:
    expected = clips_model(clips)
    dense = reduce_tokens(still(clips_model), Placement()).trace(clips[:, 0])[1].macs
    classifier = clips_model.head.weight.numel()
    for placement in (Placement(), at(range(DEPTH), Identity())):
        found, trace = reduce_tokens(clips_model, placement).trace(clips)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert trace.tokens.shape == (3, DEPTH + 1) and (trace.tokens == FRAMES * (PATCHES + 1)).all()
        assert torch.equal(trace.macs, FRAMES * dense - (FRAMES - 1) * classifier)
        assert trace.kept(DEPTH - 1).shape == (3, FRAMES * PATCHES) and trace.kept(DEPTH - 1).all()
        assert trace.class_kept(0).shape == (3,) and trace.class_kept(0).all()


REDUCERS = {
    "topk": TopK(Ratio(0.5)),
    "ats": ATS(Ratio(0.6)),
    "evit": EViT(Count(11)),
    "tome": ToMe(Ratio(0.7)),
    "no class token left": ATS(Ratio(0.5), score="value_norm", keep_class_token=False),
    "stack": Stack(ATS(Ratio(0.8)), ToMe(Ratio(0.8))),
}


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
@torch.no_grad()
def test_a_method_in_a_clip_is_the_method_in_each_frame(reducer: Any, clips_model: Clips, clips: Tensor) -> None:
    """Budgets, choices, costs and provenance are those that each frame has as an image of its own, put together."""
    fast, single = (
        reduce_tokens(clips_model, at(PLACES, reducer)),
        reduce_tokens(still(clips_model), at(PLACES, reducer)),
    )
    _, trace = fast.trace(clips)
    _, one = single.trace(clips.flatten(0, 1))
    torch.testing.assert_close(
        fast.features(clips), by_clip(single.features(clips.flatten(0, 1))).mean(1), rtol=0, atol=1e-10
    )
    assert torch.equal(trace.tokens, by_clip(one.tokens).sum(1))
    twice = (FRAMES - 1) * clips_model.head.weight.numel()
    for name in ("macs", "reference_macs", "reducer_macs"):
        summed = by_clip(getattr(one, name)).sum(1) - (0 if name == "reducer_macs" else twice)
        torch.testing.assert_close(getattr(trace, name), summed, rtol=0, atol=1e-6)
    for block in range(DEPTH):
        assert torch.equal(trace.kept(block), one.kept(block).view(3, -1))
        assert torch.equal(trace.class_kept(block), by_clip(one.class_kept(block)).all(1))
        lengths, owner = by_clip(one.tokens[:, block + 1]), by_clip(one.owner(block))
        before = torch.stack([torch.zeros_like(lengths[:, 0]), lengths[:, 0]], dim=1)[..., None]
        assert torch.equal(trace.owner(block), torch.where(owner >= 0, owner + before, owner).flatten(1))
    torch.testing.assert_close(fast.cost(clips), trace.macs, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        fast.features(clips, "last"), single.features(clips.flatten(0, 1), "last").view(3, FRAMES * PATCHES, -1),
        rtol=0, atol=1e-10,
    )  # fmt: skip


@torch.no_grad()
def alone_as_in_a_batch(fast: ReducedViT, clips: Tensor) -> Trace:
    together, trace = fast.trace(clips)
    for i in range(len(clips)):
        alone, own = fast.trace(clips[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[i])
        assert torch.equal(own.owner(DEPTH - 1)[0], trace.owner(DEPTH - 1)[i])
        torch.testing.assert_close(own.macs[0], trace.macs[i])
    return trace


def test_a_clip_alone_is_the_clip_in_a_batch(clips_model: Clips, clips: Tensor) -> None:
    clips[1, 0] = 0.25  # its frames keep different numbers of tokens
    trace = alone_as_in_a_batch(reduce_tokens(clips_model, at(PLACES, ATS(Ratio(0.7)))), clips)
    assert len(set(trace.tokens[:, -1].tolist())) > 1


def test_each_frame_draws_numbers_of_its_own(clips_model: Clips, clips: Tensor) -> None:
    clips[:, 1] = clips[:, 0]
    for reducer in (RandomDrop(Ratio(0.5)), ATS(Ratio(0.5), variant="gumbel")):
        trace = alone_as_in_a_batch(reduce_tokens(clips_model, at(1, reducer)), clips)
        first, second = trace.kept(1).view(3, FRAMES, PATCHES).unbind(1)
        assert ((first != second).sum(1) > PATCHES // 6).all()


def test_gradients_reach_every_parameter_and_are_those_of_the_frames(clips_model: Clips, clips: Tensor) -> None:
    placement, plain = at(PLACES, TopK(Ratio(0.5))), still(clips_model)
    reduce_tokens(clips_model, placement)(clips).square().sum().backward()
    rows = reduce_tokens(plain, placement).features(clips.flatten(0, 1))
    plain.head(by_clip(rows).mean(1)).square().sum().backward()
    for (name, ours), theirs in zip(clips_model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and ours.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)
