"""What is timed: every method at the settings its paper prints, ATS at several costs, and the contrasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from benchmarks.counts import Counts
from benchmarks.halting import PRINTED, replayed
from benchmarks.models import fuse
from benchmarks.padded import PaddedViT
from benchmarks.reference_tome import ReferenceToMe
from reducers import ATS, Count, Drop, EViT, Placement, RandomDrop, Ratio, ToMe, TopK, at, every, reduce_tokens
from reducers.backbones.stvit_swin import STViTSwin
from reducers.hosts import host_of
from reducers.methods import STViT
from reducers.runtime.fold import Attention, folded_width

Place = Callable[[int], Placement]  # (number of the batch's first image) -> where what reduces


@dataclass(frozen=True)
class Subject:
    """One variant: how to make it for a batch, and whose multiply-adds are held against its time."""

    name: str
    kind: str  # packed | padded | masked | reference
    place: Place
    build: Callable[[Any, int], nn.Module]  # (model, number of the batch's first image) -> images -> logits
    network: Callable[[Any], Any] = lambda model: model  # what the placement stands on, made of the model
    attention: Attention = "mask"  # how the sizes of merged tokens come in


def packed(name: str, place: Place, attention: Attention = "mask") -> Subject:
    """The project's own run."""
    return Subject(
        name, "packed", place, lambda model, start: reduce_tokens(model, place(start), attention=attention),
        attention=attention,
    )  # fmt: skip


def padded(name: str, place: Place, *, compact: bool) -> Subject:
    """The same decisions with padding and masks (``benchmarks.padded``)."""
    kind = "padded" if compact else "masked"
    return Subject(f"{name}, {kind}", kind, place, lambda model, start: PaddedViT(model, place(start), compact=compact))


def reference_tome(name: str, place: Place, r: int, *, fused: bool) -> Subject:
    """The straightforward ToMe (``benchmarks.reference_tome``)."""
    how = "fused attention" if fused else "attention written out"
    return Subject(
        f"{name}, reference, {how}", "reference", place, lambda model, start: ReferenceToMe(model, r, fused=fused)
    )


def ats(model: Any, blocks: Sequence[int], k: int, counts: Counts | None) -> Place:
    """ATS as it is, or with replayed counts where the model's own mean nothing."""
    if counts is None:
        return lambda start: at(blocks, ATS(Count(k)))
    initial = model.patch_embed.num_patches
    return lambda start: at(blocks, counts.replay(blocks=blocks, k=k, initial=initial, start=start))


def of_swin(base: int) -> Subject:
    """STViT with so many base blocks, of a Swin's own weights."""
    made: dict[int, STViTSwin] = {}

    def network(model: Any) -> STViTSwin:
        if id(model) not in made:
            own = next(model.parameters())
            made[id(model)] = fuse(STViTSwin.from_swin(model, base=base).to(own.device, own.dtype).eval())
        return made[id(model)]

    blocks = "block" if base == 1 else "blocks"
    name = f"STViT, 16 tokens a window, {base} base {blocks}"
    return Subject(name, "packed", lambda start: Placement(), lambda model, start: network(model), network)


