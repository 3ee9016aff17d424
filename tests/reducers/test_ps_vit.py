"""PS-ViT: the module against a slow restatement, its tokens under reducers, where they lie, its cost, its refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reducers import (
    ATS,
    Count,
    Drop,
    EViT,
    Identity,
    Placement,
    Ratio,
    ReducerError,
    Stack,
    ToMe,
    TopK,
    UnsupportedModel,
    at,
    available,
    build,
    reduce_tokens,
)
from reducers.backbones.ps_vit import PRESETS, PSViT, from_authors, ps_vit_b_14, ps_vit_b_18, sample
from reducers.hosts import host_of
from reducers.hosts.ps_vit import patches_of
from tests.samples import reading

SIZES: dict[str, Any] = {
    "img_size": 48, "points": 5, "num_classes": 7, "embed_dim": 32, "depth": 7, "samplings": 3, "num_heads": 2,
    "stem": (8, 6, 16),
}  # fmt: skip
FIRST, DEPTH = 3, 7  # blocks 3 to 6 take a reducer


def make(seed: int = 0, **changes: Any) -> PSViT:
    """A random model whose every parameter and statistic matters."""
    torch.manual_seed(seed)
    model = PSViT(**{**SIZES, **changes}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.4, 2.5)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def slow_sample(features: Tensor, points: Tensor) -> Tensor:
    """The authors' rule, point by point: nothing at a whole cell or more beyond the outermost centres."""
    depth, height, width = features.shape[1:]
    out = torch.zeros(*points.shape[:2], depth, dtype=features.dtype)
    for image, places in enumerate(points.tolist()):
        for number, (y, x) in enumerate(places):
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        weight = (1 - abs(y - row)) * (1 - abs(x - column))
                        out[image, number] += weight * features[image, :, row, column]
    return out


def layer(block: Any, x: Tensor, heads: int) -> Tensor:
    """The authors' transformer layer, written out."""
    attn = block.attn
    h = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-5)
    q, k, v = (h @ attn.qkv.weight.T).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    h = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-5)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(h)))


def restated(model: PSViT, images: Tensor) -> Tensor:
    """The whole model, written out after the paper and the authors' order of work."""

    def normed(x: Tensor, norm: Any) -> Tensor:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return x * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]

    first, norm, *_, one, two = model.stem
    x = F.max_pool2d(normed(F.conv2d(images, first.weight, stride=2, padding=3), norm).relu(), 3, 2, 1)
    for part in (one, two):
        h = normed(F.conv2d(x, part.conv1.weight), part.bn1).relu()
        h = normed(F.conv2d(h, part.conv2.weight, padding=1), part.bn2).relu()
        h = normed(F.conv2d(h, part.conv3.weight), part.bn3)
        short = normed(F.conv2d(x, part.downsample[0].weight), part.downsample[1])
        x = (h + short).relu()
    side, n = x.shape[-1], model.points[0]
    grid = [[(i + 0.5) * side / n, (j + 0.5) * side / n] for i in range(n) for j in range(n)]
    points, said = torch.tensor(grid, dtype=x.dtype).expand(len(x), -1, -1), 0.0
    offset = torch.zeros_like(points)
    for step in model.sampling:
        seen = slow_sample(x, points + offset)
        points = points + offset
        said = layer(step.block, seen + model.point_embed(points / side) + said, model.heads)
        offset = None if step.offset is None else step.offset(said)
    tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), said], dim=1)
    for block in model.blocks:
        tokens = layer(block, tokens, model.heads)
    return model.head(F.layer_norm(tokens[:, 0], tokens.shape[-1:], model.norm.weight, model.norm.bias, 1e-5))


