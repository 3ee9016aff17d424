"""Images of another size than the model's own: every count is of their patches."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from reducers import Count, Identity, Ratio, ReducerError, at, build, reduce_tokens
from reducers.methods.small_input import SmallInput
from tests.samples import shared_out

from .conftest import make_vit
from .test_contract import CASES, fresh

FIXED_AT_ONE_SIZE = {"sttabt", "sttabt concrete", "hvt_pool positions"}  # refuse other sizes by name
# counts of the model's own size
LEARNED_COUNTS = {"diffrate", "patch_merger", "sinkhorn", "sit", "stvit", "stvit_r", "token_learner"}
SAME = sorted(set(CASES) - FIXED_AT_ONE_SIZE - LEARNED_COUNTS - {"stvit residual off", "stvit_r released"})
SIZES = [(96, 96), (48, 72), (56, 56)]


def pair(size: tuple[int, int]) -> tuple[VisionTransformer, VisionTransformer]:
    """A model of 48 px that takes any size, and the same one made for ``size`` by timm's interpolation."""
    moving, made = make_vit(dynamic_img_size=True), make_vit(img_size=size, dynamic_img_size=True)
    state = moving.state_dict()
    grid = (size[0] // 8, size[1] // 8)
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=1)
    made.load_state_dict(state)
    return moving, made


@pytest.mark.parametrize("name", shared_out([name for name in SAME if name != "small_input"], of=2))
@torch.no_grad()
def test_a_model_of_any_size_reduces_as_one_made_for_that_size(name):
    size = SIZES[SAME.index(name) % len(SIZES)]
    images = torch.randn(2, 3, *size)
    driven = [reduce_tokens(model, at([1, 3], fresh(CASES[name]))) for model in pair(size)]
    driven[1].reducers.load_state_dict(driven[0].reducers.state_dict())
    (logits, trace), (expected, reference) = (model.trace(images) for model in driven)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(trace.tokens, reference.tokens)
    assert torch.equal(trace.owner(3), reference.owner(3)) and torch.equal(trace.kept(3), reference.kept(3))
    torch.testing.assert_close(trace.macs, reference.macs)


@pytest.mark.parametrize("name", sorted(FIXED_AT_ONE_SIZE))
@torch.no_grad()
def test_methods_with_a_parameter_for_each_place_refuse_other_sizes_by_name(name):
    model = reduce_tokens(make_vit(dynamic_img_size=True), at([1, 3], fresh(CASES[name])))
    with pytest.raises(ReducerError, match="size"):
        model(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("size", "budget", "kept"),
    [
        ((448, 448), Count(100), 100), ((224, 336), Count(100), 96), ((256, 256), Count(100), 100),
        ((256, 256), Ratio(0.25), 64), ((256, 256), Ratio(0.25, of="initial"), 64), ((224, 224), Count(100), 100),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_smaller_input_counts_the_patches_of_the_images_that_come(size, budget, kept):
    model = VisionTransformer(
        img_size=224, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=3, dynamic_img_size=True
    ).eval()
    _, trace = reduce_tokens(model, at(0, SmallInput(budget))).trace(torch.randn(1, 3, *size))
    assert trace.tokens[0].tolist() == [kept + 1] * 3
    patches = size[0] * size[1] // 256
    assert trace.owner(1).shape == trace.kept(1).shape == (1, patches)
    assert trace.kept(1).sum() == kept
    assert trace.owner(1).unique().tolist() == list(range(1, kept + 1))


@torch.no_grad()
def test_what_the_model_pads_is_part_of_the_image_that_is_made_smaller():
    model = make_vit(dynamic_img_size=True, dynamic_img_pad=True)
    small, images = reduce_tokens(model, at(0, SmallInput(Count(16)))), torch.randn(2, 3, 41, 45)
    padded = torch.nn.functional.pad(images, (0, 3, 0, 7))  # 6 x 6 patches of 8 px
    torch.testing.assert_close(small(images), small(padded), rtol=0, atol=1e-5)
    assert small.trace(images)[1].owner(3).shape == (2, 36)
    everything = reduce_tokens(model, at(0, SmallInput(Count(36))))
    torch.testing.assert_close(everything(images), model(images), rtol=0, atol=1e-4)
    pattern = build({"name": "fixed_pattern", "budget": {"count": 4}})
    assert reduce_tokens(model, at(1, pattern)).trace(images)[1].kept(3).view(2, 6, 6)[:, 2:4, 2:4].all()


def test_images_that_the_model_does_not_take_are_refused_with_the_remedy():
    placement = at(0, SmallInput(Count(16)))
    with pytest.raises(ReducerError, match="dynamic_img_size=True"):
        reduce_tokens(make_vit(), placement)(torch.randn(1, 3, 64, 64))
    with pytest.raises(ReducerError, match="dynamic_img_pad=True"):
        reduce_tokens(make_vit(dynamic_img_size=True), placement)(torch.randn(1, 3, 50, 48))


def test_sttabt_refuses_images_whose_padding_its_own_network_would_cut_off():
    model = make_vit(dynamic_img_size=True, dynamic_img_pad=True)
    reduced = reduce_tokens(model, at([1, 2], build({"name": "sttabt", "budget": {"ratio": 0.5}})) | at(0, Identity()))
    with pytest.raises(ReducerError, match="7 x 7"):
        reduced(torch.randn(1, 3, 50, 50))