def subjects(model: Any, counts: Counts | None, *, contrast: bool = True, reference: bool = False) -> list[Subject]:
    """All variants for one model; ``counts``: replay these for ATS. A Swin has STViT alone."""
    if isinstance(model, SwinTransformer):
        depth = len(model.layers[2].blocks)  # type: ignore[arg-type]
        return [of_swin(base) for base in (1, 2, 4, 6, 8) if 2 * base < depth + 3]
    depth, tokens = len(model.blocks), model.patch_embed.num_patches
    first = depth // 4
    stages, rest = [first, depth // 2, 3 * depth // 4], list(range(first, depth))
    r8, r13 = (_merged(model, r) for r in (8, 13))
    each = "every block"
    half = Ratio(0.5, of="initial")
    topk, tome = fixed(at(first, TopK(half))), fixed(every(1, ToMe(Drop(r13)), depth=depth))
    listed = [
        packed(f"top-K, half at block {first}", topk),
        packed(f"random, half at block {first}", fixed(at(first, RandomDrop(half)))),
        packed(f"EViT 0.7 at blocks {_list(stages)}", fixed(at(stages, EViT(Ratio(0.7))))),
        packed(f"EViT 0.5 at blocks {_list(stages)}", fixed(at(stages, EViT(Ratio(0.5))))),
        packed(f"ToMe r = {r8}, {each}", fixed(every(1, ToMe(Drop(r8)), depth=depth))),
        packed(f"ToMe r = {r13}, {each}", tome),
    ]
    for blocks, k in (([first], 160), ([first], 96), ([first], 48), (rest, 196), (rest, 160), (rest, 108)):
        listed.append(packed(_ats_name(blocks, k, tokens, counts), ats(model, blocks, k, counts)))
    third = depth // 3
    listed.append(
        packed(f"STViT, 16 tokens from blocks {third}, {third + 1}", fixed(at([third, third + 1], STViT(Count(16)))))
    )
    macs = PRINTED.get(int(model.embed_dim))
    if macs is not None and depth == 12 and tokens == 196:
        listed.append(packed(f"A-ViT, {macs / 1e9:g} G replayed", partial(replayed, model, macs)))
    if contrast:
        listed.append(padded(f"top-K, half at block {first}", topk, compact=False))
        for blocks, k in (([first], 160), (rest, 108)):
            name, place = _ats_name(blocks, k, tokens, counts), ats(model, blocks, k, counts)
            listed += [padded(name, place, compact=True), padded(name, place, compact=False)]
    if reference:
        listed += [reference_tome(f"ToMe r = {r13}, {each}", tome, r13, fused=fused) for fused in (True, False)]
    return listed


def most_telling(model: Any, counts: Counts | None) -> list[Subject]:
    """What a large GPU is asked first: one setting of each method, and ToMe's sizes by mask, by fold, and ignored."""
    depth, tokens = len(model.blocks), model.patch_embed.num_patches
    first = depth // 4
    stages, rest, r = [first, depth // 2, 3 * depth // 4], list(range(first, depth)), _merged(model, 13)
    half, tome = Ratio(0.5, of="initial"), fixed(every(1, ToMe(Drop(r)), depth=depth))
    without = fixed(every(1, ToMe(Drop(r), proportional=False), depth=depth))
    listed = [
        packed(f"top-K, half at block {first}", fixed(at(first, TopK(half)))),
        packed(f"EViT 0.7 at blocks {_list(stages)}", fixed(at(stages, EViT(Ratio(0.7))))),
        packed(f"ToMe r = {r}, sizes by mask", tome),
        packed(f"ToMe r = {r}, sizes by fold", tome, "fold"),
        packed(f"ToMe r = {r}, sizes ignored", without),
    ]
    for blocks, k in ((rest, 108), ([first], 96)):
        listed.append(packed(_ats_name(blocks, k, tokens, counts), ats(model, blocks, k, counts)))
    return [*listed, packed(f"random, half at block {first}", fixed(at(first, RandomDrop(half))))]


def compiled_ones(model: Any, counts: Counts | None) -> list[Subject]:
    """Those of them whose counts are fixed, so that they compile into one graph; ToMe by either way."""
    wanted = ("top-K", "EViT", "ToMe")
    return [one for one in most_telling(model, counts) if one.name.startswith(wanted) and "ignored" not in one.name]


def folded_gmacs(subject: Subject, model: Any, tokens: Tensor) -> float:
    """Billions of multiply-adds of an image that the fold's columns add, which no count of costs holds.

    tokens: (B, depth + 1) as a trace tells them. Sizes are there from the first reducing block's end on.
    """
    stage = host_of(model).stages[0]
    width = stage.width // stage.heads
    entering = tokens[:, min(subject.place(0).resolve(len(model.blocks)).blocks) + 1 : -1].double()
    more = 2 * stage.heads * (folded_width(width) - width)  # in q·k and in the sum of the values
    return float((more * entering.square()).sum(1).mean()) / 1e9


def fixed(placement: Placement) -> Place:
    """The same whatever image a batch begins with."""
    return lambda start: placement


def _merged(model: Any, r: int) -> int:
    """So many pairs a block of 196 patches and 12 blocks, in proportion."""
    return max(1, round(r * model.patch_embed.num_patches / 196 * 12 / len(model.blocks)))


def _ats_name(blocks: Sequence[int], k: int, tokens: int, counts: Counts | None) -> str:
    points = k if counts is None else round(k * tokens / counts.initial)
    where = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
    return f"ATS K = {points} at {where}"


def _list(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
