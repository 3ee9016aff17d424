"""Models of transformers as they are: identity with the library, the contract of reducers in one of them, refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

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
)  # fmt: skip
from reducers.hosts import TYPES, host_of
from reducers.hosts.hf_vit import MODELS
from tests.samples import reading, shared_out

from .hf_models import CLASSES, DEPTH, make_hf
from .test_contract import placed, unit
from .test_families import Halved

tf = pytest.importorskip("transformers")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Any, atol: float = 1e-9) -> None:
    assert type(found) is type(expected)
    assert {name for name, value in expected.items() if value is not None} == {
        name for name, value in found.items() if value is not None
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


def test_every_class_of_the_table_is_made_here() -> None:
    assert {path for path, module in TYPES.items() if module.endswith("hf_vit")} == set(MODELS)
    assert {name.split(" ")[0] for name in CLASSES} == {path.rpartition(".")[2] for path in MODELS}
    for path in MODELS:
        module, _, name = path.rpartition(".")
        assert getattr(tf, name).__module__ == module


@pytest.mark.parametrize("name", shared_out(CLASSES))
@torch.no_grad()
def test_without_reduction_the_answer_is_the_librarys_and_the_cost_that_of_its_layers(
    name: str, images: Tensor
) -> None:
    model = make_hf(name)
    expected = model(pixel_values=images)
    for placement in (Placement(), at(range(DEPTH), Identity()), at([1, 3], TopK(Ratio(1.0), score="value_norm"))):
        fast = reduce_tokens(model, placement)
        close(fast(pixel_values=images), expected)
        close(fast(images), expected)
    with FlopCounterMode(display=False) as counter:
        model(pixel_values=images[:1])
    unused = 0.0
    if name == "SiglipForImageClassification":  # its tower pools, and nobody reads that
        unused = float(host_of(model.vision_model).head_macs(host_of(model).embed(images[:1]).layout)[0])
    fast = reduce_tokens(model, at(range(DEPTH), Identity()))
    assert float(fast.trace(images[:1])[1].macs[0]) == pytest.approx(counter.get_total_flops() / 2 - unused, rel=1e-12)
    parts = expected.get("last_hidden_state")
    if parts is not None:
        found = fast.features(images, restore="owner")
        torch.testing.assert_close(found, parts[:, fast.host.prefix :], rtol=0, atol=1e-9)
    if expected.get("pooler_output") is not None:
        torch.testing.assert_close(fast.features(images), expected.pooler_output, rtol=0, atol=1e-9)
        torch.testing.assert_close(fast.trace(images)[0], expected.pooler_output, rtol=0, atol=1e-9)


MASKED = ["ViTForImageClassification", "CLIPVisionModel", "SiglipForImageClassification", "DINOv3ViTModel"]


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_a_gathered_pass_is_the_librarys_layers_on_the_tokens_that_are_left(name: str, images: Tensor) -> None:
    """Attention of the library itself over the kept keys, with their own angles, image by image."""
    model = make_hf(name)
    score = "attention_received" if "Siglip" in name else "class_attention"
    fast = reduce_tokens(model, at(1, ATS(Ratio(1.0), score=score)))
    found, trace = fast.trace(images)
    assert len(set(trace.tokens[:, 2].tolist())) > 1, "images keep different numbers"
    host = fast.host
    for image, kept in enumerate(trace.kept(1)):
        one = images[image : image + 1]
        options: dict[str, Any] = {}
        if name.startswith("DINOv3"):
            options = {"position_embeddings": model.rope_embeddings(one)}
        x = host.embed(one).x[None]
        rows = torch.cat([torch.arange(host.prefix), kept.nonzero().flatten() + host.prefix])
        for index, layer in enumerate(host.layers):
            x = layer(x, None, **options)
            if index == 1:  # attention over all, then the MLP row by row: gathering commutes
                x = x[:, rows]
                options = {key: tuple(table[kept] for table in tables) for key, tables in options.items()}
        x = host.token_features(x)
        if name.startswith("ViT"):
            expected = model.classifier(x[:, 0])
        elif name.startswith("Siglip"):
            expected = model.classifier(x.mean(1))
        else:
            expected = model.post_layernorm(x[:, 0]) if name.startswith("CLIP") else x[:, 0]
        torch.testing.assert_close(found[image : image + 1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DINOv3ViTModel", "SiglipForImageClassification"])
@torch.no_grad()
def test_a_gathered_pass_equals_a_masked_one(name: str, images: Tensor) -> None:
    model = make_hf(name)
    gathered, masked = (reduce_tokens(model, at(1, Halved(gather))).features(images) for gather in (True, False))
    torch.testing.assert_close(masked, gathered, rtol=0, atol=1e-4)
    assert (gathered - reduce_tokens(model, Placement()).features(images)).abs().max() > 1e-2


def settings(name: str) -> dict[str, Any]:
    takes = {parameter.name for parameter in available()[name].settings()}
    return {
        "name": name,
        **({"budget": {"drop": 5} if name == "tome" else {"ratio": 0.6}} if "budget" in takes else {}),
    }


FEW = ("ats", "topk", "evit", "tome", "sinkhorn")
EACH = [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in reading("images")]


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_an_image_alone_is_the_image_in_a_batch(name: str, images: Tensor) -> None:
    reducer = build(settings(name))
    model = make_hf("Dinov2ForImageClassification", num_hidden_layers=max(DEPTH, unit(reducer)))
    fast = reduce_tokens(model, placed(reducer, at_blocks=[1, 3])).double()
    together, trace = fast.trace(images)
    assert torch.isfinite(together).all() and (trace.macs > 0).all()
    torch.testing.assert_close(fast(pixel_values=images).logits, together, rtol=0, atol=1e-12)
    for i in range(len(images)):
        alone, own = fast.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[i])
        torch.testing.assert_close(own.macs[0], trace.macs[i])


@pytest.mark.parametrize("name", EACH)
def test_gradients_are_finite_and_reach_every_part(name: str, images: Tensor) -> None:
    reducer = build(settings(name))
    model = make_hf("Dinov2WithRegistersForImageClassification", num_hidden_layers=max(DEPTH, unit(reducer)))
    fast = reduce_tokens(model, placed(reducer, at_blocks=[1, 3])).double().train()
    labels = torch.arange(len(images))
    answer = fast(pixel_values=images, labels=labels)
    torch.testing.assert_close(answer.loss, nn.functional.cross_entropy(answer.logits, labels), rtol=0, atol=1e-12)
    answer.loss.backward()
    silent = [
        key for key, p in model.named_parameters()
        if "mask_token" not in key and (p.grad is None or not torch.isfinite(p.grad).all())
    ]  # fmt: skip
    assert not silent


KEEP_ALL: dict[str, dict[str, Any]] = {
    "tome": {"budget": {"drop": 0}}, "ats": {"budget": {"count": 4000}}, "avit": {"beta": -1e4},
    "ia_red2": {"threshold": 0},
}  # fmt: skip
NEVER = {"diffrate", "hvt_pool", "shrinking_pattern", "stvit", "stvit_r"}


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in reading("images") if n not in NEVER
])  # fmt: skip
@torch.no_grad()
def test_keeping_everything_is_the_library(name: str, images: Tensor) -> None:
    model = make_hf("ViTForImageClassification")
    spec = {**settings(name), **KEEP_ALL.get(name, {})}
    if name not in KEEP_ALL and "budget" in spec:
        spec["budget"] = {"ratio": 1.0}
    fast = reduce_tokens(model, at(range(DEPTH), build(spec))).double()
    torch.testing.assert_close(fast(images).logits, model(images).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DINOv3ViTModel"])
@torch.no_grad()
def test_blocks_in_which_no_token_is_left_compute_nothing(name: str, images: Tensor) -> None:
    """Every token halts at its first chance; the blocks behind are the library's, and reducers' once more."""
    model = make_hf(name)
    halts = build({"name": "avit", "beta": 1e4})
    found, trace = reduce_tokens(model, at([0, 1], halts)).double().trace(images)
    more, other = reduce_tokens(model, at([0, 1, 3], build({"name": "avit", "beta": 1e4}))).double().trace(images)
    assert not trace.tokens[:, 2:].any() and torch.equal(trace.macs, other.macs)
    for one, two in ((found, more),) if isinstance(found, Tensor) else zip(found.values(), more.values(), strict=True):
        assert one.isfinite().all() and torch.equal(one, two)


@torch.no_grad()
def test_last_hidden_state_is_restored_by_owner_and_a_method_that_drops_is_refused_with_the_rules(
    images: Tensor,
) -> None:
    model = make_hf("DINOv3ViTModel")
    merging = reduce_tokens(model, at([1, 2], ToMe(Drop(8))))
    found, trace = merging(pixel_values=images), merging.trace(images)[1]
    assert found.last_hidden_state.shape == model(images).last_hidden_state.shape
    owner = trace.owner(DEPTH - 1)
    for image in range(len(images)):
        for token in set(owner[image].tolist()):
            alike = found.last_hidden_state[image, 4:][owner[image] == token]
            assert torch.equal(alike, alike[:1].expand_as(alike))
    torch.testing.assert_close(found.pooler_output, merging.features(images), rtol=0, atol=1e-12)
    dropping = reduce_tokens(model, at(1, TopK(Ratio(0.5))))
    with pytest.raises(ReducerError, match='topk at block 1 drops patches.*restore="zero"'):
        dropping(pixel_values=images)
    answer = dropping(pixel_values=images, restore="zero")
    gone = dropping.trace(images)[1].owner(DEPTH - 1) < 0
    assert not answer.last_hidden_state[:, 4:][gone].any() and answer.last_hidden_state[:, 4:][~gone].all()
    assert dropping(pixel_values=images, restore="last", return_dict=False)[0].shape == (4, 40, 32)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModel", "Dinov2Model", "DINOv3ViTModel"])
@torch.no_grad()
def test_images_of_another_size_are_taken_as_the_library_takes_them(name: str, images: Tensor) -> None:
    model, wide = make_hf(name), torch.randn(2, 3, 64, 40, dtype=torch.float64)
    fast = reduce_tokens(model, at([0, 2], ToMe(Drop(0))))
    if name.startswith(("ViT", "CLIP")):
        with pytest.raises(ReducerError, match="64 x 40 px .* 48 x 48; resize .*interpolate_pos_encoding"):
            fast(wide)
        close(fast(pixel_values=wide, interpolate_pos_encoding=True), model(wide, interpolate_pos_encoding=True))
    else:
        close(fast(wide), model(wide))
        assert fast.trace(wide)[1].tokens[0, 0] == fast.host.prefix + 40


@pytest.mark.parametrize("name", ["Dinov2Model", "DINOv3ViTModel"])
@torch.no_grad()
def test_a_smaller_input_is_the_library_on_smaller_images(name: str, images: Tensor) -> None:
    model = make_hf(name)
    fast = reduce_tokens(model, at(0, build({"name": "small_input", "budget": {"count": 9}})))
    smaller = F.interpolate(images, (24, 24), mode="bicubic", antialias=True)
    prefix = fast.host.prefix
    same = partial(torch.testing.assert_close, rtol=0, atol=1e-9)
    same(fast(images).pooler_output, model(smaller).pooler_output)
    assert fast(images).last_hidden_state.shape == (4, prefix + 36, 32)
    assert fast.trace(images)[1].tokens[0, 0] == prefix + 9
    # and where a block reduces after it, places are told in the image as it was given
    both = reduce_tokens(model, at(0, build({"name": "small_input", "budget": {"count": 9}})) | at(1, TopK(Count(9))))
    same(both(pixel_values=images, restore="zero").pooler_output, model(smaller).pooler_output)


@torch.no_grad()
def test_stochastic_depth_dropout_and_checkpointing_are_the_models_own(images: Tensor) -> None:
    model = make_hf("Dinov2ForImageClassification", drop_path_rate=1.0 - 1e-12, hidden_dropout_prob=0.0).train()
    fast = reduce_tokens(model, at(1, Identity()))
    torch.manual_seed(0)
    x = model.dinov2.layernorm(model.dinov2.embeddings(images))  # every branch is dropped
    expected = model.classifier(torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1))
    torch.testing.assert_close(fast(images).logits, expected, rtol=0, atol=1e-9)
    vit = make_hf("ViTForImageClassification", attention_probs_dropout_prob=0.5)
    reduced = reduce_tokens(vit, at(1, Identity()))
    assert torch.equal(reduced(images).logits, reduced(images).logits)
    reduced.train()
    assert not torch.equal(reduced(images).logits, reduced(images).logits)


def test_gradient_checkpointing_of_the_model_is_honoured(images: Tensor) -> None:
    grads = []
    for again in (False, True):
        model = make_hf("ViTForImageClassification").train()
        if again:
            model.activation_checkpointing_enable()
        fast = reduce_tokens(model, at([1, 3], Stack(EViT(Ratio(0.8)), ToMe(Drop(3)))))
        assert fast.host.checkpoints is again
        fast(images).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


class _Attention(nn.Module):
    pass


def _spoil(model: Any, where: str) -> None:
    layer = model.vit.layers[2]
    if where == "layer":
        model.vit.layers[2] = nn.Sequential(layer)
    elif where == "attention":
        layer.attention = _Attention()
    elif where == "mlp":
        layer.mlp = nn.Conv1d(37, 37, 1)
    elif where == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif where == "forward":
        layer.attention.forward = lambda *_: None
    elif where == "device_map":
        model.vit.forward = lambda *_: None
    else:
        model.config._attn_implementation = model.vit.config._attn_implementation = "mine"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("layer", "layer 2 is a Sequential, not transformers' ViTLayer.*put the plain layer back"),
        ("attention", "layer 2 attends with _Attention, not transformers' ViTAttention.*put the plain attention back"),
        ("mlp", "layer 2 has the MLP Conv1d, which is not known to act token by token"),
        ("hook", "layer 2 has a forward hook, which would be bypassed; remove it"),
        ("forward", "the forward of layer 2's attention was replaced"),
        ("device_map", "the forward of ViTForImageClassification's tower was replaced.*device_map"),
        ("implementation", "attn_implementation='mine'.*set_attn_implementation\\('sdpa'\\)"),
    ],
)
def test_an_unknown_part_is_refused_by_name_with_the_remedy_also_after_wrapping(
    where: str, message: str, images: Tensor
) -> None:
    model = make_hf("ViTForImageClassification")
    fast = reduce_tokens(model, Placement())
    _spoil(model, where)
    for ask in (fast, lambda _: reduce_tokens(model, Placement())):
        with pytest.raises(UnsupportedModel, match=message):
            ask(images)


@torch.no_grad()
def test_what_the_library_records_of_itself_is_no_obstacle(images: Tensor) -> None:
    model = make_hf("ViTForImageClassification")
    assert len(model(images, output_hidden_states=True).hidden_states) == DEPTH + 1
    close(reduce_tokens(model, at(1, Identity()))(images), model(images))


def test_what_a_reduced_model_does_not_answer_is_refused_by_name(images: Tensor) -> None:
    fast = reduce_tokens(make_hf("ViTForImageClassification"), at(1, TopK(Ratio(0.5))))
    for named, message in (
        ({"output_attentions": True}, "does not answer output_attentions=…; it takes interpolate_pos_encoding, labels"),
        ({"restore": "zero"}, "returns no last_hidden_state"),
        ({}, r"is called as fast\(pixel_values=…\)"),
    ):
        with pytest.raises(ReducerError, match=message):
            fast(**({"pixel_values": images, **named} if named else {}))
    with pytest.raises(ReducerError, match="computes no loss"):
        reduce_tokens(make_hf("ViTModel"), Placement())(pixel_values=images, labels=torch.zeros(4))
    with pytest.raises(ReducerError, match=r"reads images \(B, 3, H, W\)"):
        fast(images[:, :1])
    with pytest.raises(ReducerError, match="topk needs a class token"):
        reduce_tokens(make_hf("SiglipVisionModel"), at(1, TopK(Count(9))))
    whole = tf.CLIPModel(tf.CLIPConfig(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
    ))  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"CLIPModel reads text .*reduce_tokens\(model.vision_model, …\)"):
        reduce_tokens(whole, Placement())
    assert reduce_tokens(copy.deepcopy(whole.vision_model), Placement()).host.depth == 1


@pytest.mark.slow  # another interpreter imports torch
def test_transformers_is_imported_by_nobody_before_a_model_of_it_comes() -> None:
    code = (
        "import sys, reducers.hosts.hf_vit as here; here.HFViT.entry_points(here.HFViT.families[0]); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
