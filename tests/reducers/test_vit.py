"""No reduction equals plain timm on every supported entry point, and everything else is refused."""

from __future__ import annotations

import functools
import inspect
import re

import pytest
import timm
import torch
from timm.models import vision_transformer as vit_module

from reducers import ATS, Count, EViT, Identity, Ratio, ToMe, TopK, UnsupportedModel, at, reduce_tokens
from reducers.hosts import host_of
from tests.samples import shared_out

from . import timm_models

TRANSFORMER_MODULES = [
    "vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "eva", "beit", "cait", "xcit", "tnt",
    "crossvit", "convit", "pit", "volo", "levit", "visformer", "nest", "twins", "pvt_v2", "mvitv2", "hiera",
    "hieradet_sam2", "davit", "coat", "gcvit", "maxxvit", "tiny_vit", "swin_transformer", "swin_transformer_v2",
    "swin_transformer_v2_cr", "mobilevit", "efficientformer", "efficientformer_v2", "efficientvit_mit",
    "efficientvit_msra", "naflexvit", "vision_transformer_relpos", "vision_transformer_sam", "edgenext",
    "mambaout", "metaformer", "sequencer", "mlp_mixer",
]  # fmt: skip
FAMILIES = ["vision_transformer", "deit"]


def entry_points(modules: list[str]) -> list[str]:
    known = set(timm.list_modules())
    return sorted(name for module in modules if module in known for name in timm.list_models(module=module))


@functools.cache
def _noise() -> torch.Tensor:
    return torch.randn(2**22, generator=torch.Generator().manual_seed(0))


def shallow(name: str, probe: torch.nn.Module) -> torch.nn.Module:
    """The entry point at depth 2, on a 4 x 4 grid, its parameters random and far from any neutral value.

    Made on the meta device and filled with ready-made noise: timm's own initialisation of the giants would take
    minutes.
    """
    with torch.device("meta"):
        model = timm.create_model(name, depth=2, img_size=4 * probe.patch_embed.patch_size[0])
    model = model.to_empty(device="cpu")
    timm_models.fill(model, _noise())
    assert not list(model.buffers()), "buffers would be left uninitialised"
    return model.eval()


def distinct(modules: list[str]) -> dict[str, torch.nn.Module]:
    """Entry points and what they make, at depth 2, without memory. Of those that differ in the size of their images
    alone the first: on a 4 x 4 grid they are one model.
    """
    names = {re.sub(r"_\d+$", "", name): name for name in reversed(entry_points(modules))}
    with torch.device("meta"):
        return {name: timm.create_model(name, depth=2) for name in sorted(names.values())}


def is_giant(model: torch.nn.Module) -> bool:
    """So large that writing its parameters takes most of the time."""
    return size(model) > 50e6


def is_refused(name: str, probe: torch.nn.Module) -> bool:
    """Whether the runtime refuses the model, which it must do with a word on what is supported."""
    try:
        host_of(probe)
    except UnsupportedModel as error:
        if "Supported" not in str(error) and "create" not in str(error):
            pytest.fail(f"{name} is refused without saying what is supported: {error}")
        return True
    return False


def check_equal(name: str, probe: torch.nn.Module) -> None:
    """Fail where the model would be run wrongly."""
    model = shallow(name, probe)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.inference_mode():
        expected = model(images)
        found = reduce_tokens(model, at([0, 1], Identity()))(images)
    scale = max(
        1.0, float(expected.abs().max())
    )  # random weights make some logits large; 1e-5 is relative to them then
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale, msg=lambda text: f"{name}: {text}")


REFUSED_ENTRY_POINTS = {  # their blocks have another order of work, or attend in another way
    "vit_base_patch16_18x2_224", "vit_base_patch16_rpn_224", "vit_base_patch16_xp_224",
    "vit_dlittle_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256",
    "vit_huge_patch14_xp_224", "vit_large_patch14_xp_224", "vit_pwee_patch16_reg1_gap_256",
    "vit_small_patch16_18x2_224",
}  # fmt: skip


SMALL = 12e6
"""Parameters at depth 2: up to here one in three entry points is run each time, the others in ``make test-slow``."""


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_entry_point_of_the_families_is_driven_but_those_refused_by_name():
    """No reduction is plain timm on one in three of the small ones."""
    probes = distinct(FAMILIES)
    refused = {name for name, probe in probes.items() if is_refused(name, probe)}
    assert refused == REFUSED_ENTRY_POINTS & probes.keys(), "support has shrunk or grown: say so in the list"
    small = [name for name in probes.keys() - refused if size(probes[name]) <= SMALL]
    assert len(small) >= 20
    for name in sorted(small)[::3]:
        check_equal(name, probes[name])


