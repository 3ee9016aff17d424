"""STViT-R on Swin: a slow reference, what it is where its parts do nothing, published sizes and costs, the names."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from reducers import ReducerError
from reducers.backbones.stvit_r import (
    ImageUnit,
    PaddedUnit,
    Semantics,
    Sizes,
    STViTRSwin,
    from_release,
    stvit_r_swin_base,
    stvit_r_swin_small,
    stvit_r_swin_toy,
)

WIDTH, WINDOW = 16, 4
PADDED = Semantics(side=2, keys=8, second_keys=11, recovery_keys=5)


def shaken(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """In float64 with every parameter away from its neutral value, LayerScale so large that all paths count."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("gamma"):
                parameter.add_(0.7)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module.double().eval()


def image_unit(semantics: Semantics, rows: int = 8, columns: int = 8) -> ImageUnit:
    return shaken(ImageUnit(Sizes(WIDTH, 2, (rows, columns), WINDOW, (0.0,) * 6), semantics, first=True))


def padded_unit(semantics: Semantics = PADDED) -> PaddedUnit:
    return shaken(PaddedUnit(Sizes(WIDTH, 2, (8, 8), WINDOW, (0.0,) * 6), semantics))


def silence(unit: nn.Module, blocks: range) -> None:
    with torch.no_grad():
        for index in blocks:
            unit.blocks[index].ls1.gamma.zero_()
            unit.blocks[index].ls2.gamma.zero_()


# --- a slow reference -------------------------------------------------------------------------------------------------


def slow_attention(block, asking, asked):
    """One query after another, (Q, D), (K, D) -> what the attention adds (Q, D)."""
    attn = block.attn
    q = attn.q(block.norm1(asking)).unflatten(1, (attn.heads, -1))
    k, v = (F.linear(block.norm1(asked), *half).unflatten(1, (attn.heads, -1)) for half in halves(attn.kv))
    rows = []
    for row in q:
        weights = torch.einsum("hd,khd->hk", row, k).div(math.sqrt(q.shape[2])).softmax(1)
        rows.append(torch.einsum("hk,khd->hd", weights, v).flatten())
    return block.ls1.gamma * attn.proj(torch.stack(rows))


def halves(linear):
    return zip(linear.weight.chunk(2), linear.bias.chunk(2), strict=True)


def slow_mlp(block, x):
    hidden = F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + block.ls2.gamma * F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)


def squares(rows, columns, side):
    """The upper left corners of windows."""
    return [(top, left) for top in range(0, rows, side) for left in range(0, columns, side)]


