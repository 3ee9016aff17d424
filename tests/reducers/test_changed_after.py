"""A model that its user changes after it was wrapped: timm's own answer, or the refusal it would have met before."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from timm.models.vision_transformer import Attention, Block
from torch import nn
from torch.nn.utils import prune

from reducers import EViT, Identity, Ratio, ReducerError, Stack, ToMe, TopK, UnsupportedModel, at, build, reduce_tokens

from .conftest import DEPTH, make_vit


class LowRank(nn.Module):
    """A frozen layer and what is learned beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x) + self.up(self.down(x))
        return out


def hook(*_: object) -> None:
    pass


def replace_qkv(model):
    model.blocks[1].attn.qkv = LowRank(model.blocks[1].attn.qkv)


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.blocks[1].attn.qkv)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrize_plainly(model):
    torch.nn.utils.parametrize.register_parametrization(model.blocks[2].attn.qkv, "weight", Doubled())


def parametrize_model(model):
    torch.nn.utils.parametrize.register_parametrization(model, "cls_token", Doubled())


class Neighbours(nn.Module):
    """Acts on rows side by side: on packed tokens, across images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, dims=0)


class Windowed(Attention):
    pass


def replace_attention(model):
    model.blocks[1].attn.__class__ = Windowed


def prune_qkv(model):
    prune.l1_unstructured(model.blocks[1].attn.qkv, "weight", amount=0.5)


def drop_path(model):
    model.blocks[1].drop_path1 = nn.Dropout(0.1)


def replace_block(model):
    model.blocks[2] = nn.Sequential(model.blocks[2])


def replace_steps(model):
    model.forward_head = lambda x: x


def replace_forward(model):
    model.blocks[2].attn.forward = lambda x, **_: x


REFUSED = {
    "block 1 has its qkv replaced by a LowRank": replace_qkv,
    "block 1 has its qkv replaced by a ParametrizedLinear": parametrize,
    "block 2 has its qkv replaced by a ParametrizedLinear": parametrize_plainly,
    "block 1 has a forward hook on its attn.qkv.*make the pruning or weight norm permanent": prune_qkv,
    "block 1 has its drop_path1 replaced by a Dropout": drop_path,
    "block 2 is a Sequential": replace_block,
    "model's forward_head was replaced": replace_steps,
    "the forward of block 2's attn was replaced": replace_forward,
    "block 1 has the MLP Mlp, its forward replaced": lambda m: setattr(m.blocks[1].mlp, "forward", lambda x: x),
    "block 1 has the MLP Neighbours, which is not known": lambda m: setattr(m.blocks[1], "mlp", Neighbours()),
    "block 1 attends with Windowed": replace_attention,
    "the model has become a ParametrizedVisionTransformer.*remove the parametrization": parametrize_model,
    "block 1 has its attn_drop replaced": lambda m: setattr(m.blocks[1].attn, "attn_drop", nn.Identity()),
    "the model has a forward hook,": lambda m: m.register_forward_hook(hook, always_call=True),
    "the model has a backward hook,": lambda m: m.register_full_backward_hook(hook),
    "the model has a forward hook on its blocks": lambda m: m.blocks.register_forward_pre_hook(hook),
    "block 2 has a forward hook, which": lambda m: m.blocks[2].register_forward_hook(hook),
    "block 2 has a backward hook on its attn, ": lambda m: m.blocks[2].attn.register_full_backward_pre_hook(hook),
    "block 2 has a forward hook on its attn.qkv": lambda m: m.blocks[2].attn.qkv.register_forward_hook(hook),
    "block 2 has a forward hook on its attn.attn_drop": lambda m: m.blocks[2].attn.attn_drop.register_forward_hook(
        hook
    ),
    "block 2 has a forward hook on its drop_path2": lambda m: m.blocks[2].drop_path2.register_forward_hook(hook),
    "global_pool='no' is not supported": lambda m: setattr(m, "global_pool", "no"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_be_bypassed_is_refused_before_wrapping_and_after(message, images):
    model = make_vit()
    reduced = reduce_tokens(model, at(3, TopK(Ratio(0.5))))
    reduced(images)
    REFUSED[message](model)
    for ask in (reduced, reduced.trace, reduced.cost, lambda _: reduce_tokens(model, at(0, Identity()))):
        with pytest.raises(UnsupportedModel, match=message):
            ask(images)


def test_a_forward_replaced_for_the_whole_process_is_refused(images, monkeypatch):
    reduced = reduce_tokens(make_vit(), at(3, Identity()))
    monkeypatch.setattr(Block, "forward", lambda self, x: x)
    with pytest.raises(UnsupportedModel, match="for the whole process"):
        reduced(images)


def low_rank_mlp(model):
    model.blocks[1].mlp.fc1 = LowRank(model.blocks[1].mlp.fc1)


def narrower_heads(model):
    for block in model.blocks:
        block.attn.num_heads, block.attn.head_dim, block.attn.scale = 4, 8, 0.5


def weight_norms(model):
    torch.nn.utils.parametrizations.weight_norm(model.blocks[2].mlp.fc2)
    torch.nn.utils.parametrizations.weight_norm(model.head).parametrizations.weight.original0.data.mul_(2)


def prune_mlp(model):
    prune.l1_unstructured(model.blocks[1].mlp.fc1, "weight", amount=0.5)
    prune.ln_structured(model.blocks[2].mlp.fc2, "weight", amount=0.5, n=2, dim=0)


def prune_qkv_for_good(model):
    prune_qkv(model)
    prune.remove(model.blocks[1].attn.qkv, "weight")


def parametrize_for_good(model):
    parametrize_plainly(model)
    torch.nn.utils.parametrize.remove_parametrizations(model.blocks[2].attn.qkv, "weight")


def slow_attention(model):
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = False, 0.3


HONOURED = {
    "an adapter in the MLP": low_rank_mlp,
    "an adapter in the projection": lambda m: setattr(m.blocks[1].attn, "proj", LowRank(m.blocks[1].attn.proj)),
    "an adapter in the head": lambda m: setattr(m, "head", LowRank(m.head)),
    "weight norms": weight_norms,
    "pruning in the MLP": prune_mlp,
    "pruning of qkv, made permanent": prune_qkv_for_good,
    "a parametrised qkv, made permanent": parametrize_for_good,
    "other heads": narrower_heads,
    "another scale without the fused kernel": slow_attention,
    "another pool": lambda m: m.reset_classifier(0, "avg"),
    "fewer blocks": lambda m: m.blocks.__delitem__(DEPTH - 1),
    "a doubled norm": lambda m: m.blocks[1].norm1.register_forward_hook(lambda *a: 2 * a[-1]),
    "a doubled embedding": lambda m: m.patch_embed.register_forward_hook(lambda *a: 2 * a[-1]),
}


@pytest.mark.parametrize("change", HONOURED)
@torch.no_grad()
def test_what_is_called_goes_on_being_the_model(change, images):
    model = make_vit()
    reduced = reduce_tokens(model, at([0, 1, 2], Identity()))
    before = reduced(images)
    HONOURED[change](model)
    expected = model(images)
    torch.testing.assert_close(reduced(images), expected, rtol=1e-5, atol=1e-5)
    assert before.shape != expected.shape or not torch.allclose(before, expected, atol=1e-3), "it changed something"


def test_an_adapter_put_in_afterwards_learns(images):
    model = make_vit()
    reduced = reduce_tokens(model, at([1, 2], EViT(Ratio(0.6))))
    low_rank_mlp(model)
    reduced(images).square().sum().backward()
    assert model.blocks[1].mlp.fc1.up.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_what_a_hook_has_seen_stays_as_it_was(images):
    model = make_vit().double()
    reduced, seen = reduce_tokens(model, at(range(DEPTH), Identity())), []
    for block in model.blocks:
        for part in (block.mlp, block.mlp.fc2, block.attn.proj):
            part.register_forward_hook(lambda _module, _args, out: seen.append(out))
    expected = model(images.double())
    theirs, ours = [part.flatten(0, 1) for part in seen], seen
    seen.clear()
    torch.testing.assert_close(reduced(images.double()), expected, rtol=0, atol=1e-9)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_a_placement_beyond_the_blocks_that_are_left_is_refused(images):
    model = make_vit()
    reduced = reduce_tokens(model, at(DEPTH - 1, Identity()))
    del model.blocks[DEPTH - 1]
    with pytest.raises(ReducerError, match="outside the network"):
        reduced(images)


@torch.no_grad()
def test_reducers_put_in_anothers_place_act_at_the_next_call(images):
    """``reducers`` alone owns the placement: a reducer, a block, a member of a stack."""
    model = make_vit()
    reduced = reduce_tokens(model, at(1, Stack(TopK(Ratio(0.5)), Identity())))
    assert reduced.trace(images)[1].tokens[0].tolist() == [37, 37, 19, 19, 19]
    reduced.reducers["2"] = TopK(Ratio(0.5))
    assert reduced.trace(images)[1].tokens[0].tolist() == [37, 37, 19, 10, 10]
    reduced.reducers["1"].reducers[1] = TopK(Ratio(0.5))
    assert reduced.trace(images)[1].tokens[0].tolist() == [37, 37, 10, 5, 5] and len(reduced.members()) == 3
    del reduced.reducers["1"]
    assert reduced.trace(images)[1].tokens[0].tolist() == [37, 37, 37, 19, 19] and reduced.first_block == 2
    reduced.reducers["7"] = Identity()
    with pytest.raises(ReducerError, match="outside the network"):
        reduced(images)


def test_dynamic_quantisation_is_refused_by_name(images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(reduce_tokens(make_vit(), at(1, TopK(Ratio(0.5)))))
        with pytest.raises(UnsupportedModel, match="qkv replaced by a Linear|qkv replaced by a .*Quantized"):
            quantised(images)


def test_a_wrapped_model_is_refused_with_its_remedy():
    model, placement = make_vit(), at(1, Identity())
    for wrapped, remedy in (
        (torch.compile(model), r"torch.compile\(reduce_tokens\(model, placement\)\)"),
        (nn.DataParallel(model), r"DataParallel\(reduce_tokens\(wrapped.module, placement\)\)"),
        (torch.optim.swa_utils.AveragedModel(model), "reduce the model inside"),
        (reduce_tokens(model, placement), r"reduce_tokens\(model.base, first \| second\)"),
    ):
        with pytest.raises(UnsupportedModel, match=remedy):
            reduce_tokens(wrapped, placement)


def replicated(module: nn.Module) -> nn.Module:
    """As ``nn.DataParallel`` copies a module for another device: shallow copies whose parts are then replaced."""
    copies = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, twin in copies.items():
        for name, child in part._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, parameter in part._parameters.items():
            twin._parameters.pop(name, None)
            setattr(twin, name, None if parameter is None else parameter.detach().clone())
    return copies[module]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, replicated])
@torch.no_grad()
def test_copies_use_their_own_reducers(duplicate, images):
    model = reduce_tokens(
        make_vit(), at(1, build({"name": "dynamicvit", "budget": {"ratio": 0.5}})) | at(2, ToMe(Ratio(0.8)))
    )
    names, expected = list(model.state_dict()), model(images)
    twin = duplicate(model)
    assert all(twin.placement.blocks[block] is twin.reducers[str(block)] for block in (1, 2))
    assert not set(map(id, twin.members())) & set(map(id, model.members()))
    assert torch.equal(twin(images), expected)
    for parameter in model.reducers.parameters():
        parameter.fill_(float("nan"))
    assert torch.equal(twin(images), expected), "the copy reads nothing of the original's"
    assert names == list(model.state_dict()) and "reducers.1.predictors.1" in " ".join(names)