@pytest.mark.slow
def test_no_reduction_is_plain_timm_on_all_of_the_small_ones():
    probes = distinct(FAMILIES)
    for name in probes.keys() - REFUSED_ENTRY_POINTS:
        if size(probes[name]) <= SMALL:
            check_equal(name, probes[name])


@pytest.mark.slow
def test_no_reduction_is_plain_timm_on_the_larger_ones_too():
    probes = distinct(FAMILIES)
    for name in probes.keys() - REFUSED_ENTRY_POINTS:
        if size(probes[name]) > SMALL and not is_giant(probes[name]):
            check_equal(name, probes[name])


@pytest.mark.slow
def test_no_reduction_is_plain_timm_on_the_giants_too():
    giants = {name: probe for name, probe in distinct(FAMILIES).items() if is_giant(probe)}
    assert "vit_giant_patch14_dinov2" in giants
    for name in giants.keys() - REFUSED_ENTRY_POINTS:
        check_equal(name, giants[name])


@pytest.mark.slow
def test_every_transformer_of_timm_is_equal_or_refused():
    """But for the families that test_families walks."""
    for name in entry_points([m for m in TRANSFORMER_MODULES if m not in (*FAMILIES, *timm_models.FAMILIES)]):
        try:
            with torch.device("meta"):
                probe = timm.create_model(name)
        except (RuntimeError, NotImplementedError, TypeError):
            probe = timm.create_model(name)  # some cannot be made on the meta device
        try:
            host_of(probe)
        except UnsupportedModel:
            continue
        _check_full_depth(name)


def _check_full_depth(name: str) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    with torch.inference_mode():
        expected, found = model(images), reduce_tokens(model, at([0], Identity()))(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


REFUSED = [
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "pit_ti_224",
    "swinv2_tiny_window8_256",
    "samvit_base_patch16",
    "tnt_s_patch16_224",
    "volo_d1_224",
    "mvitv2_tiny",
    "hiera_tiny_224",
]


@pytest.mark.parametrize("name", shared_out(REFUSED, of=3))
def test_other_families_are_refused_with_what_is_supported(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModel, match="Supported"):
        reduce_tokens(model, at([0], Identity()))


@pytest.mark.parametrize("block_name", ["ParallelScalingBlock", "ResPostBlock", "ParallelThingsBlock"])
def test_blocks_of_another_type_are_refused(block_name):
    model = vit_module.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, block_fn=getattr(vit_module, block_name)
    )
    with pytest.raises(UnsupportedModel, match=block_name):
        reduce_tokens(model, at([0], Identity()))


def test_a_model_that_drops_patches_itself_is_refused():
    model = vit_module.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, patch_drop_rate=0.5
    )
    with pytest.raises(UnsupportedModel, match="patch_drop_rate"):
        reduce_tokens(model, at([0], Identity()))