def slow_pool(x, side):
    """(H, W, D) in whole windows -> the largest of each bin of each window."""
    bins = [(i * WINDOW // side, math.ceil((i + 1) * WINDOW / side)) for i in range(side)]
    pooled = x.new_zeros(x.shape[0] // WINDOW * side, x.shape[1] // WINDOW * side, x.shape[2])
    for top, left in squares(*x.shape[:2], WINDOW):
        for i, (a, b) in enumerate(bins):
            for j, (c, d) in enumerate(bins):
                place = top // WINDOW * side + i, left // WINDOW * side + j
                pooled[place] = x[top + a : top + b, left + c : left + d].amax((0, 1))
    return pooled


def slow_among(unit, semantic, side):
    """Blocks 3 and 4."""
    local, everywhere = unit.blocks[3], unit.blocks[4]
    added = torch.zeros_like(semantic)
    for top, left in squares(*semantic.shape[:2], side):
        inside = semantic[top : top + side, left : left + side].reshape(-1, WIDTH)
        added[top : top + side, left : left + side] = slow_attention(local, inside, inside).view(side, side, WIDTH)
    semantic = slow_mlp(local, semantic + added)
    flat = semantic.reshape(-1, WIDTH)
    return slow_mlp(everywhere, flat + slow_attention(everywhere, flat, flat)).view(semantic.shape)


def slow_image_unit(unit, x):
    """(H, W, D), the table of the released classification form."""
    semantics, side = unit.semantics, unit.semantics.side
    x = unit.blocks[0](x[None])[0]
    pooled = slow_pool(x, side)
    added = torch.zeros_like(pooled)
    for top, left in squares(*x.shape[:2], WINDOW):
        s_top, s_left = top // WINDOW * side, left // WINDOW * side
        own = pooled[s_top : s_top + side, s_left : s_left + side].reshape(-1, WIDTH)
        a, b = top // WINDOW * semantics.stride, left // WINDOW * semantics.stride
        part = x[a : a + semantics.keys, b : b + semantics.keys].reshape(-1, WIDTH)
        found = slow_attention(unit.blocks[1], own, torch.cat([own, part]))
        added[s_top : s_top + side, s_left : s_left + side] = found.view(side, side, WIDTH)
    semantic = slow_mlp(unit.blocks[1], pooled + added if semantics.residual else added)
    flat, image = semantic.reshape(-1, WIDTH), x.reshape(-1, WIDTH)
    moved = flat if unit.centres is None else flat + unit.centres
    flat = slow_mlp(unit.blocks[2], moved + slow_attention(unit.blocks[2], moved, torch.cat([flat, image])))
    semantic = slow_among(unit, flat.view(semantic.shape), side).reshape(-1, WIDTH)
    return slow_mlp(unit.blocks[5], image + slow_attention(unit.blocks[5], image, semantic)).view(x.shape)


def inside(x, top, left, side, rows, columns):
    """Of the square of (H, W, D) whose corner may lie outside: what is within ``rows`` x ``columns``, (K, D)."""
    return x[max(top, 0) : min(top + side, rows), max(left, 0) : min(left + side, columns)].reshape(-1, WIDTH)


def slow_padded_unit(unit, x):
    """(H, W, D), the table of the released detection form; keys that are not there are left out, none is masked."""
    semantics, side = unit.semantics, unit.semantics.side
    x = unit.blocks[0](x[None])[0]
    rows, columns = x.shape[:2]
    whole = F.pad(x, (0, 0, 0, -columns % WINDOW, 0, -rows % WINDOW))
    semantic = slow_pool(whole, side)
    for block, keys in ((unit.blocks[1], semantics.keys), (unit.blocks[2], semantics.second_keys)):
        added = torch.zeros_like(semantic)
        for top, left in squares(*whole.shape[:2], WINDOW):
            s_top, s_left = top // WINDOW * side, left // WINDOW * side
            own = semantic[s_top : s_top + side, s_left : s_left + side].reshape(-1, WIDTH)
            before = math.floor((keys - WINDOW) / 2)
            found = slow_attention(block, own, inside(x, top - before, left - before, keys, rows, columns))
            added[s_top : s_top + side, s_left : s_left + side] = found.view(side, side, WIDTH)
        semantic = slow_mlp(block, semantic + added)
    semantic = slow_among(unit, semantic, side)
    begun = [
        sum(start + math.floor(i * WINDOW / side) < extent for start in range(0, extent, WINDOW) for i in range(side))
        for extent in (rows, columns)
    ]
    block, keys, before = unit.blocks[5], semantics.recovery_keys, math.floor((semantics.recovery_keys - side) / 2)
    added = torch.zeros_like(whole)
    for top, left in squares(*whole.shape[:2], WINDOW):
        own = whole[top : top + WINDOW, left : left + WINDOW].reshape(-1, WIDTH)
        s_top, s_left = top // WINDOW * side, left // WINDOW * side
        found = slow_attention(block, own, inside(semantic, s_top - before, s_left - before, keys, *begun))
        added[top : top + WINDOW, left : left + WINDOW] = found.view(WINDOW, WINDOW, WIDTH)
    return slow_mlp(block, x + added[:rows, :columns])


@pytest.mark.parametrize(
    ("semantics", "shape"),
    [
        (Semantics(side=2, keys=6, stride=2), (8, 8)),
        (Semantics(side=3, keys=6, stride=2, residual=True, centres=True), (8, 8)),
        (Semantics(side=1, keys=4, stride=4, centres=True), (8, 12)),
    ],
)
@torch.no_grad()
def test_a_unit_for_images_equals_a_slow_reference(semantics, shape):
    unit, x = image_unit(semantics, *shape), torch.randn(2, *shape, WIDTH, dtype=torch.float64)
    for image, found in zip(x, unit(x), strict=True):
        torch.testing.assert_close(found, slow_image_unit(unit, image), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(8, 8), (9, 7), (5, 12), (3, 2)])
@torch.no_grad()
def test_a_unit_for_detection_equals_a_slow_reference_that_knows_no_masks(shape):
    unit, x = padded_unit(), torch.randn(2, *shape, WIDTH, dtype=torch.float64)
    for image, found in zip(x, unit(x), strict=True):
        torch.testing.assert_close(found, slow_padded_unit(unit, image), rtol=0, atol=1e-9)


# --- what it is where parts of it do nothing --------------------------------------------------------------------------


@torch.no_grad()
def test_without_its_semantic_blocks_a_unit_is_its_swin_block():
    x = torch.randn(2, 8, 8, WIDTH, dtype=torch.float64)
    for unit in (image_unit(Semantics(side=2, keys=6, stride=2)), padded_unit()):
        assert not torch.allclose(unit(x), unit.blocks[0](x))
        silence(unit, range(1, 6))
        assert torch.equal(unit(x), unit.blocks[0](x))


@torch.no_grad()
def test_as_many_semantic_tokens_as_the_image_has_make_recovery_a_plain_block():
    """s = w: pooling is the identity; with blocks 1-4 silent the semantic tokens are the image's, in their order."""
    unit = image_unit(Semantics(side=WINDOW, keys=6, stride=2, residual=True))
    silence(unit, range(1, 5))
    recovery = unit.blocks[5]
    plain = Block(WIDTH, 2, qkv_bias=True, init_values=1.0, norm_layer=nn.LayerNorm).double().eval()
    state = recovery.state_dict()
    for kind in ("weight", "bias"):
        state[f"attn.qkv.{kind}"] = torch.cat([state.pop(f"attn.q.{kind}"), state.pop(f"attn.kv.{kind}")])
    plain.load_state_dict(state)
    x = torch.randn(2, 8, 8, WIDTH, dtype=torch.float64)
    expected = plain(unit.blocks[0](x).flatten(1, 2)).view(x.shape)
    torch.testing.assert_close(unit(x), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_without_its_semantic_blocks_the_model_is_a_swin_that_never_shifts_in_its_third_stage():
    ours = shaken(stvit_r_swin_toy())
    for unit in ours.layers[2].units:
        silence(unit, range(1, 6))
    swin = SwinTransformer(
        img_size=64, patch_size=2, in_chans=1, num_classes=10, embed_dim=24, depths=(2, 2, 1), num_heads=(1, 2, 4),
        window_size=4,
    ).double().eval()  # fmt: skip
    named = {name.replace("layers.2.units.0.", "layers.2."): each for name, each in ours.state_dict().items()}
    named = {name.replace("head.", "head.fc."): each for name, each in named.items()}
    state = {name: named[name] for name in swin.state_dict() if not name.startswith("patch_embed")}
    assert all(name.startswith("patch_embed") for name in swin.load_state_dict(state, strict=False).missing_keys)
    images = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    swin.patch_embed = ours.stem
    torch.testing.assert_close(ours(images), swin(images), rtol=0, atol=1e-10)


# --- sizes and costs --------------------------------------------------------------------------------------------------


def macs_and_norms(model: nn.Module) -> tuple[int, int]:
    """Multiply-adds of an image, and how many elements pass a norm in the same run."""
    total = 0

    def count(module, given, output):
        nonlocal total
        total += output.numel()

    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            module.register_forward_hook(count)
    return model.macs(), total


def test_size_and_cost_of_the_released_small_model():
    """The authors' log holds fvcore's table, which counts a norm at 5 an element: 49.626 M and 5.826 G."""
    with torch.device("meta"):
        model = stvit_r_swin_small()
    assert sum(each.numel() for each in model.parameters()) == 49_625_518
    macs, norms = macs_and_norms(model)
    assert macs == 5_798_731_776
    assert macs + 5 * (norms + 3 * 36 * 384) == 5_826_291_456, "the released block 4 norms the same tokens twice"


@pytest.mark.slow
def test_sizes_and_costs_of_the_others():
    with torch.device("meta"):
        base, finer = stvit_r_swin_base(), Semantics(side=4)
        others = [
            stvit_r_swin_small(semantics=finer), stvit_r_swin_base(semantics=finer),
            stvit_r_swin_small(depths=(2, 2, 6, 2)),
        ]  # fmt: skip
    assert sum(each.numel() for each in base.parameters()) == 87_812_336
    macs, norms = macs_and_norms(base)
    assert f"{macs / 1e9:.4f}" == "10.2274"
    assert f"{(macs + 5 * (norms + 3 * 36 * 512)) / 1e9:.3f}" == "10.264"
    assert [f"{other.macs() / 1e9:.4f}" for other in others] == ["6.4659", "11.3922", "3.5978"]


@torch.no_grad()
def test_the_cost_of_a_unit_block_by_block():
    """D = 384, 196 tokens in four windows, s = 3: 354.192 + 184.680 + 127.918 + 63.950 + 64.696 + 305.050 M."""
    with torch.device("meta"):
        one, none = (stvit_r_swin_small(depths=(1, 1, blocks), heads=(3, 6, 12)).macs() for blocks in (6, 0))
    d, n, m = 384, 196, 36
    linear = [12 * n, 2 * m + 2 * (m + 400) + 8 * m, 2 * m + 2 * (m + n) + 8 * m, 12 * m, 12 * m, 10 * n + 2 * m]
    pairs = [49 * n, 109 * m, (m + n) * m, 9 * m, m * m, m * n]
    blocks = [rows * d * d + 2 * pair * d for rows, pair in zip(linear, pairs, strict=True)]
    assert [each / 1e6 for each in blocks] == pytest.approx([354.192, 184.68, 127.918, 63.95, 64.696, 305.05], abs=1e-3)
    assert round(sum(blocks) / 1e6, 3) == 1100.486
    assert one - none == sum(blocks)


def test_maps_are_given_in_the_shapes_in_which_they_come():
    model = shaken(stvit_r_swin_toy())
    assert model(torch.randn(3, 1, 64, 64, dtype=torch.float64)).shape == (3, 10)
    with pytest.raises(ReducerError, match="images of 64 x 60 and a model for 64 x 64"):
        model(torch.zeros(1, 1, 64, 60, dtype=torch.float64))
    detector = shaken(stvit_r_swin_toy(form="detection", semantics=PADDED))
    maps = detector(torch.randn(2, 1, 70, 50, dtype=torch.float64))
    assert [tuple(each.shape) for each in maps] == [(2, 24, 35, 25), (2, 48, 18, 13), (2, 96, 9, 7)]
    assert all(each.isfinite().all() for each in maps)
    assert detector.macs((64, 64)) < detector.macs((70, 50)), "a larger third map, in more windows"


def test_impossible_shapes_are_refused():
    with pytest.raises(ReducerError, match="units of 6 blocks"):
        stvit_r_swin_toy(depths=(2, 2, 7))
    with pytest.raises(ReducerError, match="2 windows of 4 do not ask a side of 8 tokens exactly by parts of 7"):
        stvit_r_swin_toy(semantics=Semantics(side=2, keys=7, stride=2))
    with pytest.raises(ReducerError, match="STViTRSwin"):
        stvit_r_swin_toy(form="segmentation")
    for wrong in ({"patch": 8}, {"heads": (1, 2)}, {"depths": (2, 2), "heads": (1, 2)}):
        with pytest.raises(ReducerError, match="three stages or more"):
            stvit_r_swin_toy(**wrong)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["classification", "detection"])
def test_a_recovered_token_sends_gradients_to_every_part(form):
    semantics = Semantics(side=2, keys=6, stride=2, centres=True)
    unit = image_unit(semantics) if form == "classification" else padded_unit()
    x = torch.randn(2, 8, 8, WIDTH, dtype=torch.float64, requires_grad=True)
    pooled = []
    unit.pool, pool = lambda x: pooled.append(pool(x)) or pooled[-1], unit.pool
    found = unit(x)
    pooled[0].retain_grad()
    found[0, 0, 0].square().sum().backward()  # of one token of the first window
    silent = [name for name, each in unit.named_parameters() if each.grad is None or not each.grad.abs().sum()]
    assert silent == []
    assert pooled[0].grad[0].abs().sum(2).min() > 0, "it hears of all windows through the semantic tokens"
    assert not x.grad[1].any(), "and of no other image"
    assert (form == "detection") == (unit.centres is None)


def test_a_new_unit_is_nearly_its_swin_block_and_drops_whole_images():
    torch.manual_seed(0)
    sizes = Sizes(WIDTH, 2, (8, 8), WINDOW, (0.0, 0.0, 0.0, 0.0, 0.0, 0.5))
    unit, x = ImageUnit(sizes, Semantics(side=2, keys=6, stride=2), first=True).eval(), torch.randn(32, 8, 8, WIDTH)
    torch.testing.assert_close(unit(x), unit.blocks[0](x), rtol=0, atol=1e-3)
    recovery = unit.train().blocks[5]
    with torch.no_grad():
        recovery.ls1.gamma.fill_(1.0)
        moved = (unit(x) - unit.blocks[0](x)).abs().flatten(1) > 1e-3
    shares = moved.float().mean(1)
    assert {bool(share > 0.5) for share in shares} == {True, False}, "half of the images"
    assert all(share == 0 or share > 0.5 for share in shares), "whole ones"


# --- the authors' checkpoints -----------------------------------------------------------------------------------------


def released(width: int, depths: tuple[int, ...], heads: tuple[int, ...], *, detector: bool, centres: bool = False):
    """Name -> shape of what the released code keeps, written from its description."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name, out, into, bias=True):
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name, size):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    for number, (into, out) in {0: (3, width // 2), 2: (width // 2, width)}.items():
        shapes[f"patch_embed.proj.{number}.c.weight"] = (out, into, 3, 3)
        norm(f"patch_embed.proj.{number}.bn", out)
        shapes |= {f"patch_embed.proj.{number}.bn.running_{kind}": (out,) for kind in ("mean", "var")}
        shapes[f"patch_embed.proj.{number}.bn.num_batches_tracked"] = ()
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        size = width * 2**stage
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            norm(f"{block}.norm1", size)
            norm(f"{block}.norm2", size)
            linear(f"{block}.attn.proj", size, size)
            linear(f"{block}.mlp.fc1", 4 * size, size)
            linear(f"{block}.mlp.fc2", size, 4 * size)
            if stage != 2 or index % 6 == 0:
                shapes[f"{block}.attn.relative_position_bias_table"] = (169, head)
                shapes[f"{block}.attn.relative_position_index"] = (49, 49)
                linear(f"{block}.attn.qkv", 3 * size, size)
                if stage < 2 and index % 2 and not detector:  # the last stage is one window
                    shapes[f"{block}.attn_mask"] = (4 ** (3 - stage), 49, 49)
            else:
                linear(f"{block}.attn.q", size, size)
                linear(f"{block}.attn.kv", 2 * size, size)
                shapes[f"{block}.layer_scale_1"] = shapes[f"{block}.layer_scale_2"] = (size,)
        if stage < 3:
            norm(f"layers.{stage}.downsample.norm", 4 * size)
            linear(f"layers.{stage}.downsample.reduction", 2 * size, 4 * size, bias=False)
        if detector:
            norm(f"norm{stage}", size)
    if centres:
        shapes["layers.2.semantic_token2"] = (1, 36, 4 * width)
    if not detector:
        norm("norm", 8 * width)
        linear("head", 1000, 8 * width)
    return shapes


@pytest.mark.parametrize(
    ("make", "width", "heads"), [(stvit_r_swin_small, 96, (3, 6, 12, 24)), (stvit_r_swin_base, 128, (4, 8, 16, 32))]
)
@pytest.mark.parametrize("form", ["classification", "with centres", "detection"])
def test_the_names_of_the_authors_checkpoints_are_ours_one_by_one(make, width, heads, form):
    detector, centres = form == "detection", form == "with centres"
    with torch.device("meta"):
        shapes = released(width, (2, 2, 18, 2), heads, detector=detector, centres=centres)
        weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
        if detector:
            weights = {f"backbone.{name}": each for name, each in weights.items()}
            weights["rpn_head.rpn_conv.weight"] = torch.zeros(1)
            model = make(form="detection")
        else:
            model = make(semantics=Semantics(centres=centres))
    found = from_release(weights)
    assert {name: each.shape for name, each in found.items()} == {
        name: each.shape for name, each in model.state_dict().items()
    }
    model.load_state_dict(found, assign=True)


def test_a_checkpoint_puts_every_weight_where_it_works():
    """Two weights of a shape that change places would go unseen: each is known here by its number."""
    shapes = released(24, (2, 2, 6, 2), (1, 2, 4, 8), detector=False)
    kept = [name for name in shapes if not name.endswith(("index", "mask"))]
    found = from_release({name: torch.full((1,), number) for number, name in enumerate(kept)})
    by_number = {int(each): name for name, each in found.items()}
    assert len(by_number) == len(kept)
    ours = {name: by_number[number] for number, name in enumerate(kept)}
    assert ours["layers.0.downsample.norm.weight"] == "layers.1.downsample.norm.weight"
    assert ours["layers.2.blocks.5.layer_scale_2"] == "layers.2.units.0.blocks.5.ls2.gamma"
    assert ours["layers.2.blocks.1.attn.kv.bias"] == "layers.2.units.0.blocks.1.attn.kv.bias"
    assert ours["patch_embed.proj.2.bn.running_var"] == "stem.norm2.running_var"
    for theirs, mine in ours.items():
        assert theirs.rpartition(".")[2] in {mine.rpartition(".")[2], "layer_scale_1", "layer_scale_2"}
        assert mine.split(".")[-3:-1] == theirs.split(".")[-3:-1] or not theirs.startswith("layers.2.blocks.1.mlp")


@pytest.mark.parametrize("name", ["layers.2.blocks.1.attn.queries.weight", "absolute_pos_embed", "model"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ReducerError, match=f"{name} is no weight of a released STViT-R"):
        from_release({name: torch.zeros(1)})


def test_settings_of_the_released_models_are_the_defaults():
    model = STViTRSwin
    assert Semantics() == Semantics(side=3, keys=10, stride=4, residual=False, centres=False)
    with torch.device("meta"):
        unit = model(form="detection").layers[2].units[2]
    assert (unit.semantics.keys, unit.semantics.second_keys, unit.semantics.recovery_keys) == (14, 21, 27)
    assert unit.blocks[0].shift_size == (0, 0)