@torch.no_grad()
def test_the_module_and_the_driven_model_are_the_restatement(images: Tensor) -> None:
    model = make()
    points = model.sampled(images)[1]
    assert ((points < 0) | (points > 11)).any(), "some points have left the map"
    expected = restated(model, images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-9)
    for placement in (
        Placement(),
        at(range(FIRST, DEPTH), Identity()),
        at([3, 5], TopK(Ratio(1.0), score="value_norm")),
    ):
        fast = reduce_tokens(model, placement)
        torch.testing.assert_close(fast(images), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(fast.features(images), model.forward_features(images)[:, 0], rtol=0, atol=1e-9)
    fast = reduce_tokens(model, Placement())
    torch.testing.assert_close(fast.forward_features(images), model.forward_features(images), rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_sampler_is_the_slow_loop_inside_and_outside_of_the_map() -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((5, 7), (2, 6), (4, 2), (12, 12)):
        features = torch.randn(2, 3, height, width, dtype=torch.float64, generator=generator)
        points = torch.rand(2, 60, 2, dtype=torch.float64, generator=generator) * (max(height, width) + 5) - 2.5
        points[0, :4] = torch.tensor([[-1.0, 0.0], [height - 1.0, width - 1.0], [height - 0.5, 0.0], [-0.25, -0.25]])
        found = sample(features, points)
        torch.testing.assert_close(found, slow_sample(features, points), rtol=0, atol=1e-12)
        assert (found == 0).any(), "some points lie outside"


@torch.no_grad()
def test_without_offsets_the_same_regular_points_are_sampled_in_every_step(images: Tensor) -> None:
    model = make()
    for step in model.sampling:
        if step.offset is not None:
            step.offset.weight.zero_()
            step.offset.bias.zero_()
    _, points = model.sampled(images)
    regular = model.first_points()
    assert torch.equal(points, regular.expand_as(points))
    torch.testing.assert_close(model(images), restated(model, images), rtol=0, atol=1e-9)
    batch = host_of(model).embed(images, track=True)
    assert torch.equal(batch.lies, torch.arange(25).expand(4, -1)), "then a token lies in the patch of its number"
    fresh = PSViT(**SIZES).double().eval()  # as it is made no point moves
    assert torch.equal(fresh.sampled(images)[1], points)


@torch.no_grad()
def test_places_move_with_the_offsets_and_pictures_follow_them(images: Tensor) -> None:
    model = make()
    for step in model.sampling:
        if step.offset is not None:
            step.offset.weight.zero_()
            step.offset.bias.copy_(torch.tensor([0.0, 1.2]))  # twice 1.2 of 12 cells to the right: one patch of five
    fast = reduce_tokens(model, at(FIRST, TopK(Count(6))))
    _, trace = fast.trace(images)
    row, column = torch.arange(25) // 5, torch.arange(25) % 5
    expected = row * 5 + (column + 1).clamp(max=4)
    assert torch.equal(trace.lies, expected.expand(4, -1))
    kept, covered = trace.kept(DEPTH - 1), trace.covered(DEPTH - 1)
    assert kept.sum(1).tolist() == [6] * 4
    for image in range(4):
        assert set(covered[image].nonzero().flatten().tolist()) == set(expected[kept[image]].tolist())
    assert not torch.equal(kept, covered)
    corners = torch.tensor([[[-0.5, -0.5], [11.4, 11.4], [-9.0, 40.0], [1.8, 2.0]]])  # a patch ends at 2.4 - 0.5
    assert patches_of(corners, (5, 5), (12, 12)).tolist() == [[0, 24, 4, 1]]


@pytest.mark.parametrize("reducer", [TopK(Count(9)), ATS(Ratio(1.0))], ids=["topk", "ats"])
@torch.no_grad()
def test_a_gathered_pass_is_the_models_own_layers_with_the_dropped_tokens_masked(reducer: Any, images: Tensor) -> None:
    model = make()
    fast = reduce_tokens(model, at(4, reducer))
    found, trace = fast.trace(images)
    x = model.with_class_token(model.sampled(images)[0])
    alive = torch.cat([torch.ones(4, 1, dtype=torch.bool), trace.kept(4)], dim=1)
    for index, block in enumerate(model.blocks, FIRST):
        x = block(x, attn_mask=alive[:, None, None] if index > 4 else None)
    torch.testing.assert_close(found, model.forward_head(model.norm(x)), rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_cost_is_what_the_formulas_say(images: Tensor) -> None:
    model = make()
    fast = reduce_tokens(model, at(4, TopK(Count(9))))
    _, trace = fast.trace(images)
    assert trace.tokens[0].tolist() == [26, 26, 26, 26, 26, 10, 10, 10]
    linear, width = 32 * 32, 32

    def block(entering: int, leaving: int) -> int:
        queries = leaving if entering != leaving else entering
        pairs = 2 * queries * entering * width
        return (2 * entering + 2 * queries) * linear + pairs + 6 * leaving * linear

    dense = float(reduce_tokens(model, Placement()).cost(images)[0])
    saved = 3 * block(26, 26) - block(26, 10) - 2 * block(10, 10)
    own = float(trace.reducer_macs[0])
    assert float(trace.macs[0]) == dense - saved + own
    stem = 7 * 7 * 3 * 8 * 24**2 + 12**2 * (8 * 6 + 9 * 6 * 6 + 6 * 16 + 8 * 16 + 16 * 6 + 9 * 6 * 6 + 6 * 32 + 16 * 32)
    sampling = 3 * (25 * 10 * linear + 2 * 25**2 * width + 25 * 2 * width) + 2 * 25 * 2 * width
    assert dense == stem + sampling + 4 * block(26, 26) + 7 * width


PUBLISHED = {
    "ps_vit_ti_14": (4.8, 1.5651),
    "ps_vit_b_10": (21.3, 3.0907),
    "ps_vit_b_14": (21.3, 5.3800),
    "ps_vit_b_16": (21.3, 6.9115),
    "ps_vit_b_18": (21.3, 8.7407),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "ps_vit_b_14" else pytest.mark.slow) for name in PRESETS]
)
@torch.no_grad()
def test_the_published_models_have_the_published_sizes_and_costs(name: str) -> None:
    with torch.device("meta"):
        model = PRESETS[name]()
        host = host_of(model)
        embedded = host.embed_macs(torch.empty(1, 3, 224, 224))
    tokens = torch.tensor([1.0 + host.patches])
    blocks = sum(
        float(host.block(index).cost.macs(queries=tokens, keys=tokens, outputs=tokens, mlp=tokens))
        for index in range(host.embedded, host.depth)
    )
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert (round(parameters, 1), round((embedded + blocks + host.classifier_macs) / 1e9, 4)) == PUBLISHED[name]


def test_gradients_reach_every_part(images: Tensor) -> None:
    model = make().train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    fast = reduce_tokens(model, at([4, 5], TopK(Ratio(0.7))))
    fast(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_the_authors_weights_are_converted_and_their_scale_is_folded_in() -> None:
    model = make(4)
    theirs: dict[str, Tensor] = {"point_coord": model.first_points()}
    for name, value in model.state_dict().items():
        head, *rest = name.split(".")
        head = {"sampling": "ps_layers", "blocks": "trans_layers", "point_embed": "pos_layer"}.get(head, head)
        rest = [{"block": "transformer_layer", "offset": "offset_layer"}.get(part, part) for part in rest]
        theirs[".".join([head, *rest])] = value.clone()
    for step in range(3):  # one layer under several names, as their checkpoints have it
        for part in ("weight", "bias"):
            theirs[f"ps_layers.{step}.position_layer.{part}"] = theirs[f"pos_layer.{part}"]
    converted = make(5)
    converted.load_state_dict(from_authors(theirs, num_heads=2))
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)

    def with_scale(block: Any, x: Tensor, heads: int) -> Tensor:
        """Their layer under ``qk_scale=D ** -0.5``."""
        query = block.attn.qkv.weight[:32]
        plain = query.clone()
        query.mul_(math.sqrt(16 / 32))  # logits q k 32**-0.5 are those of q sqrt(16 / 32) with 16**-0.5
        out = layer(block, x, heads)
        query.copy_(plain)
        return out

    expected = model.with_class_token(_sampled_with(model, images, with_scale))
    for block in model.blocks:
        expected = with_scale(block, expected, 2)
    torch.testing.assert_close(converted(images), model.forward_head(model.norm(expected)), rtol=0, atol=1e-9)
    assert not torch.allclose(model(images), converted(images), atol=1e-3), "the scale matters"


def _sampled_with(model: PSViT, images: Tensor, run: Any) -> Tensor:
    features, points, said = model.stem(images), model.first_points().expand(len(images), -1, -1), 0.0
    for step in model.sampling:
        said = run(step.block, sample(features, points) + model.point_embed(points / 12) + said, 2)
        points = points if step.offset is None else points + step.offset(said)
    return said


def test_what_is_not_run_exactly_is_refused_by_name(images: Tensor) -> None:
    model = make()
    with pytest.raises(ReducerError, match=r"topk at block 1: blocks 0 to 2 of this PSViT take no reducer"):
        reduce_tokens(model, at([1, 4], TopK(Count(5))))
    with pytest.raises(ReducerError, match="cannot be resized for PSViT"):
        reduce_tokens(model, at(FIRST, build({"name": "small_input", "budget": {"ratio": 0.6}})))(images)
    with pytest.raises(ValueError, match="this PS-ViT takes 48 x 48"):
        reduce_tokens(model, Placement())(torch.zeros(1, 3, 56, 56, dtype=torch.float64))
    with pytest.raises(ReducerError, match="places='mean' is not for this PSViT"):
        reduce_tokens(model, Placement(), places="mean")

    class Other(PSViT):
        pass

    with pytest.raises(UnsupportedModel, match="Other is not supported"):
        host_of(Other(**SIZES))
    replaced = copy.deepcopy(model)
    replaced.blocks[1] = nn.Identity()
    with pytest.raises(UnsupportedModel, match="block 4 is a Identity"):
        host_of(replaced)
    with pytest.raises(ValueError, match="multiple of 4"):
        PSViT(**{**SIZES, "img_size": 50})
    with pytest.raises(ValueError, match="samplings=7 of depth=7"):
        PSViT(**{**SIZES, "samplings": 7})


def settings(name: str) -> dict[str, Any]:
    takes = {parameter.name for parameter in available()[name].settings()}
    budget = {"drop": 5} if name == "tome" else {"ratio": 0.6}
    return {"name": name, **({"budget": budget} if "budget" in takes else {})}


FEW = ("ats", "topk", "evit", "tome", "patch_merger")
EACH = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
    for name in reading("images")
    if name != "small_input"
]


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_every_method_runs_and_an_image_alone_is_the_same_as_in_a_batch(name: str, images: Tensor) -> None:
    model = make(depth=9) if name == "stvit_r" else make()
    blocks: Sequence[int] = {"stvit": [FIRST], "stvit_r": range(FIRST, 9)}.get(name, [4, 5])
    fast = reduce_tokens(model, at(blocks, build(settings(name))))
    together, trace = fast.trace(images)
    assert together.isfinite().all()
    for image in range(len(images)):
        alone, own = fast.trace(images[image : image + 1])
        torch.testing.assert_close(alone[0], together[image], rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[image])
        torch.testing.assert_close(own.macs[0], trace.macs[image])
    torch.testing.assert_close(fast.cost(images), trace.macs)


@torch.no_grad()
def test_a_stack_runs(images: Tensor) -> None:
    fast = reduce_tokens(make(), at(range(4, DEPTH), Stack(ATS(Ratio(0.9)), ToMe(Drop(2)), EViT(Ratio(0.9)))))
    _, trace = fast.trace(images)
    assert (trace.tokens[:, -1] < trace.tokens[:, 4]).all()
    assert fast.host.first_free == FIRST and fast.placement.blocks.keys() == {4, 5, 6}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("make_full", [ps_vit_b_14, ps_vit_b_18])
def test_a_published_model_as_it_is(make_full: Any) -> None:
    torch.manual_seed(0)
    model = make_full().eval()
    image = torch.randn(1, 3, 224, 224)
    fast = reduce_tokens(model, at(range(5, 14), ATS(Count(108))))
    _, trace = fast.trace(image)
    assert (trace.tokens.diff() <= 0).all()
    torch.testing.assert_close(
        reduce_tokens(model, at(range(5, 14), Identity()))(image), model(image), rtol=0, atol=1e-4
    )