@pytest.mark.parametrize("image_size", [(64, 64), (96, 64)])
@torch.inference_mode()
def test_other_input_sizes_where_the_model_takes_them(image_size):
    model = vit_module.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, dynamic_img_size=True
    ).eval()
    images = torch.randn(2, 3, *image_size)
    torch.testing.assert_close(reduce_tokens(model, at([0], Identity()))(images), model(images), rtol=0, atol=1e-5)
    logits, trace = reduce_tokens(model, at([0], ATS(Count(9)))).trace(images)
    assert trace.kept(1).shape == (2, image_size[0] * image_size[1] // 64)
    assert logits.shape == (2, 5)


def test_stochastic_depth_drops_whole_images():
    torch.manual_seed(0)
    model = vit_module.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5, drop_path_rate=0.9
    ).train()
    images = torch.randn(64, 3, 32, 32)
    logits = reduce_tokens(model, at([1], ATS(Count(6)))).train()(images)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    plain = model.eval()(images)
    torch.testing.assert_close(reduce_tokens(model, at([1], Identity())).eval()(images), plain, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_average_pooling_after_merging_is_the_mean_over_patches():
    """With the blocks after the merge made neutral, merging cannot change the size-weighted mean."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = vit_module.VisionTransformer(**sizes, class_token=False, global_pool="avg").double().eval()
    for parameter in model.blocks[0].mlp.parameters():
        parameter.zero_()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    merged = reduce_tokens(model, at(0, ToMe(Ratio(0.6))))(images)
    torch.testing.assert_close(merged, model(images), rtol=0, atol=1e-10)


@torch.inference_mode()
def test_a_reducer_may_use_the_whole_lifecycle(images):
    """prepare, plan, block and finish reach the runtime: a reducer of each kind, written here, does what it says."""
    from reducers import Decision, TokenReducer
    from reducers.maps import keep_patches

    from .conftest import make_vit

    class HalfSize(TokenReducer):
        name = "half_size"

        def prepare(self, batch, host):
            return torch.nn.functional.avg_pool2d(batch, 2)

        def decide(self, signals, state):
            return None

    class Planned(TokenReducer):
        name = "planned"

        def plan(self, batch, host):
            return host.base.patch_embed(batch).norm(dim=2) > 0  # every patch

        def decide(self, signals, state):
            chosen = state.plans[self].clone()
            chosen[:, 5:] = False
            return Decision(keep_patches(signals.layout, chosen))

    class Skip(TokenReducer):
        name = "skip"

        def block(self, block, batch, state):
            return batch

    class LongestFeatures(TokenReducer):
        name = "longest_features"
        site = "input"

        def decide(self, signals, state):
            norms = signals.layout.pad_patches(signals.output().norm(dim=1))
            return Decision(keep_patches(signals.layout, norms > norms.median(dim=1, keepdim=True).values))

    class PreviousAttention(TokenReducer):
        name = "previous"
        uses_previous_attention = True

        def decide(self, signals, state):
            received = signals.layout.pad_patches(signals.previous_attention())
            return Decision(keep_patches(signals.layout, received > received.median(dim=1, keepdim=True).values))

    small = vit_module.VisionTransformer(
        img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, dynamic_img_size=True
    ).eval()
    half = torch.nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(reduce_tokens(small, at(0, HalfSize()))(images), small(half), rtol=0, atol=1e-5)
    _, trace = reduce_tokens(make_vit(), at(1, Planned())).trace(images)
    assert trace.tokens[0].tolist() == [37, 37, 6, 6, 6]
    _, trace = reduce_tokens(make_vit(), at(1, LongestFeatures()) | at(1, ATS(Count(7)))).trace(images[:4])
    assert trace.tokens[0, :2].tolist() == [37, 37]
    assert (trace.tokens[:, 2] <= 8).all()
    with pytest.raises(ValueError, match="put them first"):
        reduce_tokens(make_vit(), at(1, ATS(Count(7))) | at(1, LongestFeatures()))
    model = make_vit()
    skipped = reduce_tokens(model, at([0, 1, 2, 3], Skip()))(images)
    direct = model.forward_head(model.norm(model.norm_pre(model._pos_embed(model.patch_embed(images)))))
    torch.testing.assert_close(skipped, direct, rtol=0, atol=1e-5)
    _, trace = reduce_tokens(make_vit(), at(2, PreviousAttention())).trace(images[:2])
    assert (trace.tokens[:, 3] <= 19).all()
    with pytest.raises(ValueError, match="block before"):
        reduce_tokens(make_vit(), at(0, PreviousAttention()))(images)


def test_signatures_of_the_restated_timm_parts_have_not_moved():
    """A timm that adds a step to its block or attention must be looked at before it is supported."""
    from timm.layers.attention import Attention

    block, attention = inspect.getsource(vit_module.Block.forward), inspect.getsource(Attention.forward)
    assert block.count("self.") == 8, "Block.forward uses norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2"
    for part in ("gate", "qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"):
        assert f"self.{part}" in attention


@torch.inference_mode()
def test_other_reducers_on_a_model_without_class_token(images):
    from .conftest import make_vit

    for reducer in (
        ToMe(Ratio(0.7)),
        TopK(Ratio(0.5), score="value_norm"),
        ATS(Ratio(0.5), score="attention_received"),
    ):
        logits = reduce_tokens(make_vit("map"), at([1, 2], reducer))(images)
        assert torch.isfinite(logits).all()
    with pytest.raises(ValueError, match="needs a class token"):
        reduce_tokens(make_vit("average"), at(1, EViT(Ratio(0.5))))
