"""What reads clips alone: methods that decide on a whole clip, or by its pixels, and the controls that shorten it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from reducers import (
    ATS,
    Count,
    Decision,
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
    at,
    available,
    build,
    reduce_tokens,
)
from reducers.frames import spread_steps
from reducers.maps import Keep, Mask, keep_rows
from reducers.methods import EVS, RLT, FewerFrames, SmallInput, VidCom2
from reducers.methods.rlt import changes, kept_tubelets
from reducers.reducer import Traits
from reducers.signals import Signals
from tests.samples import reading, sampled

from .clip_models import make_clips, make_inputs
from .conftest import make_vit
from .test_timesformer import REFUSED as NOT_DIVIDED
from .test_xvit import clips_for
from .test_xvit import made as make_xvit

tf = pytest.importorskip("transformers")

DEPTH, PATCHES = 4, 9  # of a frame
VIVIT, VIDEOMAE, TIMESFORMER = (
    f"{kind}ForVideoClassification" for kind in ("Vivit", "VideoMAE", "Timesformer")
)  # fmt: skip
HOSTS: dict[str, tuple[str, dict[str, str]]] = {
    "vivit": (VIVIT, {}),
    "videomae": (VIDEOMAE, {}),
    "joint": (f"{TIMESFORMER} joint_space_time", {}),
    "space only": (f"{TIMESFORMER} space_only", {}),
    "divided": (TIMESFORMER, {}),
    "divided over clip": (TIMESFORMER, {"over": "clip"}),
    "xvit": ("one group", {"missing": "self"}),
    "xvit in groups": ("two groups", {}),
}
UNITS = ("space only", "divided", "divided over clip", "xvit", "xvit in groups")  # frames, of a clip
DEEP = {"vivit": 2, "videomae": 2}  # frames of a patch
METHODS = {
    "rlt": RLT(0.5),
    "rlt kept": RLT(0.5, reference="kept"),
    "rlt proportional": RLT(0.5, proportional=True),
    "evs": EVS(Ratio(0.5)),
    "vidcom2": VidCom2(Ratio(0.4)),
    "vidcom2 all channels": VidCom2(Count(11), channels=1, temperature=0.1),
    "fewer_frames": FewerFrames(Ratio(0.5)),
}
every_host = pytest.mark.parametrize("host", sampled(HOSTS, quick=("videomae", "joint", "divided", "xvit in groups")))
some_hosts = pytest.mark.parametrize("host", sampled(HOSTS, quick=("divided", "xvit")))
one_host = pytest.mark.parametrize("host", sampled(HOSTS, quick=("xvit",)))


def model_of(host: str, **changes: Any) -> Any:
    name = HOSTS[host][0]
    return make_xvit(name, **changes) if host.startswith("xvit") else make_clips(name, **changes)


def reduced(host: str, placement: Placement, model: Any = None) -> ReducedViT:
    return reduce_tokens(model_of(host) if model is None else model, placement, host=HOSTS[host][1])


def logits_of(model: Any, clips: Tensor) -> Tensor:
    found = model(clips)
    return found if isinstance(found, Tensor) else found.logits


def inputs_of(host: str, model: Any, clips: int = 4) -> Tensor:
    """Clips in which some places stand still for a while: the first at all places, the last nowhere."""
    found = clips_for(model, clips) if host.startswith("xvit") else make_inputs(model, clips)
    deep = DEEP.get(host, 1)
    found[0] = found[0, :1]
    generator = torch.Generator().manual_seed(3)
    for clip in range(1, clips - 1):
        for step in range(1, found.shape[1] // deep):
            for place in range(PATCHES):
                if torch.rand((), generator=generator) < 0.3 + 0.2 * clip:
                    frames = slice(step * deep, (step + 1) * deep)
                    rows, columns = (slice(8 * at_, 8 * at_ + 8) for at_ in divmod(place, 3))
                    found[clip, frames, :, rows, columns] = found[clip, (step - 1) * deep, :, rows, columns]
    return found


class Told(TokenReducer):
    """Notes the size of each token and where it lies, clip by clip."""

    name = "told"
    traits: ClassVar[Traits] = Traits(site="input", uses_positions=True, whole_clip=True)  # type: ignore[misc]

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[int, float]] = []

    def decide(self, signals: Signals, state: State) -> Decision | None:
        clip, pos, size = signals.layout.row_image, signals.positions(), signals.size
        self.told = [
            dict(zip(pos[mine].tolist(), size[mine].tolist(), strict=True))
            for number in range(signals.layout.images)
            for mine in [(clip == number) & (pos >= 0)]
        ]
        return None


class Given(TokenReducer):
    """Keeps, or under a mask lets live, the patches that it is told of each clip, (B, N0) bool."""

    name = "given"
    traits: ClassVar[Traits] = Traits(site="input", uses_positions=True, whole_clip=True)  # type: ignore[misc]

    def __init__(self, kept: Tensor, *, mask: bool = False) -> None:
        super().__init__()
        self.kept, self.mask = kept, mask

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, pos = signals.layout, signals.positions()
        chosen = layout.is_prefix | (self.kept[layout.row_image, pos.clamp(min=0)] & (pos >= 0))
        return Decision(Mask.of(layout, chosen.double()) if self.mask else keep_rows(layout, chosen))


# --- what holds for each of them --------------------------------------------------------------------------------------


@torch.no_grad()
def alone_as_in_a_batch(fast: ReducedViT, clips: Tensor) -> Trace:
    together, trace = fast.trace(clips)
    torch.testing.assert_close(logits_of(fast, clips), together, rtol=0, atol=1e-10)
    for i in range(len(clips)):
        alone, own = fast.trace(clips[i : i + 1])
        own_logits = together.unflatten(0, (len(clips), -1))[i]  # the library has some for each frame of space only
        torch.testing.assert_close(alone, own_logits, rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[i])
        assert all(torch.equal(own.kept(b)[0], trace.kept(b)[i]) for b in range(DEPTH))
        assert torch.equal(own.owner(DEPTH - 1)[0], trace.owner(DEPTH - 1)[i])
        torch.testing.assert_close(own.macs[0], trace.macs[i])
    torch.testing.assert_close(fast.cost(clips), trace.macs)
    return trace


def test_every_method_for_clips_alone_is_tried_here() -> None:
    assert {reducer.name for reducer in METHODS.values()} == {*reading("clips")} - {*reading("images")}


@pytest.mark.parametrize("method", METHODS)
@some_hosts
def test_a_clip_alone_is_the_clip_in_a_batch(host: str, method: str) -> None:
    model = model_of(host)
    trace = alone_as_in_a_batch(reduced(host, at(0, METHODS[method]), model), inputs_of(host, model))
    dense = reduced(host, Placement(), model).trace(inputs_of(host, model))[1]
    fewer = trace.tokens[:, 1] < dense.tokens[:, 1]
    assert fewer[:3].all() and fewer[3] == (not method.startswith("rlt"))
    assert ((trace.macs < dense.macs) == fewer).all()


@pytest.mark.parametrize("method", METHODS)
@one_host
def test_gradients_are_finite_and_reach_every_parameter(host: str, method: str) -> None:
    model = model_of(host)
    clips = inputs_of(host, model).requires_grad_()
    fast = reduced(host, at(0, METHODS[method]), model).train()
    logits_of(fast, clips).square().sum().backward()
    assert clips.grad is not None and clips.grad.isfinite().all() and clips.grad.flatten(1).any(1).all()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


KEEP_ALL = {
    "rlt": RLT(-1e-9), "rlt kept": RLT(-1.0, reference="kept"), "rlt weighed": RLT(-1.0, proportional=True),
    "evs": EVS(Ratio(1.0)), "vidcom2": VidCom2(Ratio(1.0)), "fewer_frames": FewerFrames(Ratio(1.0)),
    "small_input": SmallInput(Ratio(1.0)),
}  # fmt: skip


@pytest.mark.parametrize(
    "host", sampled([name for name in HOSTS if name != "videomae"], quick=("vivit", "divided", "xvit"))
)
@torch.no_grad()
def test_keeping_everything_is_the_model(host: str) -> None:
    model = model_of(host)
    clips = inputs_of(host, model)
    for name, reducer in KEEP_ALL.items():
        fast = reduced(host, at([0, 2], reducer), model)
        torch.testing.assert_close(logits_of(fast, clips), logits_of(model, clips), rtol=0, atol=1e-9, msg=name)
        assert not fast.trace(clips)[1].reducer_macs.any()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_half_precision_runs(method: str) -> None:
    for host in ("videomae", "divided", "xvit"):
        model = model_of(host).to(torch.bfloat16)
        clips = inputs_of(host, model_of(host)).bfloat16()
        logits, trace = reduced(host, at(0, METHODS[method]), model).trace(clips)
        dense = reduced(host, Placement(), model).trace(clips)[1]
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert (trace.tokens[:3, 1] < dense.tokens[:3, 1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_plain_data_and_back(method: str) -> None:
    reducer = METHODS[method]
    assert build(reducer.spec()).spec() == reducer.spec()


def test_a_model_of_images_refuses_them_by_name() -> None:
    for reducer in METHODS.values():
        with pytest.raises(
            ReducerError, match=f"{reducer.name} reads clips alone, and this VisionTransformer reads im"
        ):
            reduce_tokens(make_vit(), at(0, reducer))


def test_what_cannot_be_is_refused_by_name() -> None:
    model = model_of("divided")
    for reducer in (RLT(), EVS(Ratio(0.5)), VidCom2(Ratio(0.5))):
        with pytest.raises(ReducerError, match=f"{reducer.name} keeps other places in each frame, and over='tube'"):
            reduce_tokens(model, at(0, reducer), host={"over": "tube"})
    reduce_tokens(model, at(0, FewerFrames(Ratio(0.5))), host={"over": "tube"})
    with pytest.raises(ReducerError, match="rlt and rlt choose among all patches"):
        reduce_tokens(model, at(0, RLT()) | at(1, RLT(0.2)))
    with pytest.raises(ReducerError, match="rlt does more than decide and cannot be stacked"):
        Stack(RLT(), ToMe(Ratio(0.5)))

    class Late(Told):
        name = "late"
        traits = Traits(whole_clip=True)

    with pytest.raises(ReducerError, match="late at block 1 decides on whole clips.*site='input'.*frame by frame"):
        reduce_tokens(model, at(1, Late()))
    reduce_tokens(model_of("vivit"), at(1, Late()))
    for wrong, message in (
        (lambda: RLT(math.nan), r"RLT\(tau=nan\) must be a finite number"),
        (lambda: RLT(reference="first"), "choose one of previous, kept"),
        (lambda: RLT(proportional=1), "must be true or false"),
        (lambda: EVS(0.5), "EVS takes a budget"),
        (lambda: VidCom2(Ratio(0.5), temperature=0), "must be a number, above 0"),
        (lambda: VidCom2(Ratio(0.5), channels="most"), "is no number; give a share"),
        (lambda: VidCom2(Ratio(0.5), channels=1.5), r"must lie in \(0, 1\]"),
    ):
        with pytest.raises(ReducerError, match=message):
            wrong()  # type: ignore[no-untyped-call]


NO_ROOM = ("stvit_r",)  # whose unit of six blocks is more than there are
BEHIND = [name for name in reading("clips") if name in reading("images") and name not in (*NO_ROOM, "sttabt")]


@pytest.mark.parametrize("method", sampled(BEHIND, quick=("ats", "evit", "tome", "pitome", "random", "dpc_knn")))
@pytest.mark.parametrize("host", ["divided", "xvit", "vivit"])
def test_every_method_takes_frames_that_were_left_empty(host: str, method: str) -> None:
    """Behind one that leaves the first frame, the others with their class token alone."""
    model = model_of(host)
    known = {parameter.name for parameter in available()[method].settings()}
    behind = build({"name": method, **({"budget": {"ratio": 0.6}} if "budget" in known else {})})
    placement = at(0, EVS(Ratio(0.01))) | at([1, 2], behind)
    if method == "stvit" or (host == "divided" and method in NOT_DIVIDED):  # stvit pools all patches of a frame
        with pytest.raises(ReducerError, match=f"{method} "):
            reduced(host, placement, model).double()(inputs_of(host, model))
        return
    trace = alone_as_in_a_batch(reduced(host, placement, model).double(), inputs_of(host, model))
    patches = 4 if method == "small_input" else PATCHES
    assert (trace.kept(0).sum(1) == patches).all()


# --- rlt --------------------------------------------------------------------------------------------------------------


def slow_runs(clip: Tensor, deep: int, tau: float, reference: str) -> dict[int, int]:
    """Of one clip (F, C, H, W): number of each tubelet that stays -> how many steps it lasts."""
    frames, places = clip.tolist(), {}
    steps = len(frames) // deep
    for row in range(3):
        for column in range(3):
            starts = [0]
            for step in range(1, steps):
                with_ = starts[-1] if reference == "kept" else step - 1
                last, first = frames[(step + 1) * deep - 1], frames[with_ * deep]
                differences = [
                    abs(last[channel][y][x] - first[channel][y][x])
                    for channel in range(len(last))
                    for y in range(8 * row, 8 * row + 8)
                    for x in range(8 * column, 8 * column + 8)
                ]
                if sum(differences) / len(differences) > tau:
                    starts.append(step)
            for start, end in zip(starts, [*starts[1:], steps], strict=True):
                places[start * PATCHES + row * 3 + column] = end - start
    return places


@pytest.mark.parametrize("reference", ["previous", "kept"])
@every_host
@torch.no_grad()
def test_rlt_keeps_what_a_slow_reading_keeps_and_sizes_are_run_lengths(host: str, reference: Any) -> None:
    model, told = model_of(host), Told()
    clips = inputs_of(host, model)
    steps = clips.shape[1] // DEEP.get(host, 1)
    clips[1] = clips[1, :1] + 0.06 * torch.arange(clips.shape[1]).view(-1, 1, 1, 1)  # a slow drift
    trace = reduced(host, at(0, RLT(0.1, reference=reference)) | at(1, told), model).trace(clips)[1]
    for number, clip in enumerate(clips):
        expected = slow_runs(clip, DEEP.get(host, 1), 0.1, reference)
        assert told.told[number] == expected
        assert trace.kept(0)[number].nonzero().flatten().tolist() == sorted(expected)
        for place in range(PATCHES):
            assert sum(size for patch, size in told.told[number].items() if patch % PATCHES == place) == steps
    assert trace.kept(0)[0].sum() == PATCHES and trace.kept(0)[0, :PATCHES].all(), "a still clip: the first tubelets"
    drift = trace.kept(0)[1].sum()
    assert drift == PATCHES if reference == "previous" and host not in DEEP else drift > PATCHES
    assert trace.kept(0)[3].all()
    owner, kept = trace.owner(0), trace.kept(0)
    assert (owner >= 0).all(), "whoever is gone is carried by the tubelet that it repeats"
    for number in range(len(clips)):
        for patch in range(PATCHES, steps * PATCHES):
            if not kept[number, patch]:
                assert owner[number, patch] == owner[number, patch - PATCHES]


@every_host
@torch.no_grad()
def test_what_rlt_leaves_is_what_keeping_the_same_patches_before_the_first_block_leaves(host: str) -> None:
    """In every respect: logits, tokens, costs. And a mask on the others hides them as well as their being gone."""
    model = model_of(host)
    clips = inputs_of(host, model)
    found, trace = reduced(host, at(0, RLT(0.5)), model).trace(clips)
    kept = trace.kept(0)
    assert len(set(kept.sum(1).tolist())) > 2
    expected, other = reduced(host, at(0, Given(kept)), model).trace(clips)
    if host == "videomae":  # its head reads the mean of patches, and runs weigh what they stand for
        return
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.equal(trace.tokens[:, 1:], other.tokens[:, 1:]) and torch.equal(trace.tokens[:, 0], other.tokens[:, 1])
    assert torch.equal(trace.macs, other.macs) and torch.equal(trace.reference_macs, other.reference_macs)
    assert not trace.reducer_macs.any()
    masked = logits_of(reduced(host, at(0, Given(kept, mask=True)), model), clips)
    # a soft mask hides others less than well from a class token with no patch or one, as in the still clip
    steps = clips.shape[1] // DEEP.get(host, 1)
    in_frames = kept.unflatten(1, (steps, PATCHES)).sum(2)
    with_company = (in_frames > 1).all(1) if host in UNITS else torch.arange(len(clips)) > 0
    masked, left = (each.unflatten(0, (len(clips), -1))[with_company] for each in (masked, found))
    assert len(left) >= 1
    torch.testing.assert_close(masked, left, rtol=0, atol=1e-3)
    assert (found - logits_of(model, clips)).abs().max() > 0.1


@pytest.mark.parametrize("name", [VIVIT, VIDEOMAE])
@torch.no_grad()
def test_what_rlt_leaves_passes_the_librarys_own_layers(name: str) -> None:
    model = make_clips(name)
    host = "vivit" if name == VIVIT else "videomae"
    clips = inputs_of(host, model)
    fast = reduced(host, at(0, RLT(0.5)), model)
    found, trace = fast.trace(clips)
    for number, kept in enumerate(trace.kept(0)):
        x = fast.host.embed(clips[number : number + 1]).x[None]
        x = x[:, torch.cat([torch.arange(fast.host.prefix), kept.nonzero().flatten() + fast.host.prefix])]
        for layer in fast.host.layers:  # type: ignore[attr-defined]
            x = layer(x)
        x = fast.host.token_features(x)
        runs = torch.tensor([*slow_runs(clips[number], 2, 0.5, "previous").items()], dtype=torch.float64)
        runs = runs[runs[:, 0].argsort(), 1]
        mean = (x[:, fast.host.prefix :] * runs[:, None]).sum(1) / runs.sum()
        expected = model.classifier(model.fc_norm(mean) if name == VIDEOMAE else x[:, 0])
        torch.testing.assert_close(found[number : number + 1], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_attention_to_a_run_may_be_weighted_by_its_length() -> None:
    model, told = make_clips(VIVIT, num_hidden_layers=2), Told()
    clips = inputs_of("vivit", model)
    fast = reduced("vivit", at(0, RLT(0.5, proportional=True)) | at(1, told), model)
    found, trace = fast.trace(clips)
    plain = reduced("vivit", at(0, RLT(0.5)), model)
    assert (found[:3] - logits_of(plain, clips)[:3]).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(found[3], logits_of(plain, clips)[3], rtol=0, atol=1e-10)
    for number, kept in enumerate(trace.kept(0)):
        whole = fast.host.embed(clips[number : number + 1])
        x = whole.x[torch.cat([torch.zeros(1, dtype=torch.long), kept.nonzero().flatten() + 1])]
        size = torch.tensor([1.0, *told.told[number].values()], dtype=torch.float64)
        for index in range(2):
            block: Any = fast.host.block(index)
            batch = type(whole).from_images(x[None], prefix=1, has_class_token=True, track=False)
            core = block.core(batch)
            q, k, v = (part.transpose(0, 1) for part in core.project(core.x, 0, 3))
            weights = (q @ k.transpose(1, 2) * core.scale + size.log()).softmax(-1)
            added = core.out((weights @ v).transpose(0, 1).flatten(1), None)
            x = block.after_mlp(x + added, batch.layout)
        expected = model.classifier(fast.host.token_features(x)[:1])
        torch.testing.assert_close(found[number : number + 1], expected, rtol=0, atol=1e-6)


def test_one_number_says_what_each_threshold_leaves() -> None:
    clips = inputs_of("videomae", model_of("videomae"))
    found = changes(clips, (2, 8, 8))
    assert found.shape == (4, 3, PATCHES) and found[:, 0].isinf().all() and not found[0, 1:].any()
    for tau in (-1.0, 0.0, 0.3, 1.2):
        assert torch.equal(found > tau, kept_tubelets(clips, (2, 8, 8), tau, "previous"))
    assert found[3, 1:].min() > 0.5
    uneven = F.pad(clips, (0, 5, 0, 3, 0, 0, 0, 1))  # what is no whole patch is not looked at
    assert torch.equal(changes(uneven, (2, 8, 8)), found)


@torch.no_grad()
def test_a_clip_that_rlt_thinned_is_restored_by_the_tubelets_that_carry_it() -> None:
    model = make_clips("VideoMAEModel")
    clips = inputs_of("videomae", model)
    fast = reduce_tokens(model, at(0, RLT(0.5)))
    found, owner = fast(clips).last_hidden_state, fast.trace(clips)[1].owner(DEPTH - 1)
    assert found.shape == (4, 3 * PATCHES, 32) and torch.equal(found[0, :PATCHES], found[0, PATCHES : 2 * PATCHES])
    for number in range(4):
        for token in set(owner[number].tolist()):
            alike = found[number][owner[number] == token]
            assert torch.equal(alike, alike[:1].expand_as(alike))


# --- evs and vidcom2 --------------------------------------------------------------------------------------------------


def tokens_of(fast: ReducedViT, clips: Tensor) -> list[dict[int, Tensor]]:
    """What block 0 is given: of each clip number of a patch -> features."""
    batch = fast.host.embed(clips)
    rows = batch.lattice()
    return [{patch: batch.x[row] for patch, row in enumerate(clip.tolist())} for clip in rows]


def slow_evs(tokens: dict[int, Tensor], count: int) -> set[int]:
    scores = {}
    for patch, x in tokens.items():
        earlier = [other for other in tokens if other % PATCHES == patch % PATCHES and other < patch]
        if not earlier:
            scores[patch] = 255.0
            continue
        y = tokens[max(earlier)]
        norms = math.sqrt(sum(v * v for v in x.tolist()) * sum(v * v for v in y.tolist()))  # 1 of equal ones
        scores[patch] = 1 - sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)) / norms
    ordered = sorted(scores, key=lambda patch: (-scores[patch], patch))
    return set(ordered[: max(count, PATCHES)])


def slow_vidcom2(tokens: dict[int, Tensor], count: int, temperature: float = 0.01, share: float = 0.5) -> set[int]:
    numbers = sorted(tokens)
    width = len(tokens[numbers[0]])
    rows = [tokens[number].tolist() for number in numbers]

    def mean(vectors: list[list[float]]) -> list[float]:
        return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]

    centre = mean(rows)
    spread = [sum((row[c] - centre[c]) ** 2 for row in rows) / len(rows) for c in range(width)]
    channels = sorted(range(width), key=lambda c: (spread[c], c))[: int(width * share)]
    units = {}
    for number, row in zip(numbers, rows, strict=True):
        cut = [row[c] for c in channels]
        length = math.sqrt(sum(v * v for v in cut))
        units[number] = [v / length for v in cut]

    def near(u: list[float], c: list[float]) -> float:
        squared = sum((a - b) ** 2 for a, b in zip(u, c, strict=True))
        return sum(math.exp(-squared / (2 * alpha)) for alpha in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    video_centre = mean(list(units.values()))
    frames: dict[int, list[int]] = {}
    for number in numbers:
        frames.setdefault(number // PATCHES, []).append(number)
    video = {number: near(units[number], video_centre) for number in numbers}
    centres = {frame: mean([units[n] for n in mine]) for frame, mine in frames.items()}
    score = {n: video[n] + near(units[n], centres[n // PATCHES]) for n in numbers}
    logits = {frame: -sum(video[n] for n in mine) / len(mine) / temperature for frame, mine in frames.items()}
    top = max(logits.values())
    total = sum(math.exp(value - top) for value in logits.values())
    rho, within = count / len(numbers), set()
    for frame, mine in frames.items():
        scale = min(1.0, rho * (1 + math.exp(logits[frame] - top) / total - 1 / len(frames)))
        quota = min(max(math.floor(scale * len(mine) + 0.5), 1), len(mine))
        within |= set(sorted(mine, key=lambda n: (score[n], n))[:quota])
    return set(sorted(numbers, key=lambda n: (n not in within, score[n], n))[:count])


@every_host
@torch.no_grad()
def test_evs_and_vidcom2_keep_what_a_slow_reading_keeps(host: str) -> None:
    model = model_of(host)
    clips = inputs_of(host, model)
    total = clips.shape[1] // DEEP.get(host, 1) * PATCHES
    for share in (0.1, 0.35, 0.61, 0.9):
        fast = reduced(host, at(0, EVS(Ratio(share))), model)
        trace = fast.trace(clips)[1]
        tokens = tokens_of(fast, clips)
        count = int(total * share + 1e-9)
        for number, mine in enumerate(tokens):
            assert set(trace.kept(0)[number].nonzero().flatten().tolist()) == slow_evs(mine, count)
        assert (trace.kept(0).sum(1) == max(count, PATCHES)).all() and trace.kept(0)[:, :PATCHES].all()
        assert (trace.reducer_macs == total * fast.host.width).all()
        fast = reduced(host, at(0, VidCom2(Ratio(share))), model)
        trace = fast.trace(clips)[1]
        count = math.floor(total * share + 0.5)
        for number, mine in enumerate(tokens):
            assert set(trace.kept(0)[number].nonzero().flatten().tolist()) == slow_vidcom2(mine, count)
        assert (trace.kept(0).sum(1) == count).all()
        assert (trace.reducer_macs == total * 2 * fast.host.width).all()


@some_hosts
@torch.no_grad()
def test_behind_another_reducer_they_go_by_the_places_that_are_left(host: str) -> None:
    model = model_of(host)
    clips = inputs_of(host, model)
    shape = (len(clips), clips.shape[1] // DEEP.get(host, 1) * PATCHES)
    left = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.7
    left[1, 2 * PATCHES : 3 * PATCHES] = False  # a frame of which nothing is left
    for reducer, slow in (
        (EVS(Ratio(0.7)), lambda mine: slow_evs(mine, int(len(mine) * 7 / 10))),
        (VidCom2(Ratio(0.5)), lambda mine: slow_vidcom2(mine, (len(mine) + 1) // 2)),
        (VidCom2(Ratio(0.5), temperature=0.2, channels=1),
         lambda mine: slow_vidcom2(mine, (len(mine) + 1) // 2, 0.2, 1.0)),
    ):  # fmt: skip
        fast = reduced(host, at(0, Stack(Given(left), reducer)), model)
        trace = alone_as_in_a_batch(fast, clips[:1])  # of one clip the runtime shares nothing among images
        trace = fast.trace(clips)[1]
        for number, mine in enumerate(tokens_of(fast, clips)):
            rest = {patch: x for patch, x in mine.items() if left[number, patch]}
            assert set(trace.kept(0)[number].nonzero().flatten().tolist()) == slow(rest)


@torch.no_grad()
def test_in_a_divided_model_they_decide_on_the_clip_whatever_else_is_decided_on_frames() -> None:
    model = model_of("divided")
    clips = inputs_of("divided", model)
    for reducer in (EVS(Ratio(0.4)), VidCom2(Count(17)), EVS(Ratio(0.5, of="initial"))):
        (one, first), (other, second) = (
            reduced(host, at(1, reducer), model).trace(clips) for host in ("divided", "divided over clip")
        )
        assert torch.equal(one, other) and torch.equal(first.kept(1), second.kept(1))
        assert len(set(first.kept(1).view(4, 5, PATCHES).sum(2).flatten().tolist())) > 1
    stacked = reduced("divided", at(1, Stack(EVS(Ratio(0.8)), TopK(Count(3)))), model)
    trace = alone_as_in_a_batch(stacked, clips)
    frames = trace.kept(1).view(4, 5, PATCHES).sum(2)
    assert (frames <= 3).all() and (frames[:, 0] == 3).all(), "a budget of the next one is of each frame"


@torch.no_grad()
def test_one_frame_is_kept_whole_by_evs_and_thinned_evenly_by_vidcom2() -> None:
    model = make_xvit("one frame")
    clips = clips_for(model, 3)
    torch.testing.assert_close(reduce_tokens(model, at(0, EVS(Ratio(0.2))))(clips), model(clips), rtol=0, atol=1e-10)
    fast = reduce_tokens(model, at(0, VidCom2(Ratio(0.5))))
    for number, mine in enumerate(tokens_of(fast, clips)):
        kept = fast.trace(clips)[1].kept(0)[number].nonzero().flatten().tolist()
        assert set(kept) == slow_vidcom2(mine, 5)


@torch.no_grad()
def test_the_first_frame_alone_is_left_by_the_smallest_share() -> None:
    for host in HOSTS:
        model = model_of(host)
        trace = reduced(host, at(0, EVS(Ratio(0.001))), model).trace(inputs_of(host, model))[1]
        assert trace.kept(DEPTH - 1)[:, :PATCHES].all() and (trace.kept(DEPTH - 1).sum(1) == PATCHES).all()


# --- rows in any order ------------------------------------------------------------------------------------------------


class Turned(TokenReducer):
    """Keeps every patch but the first, the last ones first."""

    name = "turned"

    def __init__(self, *, turn: bool = True) -> None:
        super().__init__()
        self.turn = turn

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        kept = keep_rows(layout, layout.is_prefix | (layout.row_index > layout.prefix[layout.row_image]))
        if not self.turn:
            return Decision(kept)
        new = kept.new
        patches = new.row_index - new.prefix[new.row_image]
        place = torch.where(new.is_prefix, new.row_index, new.lengths[new.row_image] - 1 - patches)
        return Decision(Keep(layout, new, kept.rows[new.starts[new.row_image] + place]))


@torch.no_grad()
def test_rows_may_be_kept_in_any_order() -> None:
    """Prefix tokens first; the model asks for no order, and the trace tells the same patches."""
    cases: list[tuple[Any, Tensor, dict[str, str]]] = [
        (make_vit().double(), torch.randn(3, 3, 48, 48, dtype=torch.float64), {}),
        *((model_of(host), inputs_of(host, model_of(host)), HOSTS[host][1]) for host in HOSTS if host != "space only"),
    ]
    for model, inputs, options in cases:
        (_, first), (_, second) = (
            reduce_tokens(model, at([0, 2], Turned(turn=turn)), host=options).trace(inputs) for turn in (True, False)
        )
        assert torch.equal(first.tokens, second.tokens) and torch.equal(first.macs, second.macs)
        assert (first.kept(0) == second.kept(0)).all(), "at block 0 the same ones go"
        assert first.kept(3).sum() == second.kept(3).sum()
        once = [
            reduce_tokens(model, at(1, Turned(turn=turn)), host=options).trace(inputs) for turn in (True, False)
        ]  # fmt: skip
        torch.testing.assert_close(once[0][0], once[1][0], rtol=0, atol=1e-9)
        assert torch.equal(once[0][1].kept(3), once[1][1].kept(3))


# --- controls ---------------------------------------------------------------------------------------------------------


def test_steps_are_spread_as_nearest_neighbours_are() -> None:
    assert spread_steps(8, 4) == [0, 2, 4, 6] and spread_steps(5, 3) == [0, 1, 3] and spread_steps(6, 6) == [*range(6)]
    for steps in range(1, 33):
        for kept in range(1, steps + 1):
            chosen = spread_steps(steps, kept)
            assert chosen[0] == 0 and len(set(chosen)) == kept and max(chosen) < steps


@cache
def twin(host: str, frames: int) -> tuple[Any, Any, list[int]]:
    """A model, the same weights as a model of fewer frames, and which frames that one is to be shown."""
    model = model_of(host)
    deep, made_for = DEEP.get(host, 1), model.num_frames if host.startswith("xvit") else model.config.num_frames
    stays = spread_steps(made_for // deep, frames // deep)
    if host.startswith("xvit"):
        groups = made_for // model.group
        small = model_of(host, num_frames=frames, group=frames // groups)
        times = [step % model.group for step in stays[: frames // groups]]
        table = {"time_embed": model.time_embed[:, times]}
        assert [step % model.group for step in stays] == times * groups or groups == 1
    else:
        small, table = model_of(host, num_frames=frames), {}
        if host in DEEP:
            name = "vivit.embeddings.position_embeddings"
            if host == "vivit":
                lead, rest = model.state_dict()[name].split([1, made_for // deep * PATCHES], dim=1)
                rest = rest.unflatten(1, (-1, PATCHES))[:, stays].flatten(1, 2)
                table = {name: torch.cat([lead, rest], dim=1)}
        elif host != "space only":
            name = "timesformer.embeddings.time_embeddings"
            table = {name: model.state_dict()[name][:, stays]}
    small.load_state_dict({**model.state_dict(), **table})
    if host == "videomae":  # fixed, and kept beside the weights
        full = model.videomae.embeddings.position_embeddings
        small.videomae.embeddings.position_embeddings = full.unflatten(1, (-1, PATCHES))[:, stays].flatten(1, 2)
    return model, small, [step * deep + frame for step in stays for frame in range(deep)]


SHORTER = {"vivit": 4, "videomae": 4, "xvit in groups": 2}  # of 6 frames, of 4 in two groups; the others: 3 of 5


@every_host
@torch.no_grad()
def test_fewer_frames_is_the_model_made_for_fewer(host: str) -> None:
    frames = SHORTER.get(host, 3)
    model, small, chosen = twin(host, frames)
    clips = inputs_of(host, model)
    share = frames / clips.shape[1]
    fast = reduced(host, at(0, FewerFrames(Ratio(str(share)[:6]))), model)
    expected, dense = reduced(host, Placement(), small).trace(clips[:, chosen])
    torch.testing.assert_close(expected, logits_of(small, clips[:, chosen]), rtol=0, atol=1e-9)
    found, trace = fast.trace(clips)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits_of(fast, clips), expected, rtol=0, atol=1e-9)
    assert torch.equal(trace.macs, dense.macs) and torch.equal(trace.tokens, dense.tokens)
    deep = DEEP.get(host, 1)
    steps = [frame // deep for frame in chosen[::deep]]
    kept = trace.kept(DEPTH - 1).view(4, -1, PATCHES)
    assert [step for step in range(kept.shape[1]) if kept[:, step].all()] == steps and kept.any(2).sum(1).eq(
        len(steps)
    ).all()  # fmt: skip
    owner = trace.owner(0).view(4, -1, PATCHES)
    for step in range(kept.shape[1]):
        before = max(each for each in steps if each <= step)
        assert torch.equal(owner[:, step], owner[:, before]), "who is left out is carried by the one before"


def behind_control(control: TokenReducer) -> Iterator[TokenReducer]:
    yield from (TopK(Ratio(0.6), score="attention_received"), EVS(Ratio(0.5)), VidCom2(Ratio(0.5)), ToMe(Ratio(0.7)))
    if not isinstance(control, FewerFrames):
        yield RandomDrop(Ratio(0.5))


@some_hosts
@torch.no_grad()
def test_behind_fewer_frames_methods_decide_as_in_the_model_made_for_fewer(host: str) -> None:
    frames = SHORTER.get(host, 3)
    model, small, chosen = twin(host, frames)
    clips = inputs_of(host, model)[1:]
    control = FewerFrames(Ratio(str(frames / clips.shape[1])[:6]))
    deep = DEEP.get(host, 1)
    for reducer in behind_control(control):
        found, trace = reduced(host, at(0, control) | at(1, reducer), model).trace(clips)
        expected, other = reduced(host, at(1, reducer), small).trace(clips[:, chosen])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert torch.equal(trace.tokens, other.tokens)
        steps = [frame // deep for frame in chosen[::deep]]
        theirs = other.kept(3).view(3, -1, PATCHES)
        assert torch.equal(trace.kept(3).view(3, -1, PATCHES)[:, steps], theirs)
    found = logits_of(reduced(host, at(0, control) | at(1, RLT(0.5)), model), clips)
    torch.testing.assert_close(
        found, logits_of(reduced(host, at(1, RLT(0.5)), small), clips[:, chosen]), rtol=0, atol=1e-9
    )


def resized_twin(host: str, side: int = 2) -> Any:
    """The same weights as a model of frames of 2 x 2 patches, or as many as ``side`` says."""
    model = model_of(host)
    if host.startswith("xvit"):
        small = model_of(host, img_size=8 * side)
        table = {"pos_embed": resample_abs_pos_embed(model.pos_embed, [side, side], num_prefix_tokens=1)}
    else:
        small = model_of(host, image_size=8 * side)
        name = f"{'vivit' if host == 'vivit' else 'timesformer'}.embeddings.position_embeddings"
        lead, rest = model.state_dict()[name][:, :1], model.state_dict()[name][:, 1:]
        grid = rest.view(-1, 3, 3, rest.shape[-1]).permute(0, 3, 1, 2)
        how: dict[str, Any] = {"mode": "bicubic", "antialias": True} if host == "vivit" else {"mode": "nearest"}
        grid = F.interpolate(grid, (side, side), **how)
        table = {name: torch.cat([lead, grid.permute(0, 2, 3, 1).reshape(1, -1, rest.shape[-1])], dim=1)}
    small.load_state_dict({**model.state_dict(), **table})
    return small


@pytest.mark.parametrize(
    "host", sampled([host for host in HOSTS if host != "videomae"], quick=("vivit", "divided", "xvit"))
)
@torch.no_grad()
def test_a_smaller_image_is_the_model_made_for_smaller_frames(host: str) -> None:
    model, small = model_of(host), resized_twin(host)
    clips = inputs_of(host, model)
    smaller = F.interpolate(clips.flatten(0, 1), (16, 16), mode="bicubic", antialias=True)
    smaller = smaller.unflatten(0, clips.shape[:2])
    fast = reduced(host, at(0, SmallInput(Ratio("4/9"))), model)
    expected, dense = reduced(host, Placement(), small).trace(smaller)
    torch.testing.assert_close(expected, logits_of(small, smaller), rtol=0, atol=1e-9)
    found, trace = fast.trace(clips)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits_of(fast, clips), expected, rtol=0, atol=1e-9)
    assert torch.equal(trace.macs, dense.macs) and torch.equal(trace.tokens, dense.tokens)
    steps = clips.shape[1] // DEEP.get(host, 1)
    assert (trace.kept(0).view(-1, steps, PATCHES).sum(2) == 4).all()
    owner = trace.owner(0)
    assert all(len(set(each.tolist())) == 4 for clip in owner.view(4, steps, PATCHES) for each in clip)
    clips, smaller = clips[1:], smaller[1:]  # in the still one, how much changed is a matter of the last digits
    both = reduced(host, at(0, SmallInput(Ratio("4/9"))) | at(1, EVS(Ratio(0.6))), model)
    torch.testing.assert_close(
        logits_of(both, clips), logits_of(reduced(host, at(1, EVS(Ratio(0.6))), small), smaller), rtol=0, atol=1e-9
    )
    alone_as_in_a_batch(both, clips)
    shrunk = reduced(host, at(0, SmallInput(Ratio("4/9"))) | at(1, FewerFrames(Ratio(0.5))), model)
    alone_as_in_a_batch(shrunk, clips)


@pytest.mark.parametrize("host", sampled([host for host in HOSTS if host != "videomae"], quick=("divided",)))
@torch.no_grad()
def test_the_smallest_image_is_one_patch(host: str) -> None:
    model, small = model_of(host), resized_twin(host, side=1)
    clips = inputs_of(host, model)
    smaller = F.interpolate(clips.flatten(0, 1), (8, 8), mode="bicubic", antialias=True).unflatten(0, clips.shape[:2])
    found, trace = reduced(host, at(0, SmallInput(Ratio("1/9"))), model).trace(clips)
    torch.testing.assert_close(found, logits_of(small, smaller), rtol=0, atol=1e-9)
    assert torch.equal(trace.macs, reduced(host, Placement(), small).trace(smaller)[1].macs)


@torch.no_grad()
def test_a_model_that_cannot_be_shown_another_size_says_so() -> None:
    model = model_of("videomae")
    with pytest.raises(ReducerError, match="cannot be resized for VideoMAEForVideoClassification, whose positions are"):
        reduced("videomae", at(0, SmallInput(Ratio(0.5))), model)(inputs_of("videomae", model))
    for reducer in (SmallInput(Ratio(0.5)), FewerFrames(Ratio(0.5))):
        for host in ("xvit", "divided", "vivit"):
            with pytest.raises(ReducerError, match="clips .*4"):
                reduced(host, at(0, reducer), model_of(host))(inputs_of(host, model_of(host))[:, :4])


@torch.no_grad()
def test_last_hidden_state_of_a_shortened_clip_tells_of_all_its_frames() -> None:
    for name in ("TimesformerModel", "TimesformerModel joint_space_time", "TimesformerModel space_only", "VivitModel"):
        model = make_clips(name)
        clips = make_inputs(model)
        expected = model(clips).last_hidden_state
        found = reduce_tokens(model, at(0, FewerFrames(Ratio(0.6))))(clips).last_hidden_state
        assert found.shape == expected.shape and found.isfinite().all()
        if name == "TimesformerModel":  # five frames of which 0, 1 and 3 stay, all of a place side by side
            by_place = found[:, 1:].unflatten(1, (PATCHES, 5))
            assert torch.equal(by_place[:, :, 1], by_place[:, :, 2]) and torch.equal(
                by_place[:, :, 3], by_place[:, :, 4]
            )
            assert not torch.equal(by_place[:, :, 0], by_place[:, :, 1])


@torch.no_grad()
def test_whoever_decides_on_frames_goes_on_after_a_class_token_is_lost() -> None:
    """An X-ViT's frames have class tokens of their own, which a method may drop."""
    model = make_xvit()
    clips = clips_for(model)
    dropping = ATS(Ratio(0.5), score="value_norm", keep_class_token=False)
    trace = alone_as_in_a_batch(reduce_tokens(model, at(1, dropping) | at(2, EVS(Ratio(0.5)))), clips)
    assert (trace.kept(2).sum(1) < trace.kept(1).sum(1)).all()
