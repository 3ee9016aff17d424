"""STViT-R and STViT on Swin, driven: what a host gives is what the module gives; reducers act in Swin's own stages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from reducers import (
    ATS,
    Count,
    Decision,
    Identity,
    Placement,
    RandomDrop,
    Ratio,
    ReducerError,
    State,
    TokenReducer,
    ToMe,
    TopK,
    UnsupportedModel,
    at,
    reduce_tokens,
)
from reducers.backbones.stvit_r import Semantics, STViTRSwin, stvit_r_swin_toy
from reducers.backbones.stvit_swin import STViTSwin, semantics_of, stvit_swin_base, stvit_swin_small, stvit_swin_tiny
from reducers.hosts import host_of
from reducers.maps import Mask, keep_patches
from reducers.methods import STViT
from reducers.signals import Signals

from .test_stvit_r_backbone import shaken, slow_attention, slow_mlp, slow_pool, squares

SIZES: dict[str, Any] = {
    "image_size": 64, "patch": 2, "channels": 1, "classes": 5, "width": 8, "heads": (1, 2, 4, 4), "window": 4,
}  # fmt: skip
HALF = Semantics(side=2, keys=6, stride=2)
UNITS = {"depths": (2, 2, 12, 2), "semantics": HALF}  # two units, and a stage behind them


def toy() -> Any:
    return shaken(stvit_r_swin_toy(width=8))


def units(**changes: Any) -> Any:
    return shaken(STViTRSwin(**{**SIZES, **UNITS, **changes}))


def stvit(base: int = 1, **changes: Any) -> Any:
    return shaken(STViTSwin(**{"base": base, "depths": (2, 2, 6, 2), "semantics": HALF, **SIZES, **changes}))


def uneven() -> Any:
    """Windows of 7 in which bins of 4 x 4 overlap, without a stage behind them."""
    return stvit(2, image_size=112, window=7, semantics=None, depths=(1, 1, 6), heads=(1, 2, 4))


MODELS = {
    "toy": toy, "units": units, "units with centres": lambda: units(semantics=Semantics(2, 6, 2, True, True)),
    "stvit": stvit, "stvit with two base blocks": lambda: stvit(2), "uneven": uneven,
}  # fmt: skip


def scenes(model: Any, count: int = 3) -> Tensor:
    shape = count, model.channels, model.image_size, model.image_size
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MADE = {"tiny": stvit_swin_tiny, "small": stvit_swin_small, "base": stvit_swin_base}


class Chosen(TokenReducer):
    """Drops every other patch by its place; in training it masks what inference drops."""

    name = "chosen"

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, place = signals.layout, signals.positions() + state.block
        stays = place % 2 > 0  # of each window; nobody else's tokens decide
        if state.training:
            return Decision(Mask.of(layout, stays.double()))
        return Decision(keep_patches(layout, layout.pad(stays)))


# --- without reduction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_without_reduction_a_driven_model_is_the_module_and_costs_what_it_counts(name: str) -> None:
    model = MODELS[name]()
    images, host = scenes(model), host_of(model)
    expected = model(images)
    assert expected.abs().max() > 0.1
    free = [block for block in range(host.depth) if block not in host.closed]
    for placement in (Placement(), at(free, Identity())):
        found, trace = reduce_tokens(model, placement).trace(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert trace.macs.tolist() == [model.macs()] * 3 and trace.reducer_macs.tolist() == [0] * 3
    torch.testing.assert_close(reduce_tokens(model, Placement())(images[:1]), expected[:1], rtol=0, atol=1e-9)
    assert host.classes == expected.shape[1] and host.channels == 1


@torch.no_grad()
def test_the_trace_tells_how_many_tokens_every_block_of_a_unit_has() -> None:
    model = units()
    trace = reduce_tokens(model, Placement()).trace(scenes(model, 2))[1]
    unit = [64, 16, 16, 16, 16, 64]
    assert trace.tokens.tolist() == [[1024, 1024, 1024, 256, 256, *unit, *unit, 16, 16]] * 2
    bins = torch.arange(8)[:, None] // 2 * 4 + torch.arange(8) // 2  # of 8 x 8 places, the semantic token of each
    first = bins.repeat_interleave(4, 0).repeat_interleave(4, 1).flatten()  # told of the 32 x 32 of the first stage
    inside, behind = trace.owner(6), trace.owner(9)
    assert inside.tolist() == [first.tolist()] * 2 and not trace.kept(6).any()
    assert behind.unique().tolist() == list(range(64)) and trace.kept(9).all()


@torch.no_grad()
def test_of_stvit_the_semantic_tokens_are_merged_and_stay() -> None:
    model = stvit(2)
    trace = reduce_tokens(model, Placement()).trace(scenes(model, 2))[1]
    assert trace.tokens.tolist() == [[1024] * 3 + [256] * 2 + [64, 64, 16, 16, 16, 16, 4, 4]] * 2
    quarter = torch.arange(32)[:, None] // 16 * 2 + torch.arange(32) // 16
    assert trace.owner(11).tolist() == [quarter.flatten().tolist()] * 2


def test_gradients_are_those_of_the_module() -> None:
    model = units()
    other = copy.deepcopy(model)
    images = scenes(model, 2)
    model(images).square().sum().backward()
    reduce_tokens(other, Placement())(images).square().sum().backward()
    for (name, own), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, own.grad, msg=name)


# --- reducers in Swin's own stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["units", "stvit"])
@torch.no_grad()
def test_reducers_act_in_windows_of_swins_stages_and_save_what_they_save_in_a_swin(name: str) -> None:
    model = MODELS[name]()
    swin = SwinTransformer(
        64, 2, 1, 5, embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=4, drop_path_rate=0.0
    ).double().eval()  # fmt: skip
    images = scenes(model, 2)
    for placement in (at([0, 1], Chosen()), at(1, Chosen()) | at([2, 3], Chosen())):
        fast, known = reduce_tokens(model, placement), reduce_tokens(swin, placement)
        found, trace = fast.trace(images)
        saved = known.cost(images) - reduce_tokens(swin, Placement()).cost(images)
        assert (trace.macs - model.macs()).tolist() == saved.tolist() and saved.max() < 0
        for image in range(2):  # alone as in a batch
            alone = fast(images[image : image + 1])
            torch.testing.assert_close(alone, found[image : image + 1], rtol=0, atol=1e-9)
    for reducer in (
        ToMe(Ratio(0.5)),
        TopK(Ratio(0.5), score="attention_received"),
        RandomDrop(Count(6)),
        ATS(Count(8), score="attention_received"),
    ):
        assert reduce_tokens(model, at([1, 3], reducer)).trace(images)[1].macs.max() < model.macs()


@pytest.mark.parametrize("fill", ["last", "zero"])
@torch.no_grad()
def test_a_unit_works_on_the_whole_map_with_features_in_every_place(fill: str) -> None:
    """The rest of the network computes what it computes of the map that is put together for it."""
    model = units()
    images, seen = scenes(model), []
    handle = model.layers[2].downsample.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = reduce_tokens(model, at(3, Chosen()), host={"fill": fill})(images)
    handle.remove()
    x = model.layers[2](seen[0])
    torch.testing.assert_close(found, model.head(model.norm(model.layers[3](x)).mean((1, 2))), rtol=0, atol=1e-9)
    empty = int((seen[0].flatten(0, 2).abs().sum(1) == 0).sum())
    assert empty == (3 * 128 if fill == "zero" else 0)


def test_a_masked_pass_is_the_gathered_pass_in_the_last_stage() -> None:
    model = units()
    images = scenes(model)
    fast = reduce_tokens(model, at([22 - 6, 23 - 6], Chosen()))
    gathered = fast(images)
    for module in model.modules():
        module.training = isinstance(module, STViTRSwin)  # batch norm stays as it is
    torch.testing.assert_close(fast(images), gathered, rtol=0, atol=1e-9)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_closed_blocks_are_refused_by_name() -> None:
    model = units()
    for block in range(4, 16):
        with pytest.raises(
            ReducerError, match=rf"topk at block {block}: semantic tokens are made .* 0, 1, 2, 3, 16, 17"
        ):
            reduce_tokens(model, at(block, TopK(Ratio(0.5), score="attention_received")))
    with pytest.raises(ReducerError, match="every block of this STViTRSwin"):
        reduce_tokens(model, at([2, 3], STViT()))
    with pytest.raises(ReducerError, match="needs a class token and this model has none"):
        reduce_tokens(model, at(3, TopK(Ratio(0.5))))
    with pytest.raises(ReducerError, match=r"topk at block 11: .* blocks 0, 1, 2, 3$"):
        reduce_tokens(stvit(), at(11, TopK(Ratio(0.5), score="attention_received")))


def test_who_cannot_be_driven_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="gives the maps of its stages and no logits"):
        reduce_tokens(STViTRSwin(**SIZES, depths=(1, 1, 6, 1), form="detection"), Placement())
    model = toy()
    fast = reduce_tokens(model, Placement())
    images = scenes(model)
    with pytest.raises(ReducerError, match=r"images of 32 x 64 and a model for 64 x 64"):
        fast(images[:, :, :32])
    unit = model.layers[2].units[0]
    handle = unit.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModel, match="a unit of stage 2 has a forward hook"):
        fast(images)
    handle.remove()
    handle = unit.blocks[3].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModel, match="block 7 has a forward hook"):
        fast(images)
    handle.remove()
    unit.generate = lambda block, x: x
    with pytest.raises(UnsupportedModel, match="the generate of what holds block 4 was replaced"):
        fast(images)
    del unit.generate
    unit.blocks[1].mlp = nn.Identity()
    with pytest.raises(UnsupportedModel, match="block 5 has its mlp replaced by a Identity"):
        fast(images)


# --- STViT on Swin ----------------------------------------------------------------------------------------------------


def swin(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "img_size": 64, "patch_size": 2, "in_chans": 1, "num_classes": 5, "embed_dim": 8, "depths": (2, 2, 6, 2),
        "num_heads": (1, 2, 4, 8), "window_size": 4, "drop_path_rate": 0.0,
    }  # fmt: skip
    return shaken(SwinTransformer(**{**sizes, **changes}))


def slow_stage(stage: Any, x: Tensor) -> Tensor:
    """The third stage of STViT on one map (H, W, D), token by token; windows and bins of even sides."""
    x = image = stage.downsample(x[None])[0]
    side, width = stage.semantics.side, x.shape[2]
    for index, block in enumerate(stage.blocks):
        if index < stage.steps.index("generate"):
            x = image = block(image[None])[0]
            continue
        asking = x if index > stage.steps.index("generate") else slow_pool(image, side)
        semantic = torch.zeros_like(asking)
        behind = index - stage.steps.index("generate")
        for top, left in squares(*asking.shape[:2], side if behind == 0 or (behind > 1 and index % 2) else 99):
            rows = slice(top, top + side), slice(left, left + side)
            if behind and not (behind > 1 and index % 2):
                rows = slice(None), slice(None)
            own = asked = asking[rows].reshape(-1, width)
            if behind == 0:
                a, b = top // side * stage.semantics.stride, left // side * stage.semantics.stride
                part = image[a : a + stage.semantics.keys, b : b + stage.semantics.keys].reshape(-1, width)
                asked = torch.cat([own, part])
            elif behind == 1:
                asked = torch.cat([own, image.reshape(-1, width)])
            semantic[rows] = slow_attention(block, own, asked).view(semantic[rows].shape)
        x = slow_mlp(block, semantic if behind == 0 and not stage.semantics.residual else asking + semantic)
    return x


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_stvit_equals_a_slow_reference(residual: bool) -> None:
    for base in (1, 2):
        model = stvit(base, semantics=Semantics(2, 6, 2, residual), heads=(1, 2, 2, 4))
        images = scenes(model, 2)
        x = model.layers[1](model.layers[0](model.stem(images)))
        expected = torch.stack([slow_stage(model.layers[2], each) for each in x])
        torch.testing.assert_close(model.layers[2](x), expected, rtol=0, atol=1e-10)
        x = model.layers[3].downsample(expected)
        for block in model.layers[3].blocks:
            x = slow_mlp_all(block, x)
        torch.testing.assert_close(model(images), model.head(model.norm(x).mean((1, 2))), rtol=0, atol=1e-10)


def slow_mlp_all(block: Any, x: Tensor) -> Tensor:
    """A block in which all tokens of (B, h, w, D) attend to all."""
    flat = [each.flatten(0, 1) for each in x]
    return torch.stack([slow_mlp(block, each + slow_attention(block, each, each)) for each in flat]).view(x.shape)


@torch.no_grad()
def test_made_of_a_swin_it_has_that_swins_weights() -> None:
    """With a pool that is the identity, generation that adds nothing, one window and no relative positions it is the
    Swin without two of its blocks.
    """
    plain = swin(img_size=32, depths=(2, 2, 5), num_heads=(1, 2, 4))  # the third map is one window of 4 x 4
    for block in plain.layers[2].blocks[1:]:
        block.attn.relative_position_bias_table.zero_()
    model = STViTSwin.from_swin(plain, base=1, semantics=semantics_of(4, 4, side=4)).double().eval()
    for block in model.layers[2].blocks[1:3]:
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    del plain.layers[2].blocks[1:3]
    images = scenes(model)
    torch.testing.assert_close(model(images), plain(images), rtol=0, atol=1e-10)
    assert model.layers[2].semantics == Semantics(side=4, keys=4, stride=2, residual=True) and model.base == 1
    weights = [each.data_ptr() for each in plain.parameters()]
    assert not {each.data_ptr() for each in model.parameters()} & set(weights), "they are copies"


@torch.no_grad()
def test_a_swin_of_any_depth_gives_its_sizes_to_the_model_that_is_made_of_it() -> None:
    plain = swin(img_size=128)  # maps of 64 … 16: four windows a side
    model = STViTSwin.from_swin(plain, base=3).double().eval()
    assert (model.layers[2].semantics.keys, model.layers[2].semantics.stride) == (10, 2)
    images = scenes(model, 2)
    x = images
    for part in (plain.patch_embed, plain.layers[0], plain.layers[1], plain.layers[2].downsample):
        x = part(x)
    for block in plain.layers[2].blocks[:3]:
        x = block(x)
    seen: list[Tensor] = []
    model.layers[2].blocks[2].register_forward_hook(lambda _, given, found: seen.append(found))
    assert model(images).shape == (2, 5)
    torch.testing.assert_close(seen[0], x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "costs"),
    [
        ("tiny", {1: 2.9721, 2: 3.2123, 4: 3.6903}),
        pytest.param("small", {2: 4.5949, 4: 5.0728, 6: 5.5508, 8: 6.0287}, marks=pytest.mark.slow),
        pytest.param("base", {2: 8.0952, 4: 8.9401, 6: 9.785, 8: 10.6299}, marks=pytest.mark.slow),
    ],
)
def test_the_costs_of_stvit_at_the_shapes_of_swin_are_known(size: str, costs: dict[int, float]) -> None:
    """G multiply-adds at 224 x 224 by the number of base blocks."""
    with torch.device("meta"):
        found = {base: MADE[size](base=base).macs() for base in costs}
    assert {base: round(macs / 1e9, 4) for base, macs in found.items()} == costs


def test_the_costs_of_stvit_are_those_of_its_rows() -> None:
    """D = 384: 196 tokens in four windows, 16 semantic ones in each."""
    with torch.device("meta"):
        made = [stvit_swin_tiny(base=base, depths=(1, 1, 6), heads=(3, 6, 12)).macs() for base in (1, 2, 4)]
    d, m, n = 384, 64, 196
    rows = {  # of a block: linear layers in D², pairs
        "base": (12 * n, 49 * n), "generate": (10 * m + 2 * 4 * 116, 116 * m), "refine": (10 * m + 2 * 260, 260 * m),
        "local": (12 * m, 16 * m), "everywhere": (12 * m, 64 * m),
    }  # fmt: skip
    blocks = {name: linear * d * d + 2 * pairs * d for name, (linear, pairs) in rows.items()}
    assert made[1] - made[0] == blocks["base"] - blocks["local"]
    assert made[2] - made[1] == 2 * blocks["base"] - blocks["local"] - blocks["everywhere"]
    plain = SwinTransformer(embed_dim=96, depths=(1, 1, 1), num_heads=(3, 6, 12))
    dense = float(reduce_tokens(plain, Placement()).cost(torch.zeros(1, 3, 224, 224)))
    assert made[2] - dense == 3 * blocks["base"] + blocks["generate"] + blocks["refine"]


def test_impossible_shapes_of_stvit_are_refused() -> None:
    for base in (0, 5):
        with pytest.raises(ReducerError, match=rf"base={base} of 6 blocks: one base block or more"):
            stvit_swin_tiny(base=base)
    with pytest.raises(ReducerError, match="do not ask a side of 14 tokens exactly by parts of 9"):
        stvit_swin_tiny(base=1, semantics=Semantics(side=4, keys=9))
    with pytest.raises(ReducerError, match="made of a square Swin with square windows"):
        STViTSwin.from_swin(swin(window_size=(2, 4)), base=1)
    with pytest.raises(ReducerError, match="three stages or more"):
        STViTSwin.from_swin(swin(depths=(2, 2), num_heads=(1, 2)), base=1)
    with pytest.raises(ReducerError, match="three stages or more"):
        stvit_swin_tiny(base=1, depths=(2, 2))
    with pytest.raises(ReducerError, match="images of 32 x 32 and a model for 64 x 64; make it with image_size=…"):
        stvit()(torch.zeros(1, 1, 32, 32, dtype=torch.float64))
