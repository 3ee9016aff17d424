"""timm's families beside the plain ViT: without reduction they are timm's, and what travels with a token travels."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers import RotaryEmbeddingCat
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reducers import (
    ATS,
    Decision,
    EViT,
    Identity,
    Keep,
    Merge,
    Placement,
    Ratio,
    ReducerError,
    State,
    TokenReducer,
    ToMe,
    TopK,
    UnsupportedModel,
    at,
    build,
    reduce_tokens,
)  # fmt: skip
from reducers.decision import advance
from reducers.hosts import host_of, hosts
from reducers.maps import Mask, keep_patches
from reducers.runtime.attention import PackedAttention
from reducers.runtime.plain import Listener
from reducers.signals import Signals
from tests.samples import reading, sampled, shared_out

from .conftest import DEPTH
from .test_contract import KEEP_ALL, NEVER_THE_IDENTITY, placed, settings, unit
from .timm_models import FAMILIES, MODELS, PLACED, ROPES, filled, made, shallow

each = pytest.mark.parametrize("name", MODELS)
turns = pytest.mark.parametrize("name", shared_out(MODELS))
CONTRACT = ("eva02", "dinov3", "beit", "naflex")
QUICK = {"ats", "topk", "evit", "tome", "dynamicvit"}
BLOCKS = [1, 3]


@pytest.fixture
def scenes() -> Tensor:
    """Three images, float64."""
    return torch.randn(3, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- without reduction ------------------------------------------------------------------------------------------------


@each
@torch.no_grad()
def test_without_reduction_a_model_is_timms_block_by_block_and_by_its_own_blocks(name: str, scenes: Tensor) -> None:
    model = made(name)
    expected = model(scenes)
    assert expected.abs().max() > 0.3
    for placement in (Placement(), at(1, Identity()), at(range(DEPTH), Identity())):
        found, trace = reduce_tokens(model, placement).trace(scenes)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(reduce_tokens(model, placement)(scenes[:1]), expected[:1], rtol=0, atol=1e-9)
        assert (trace.tokens == 36 + model.num_prefix_tokens).all()
    assert reduce_tokens(model, at(1, TopK(Ratio(0.5), score="value_norm")))(scenes[:0]).shape == (0, expected.shape[1])


@turns
def test_gradients_reach_every_parameter_and_without_reduction_they_are_timms(name: str, scenes: Tensor) -> None:
    model = made(name)
    model(scenes).square().sum().backward()
    expected = {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    reduce_tokens(model, at(range(DEPTH), Identity()))(scenes).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (key in expected) == (parameter.grad is not None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-7, atol=1e-9, msg=key)
    model.zero_grad()
    reduce_tokens(model, at(BLOCKS, ToMe(Ratio(0.8))))(scenes).square().sum().backward()
    silent = [key for key in expected if model.get_parameter(key).grad is None]
    assert not silent
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def multiply_adds(model: nn.Module, *arguments: Any) -> float:
    """Of a pass, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        model(*arguments)
    return counter.get_total_flops() / 2


def bias_macs(model: Any) -> float:
    """Of the MLPs that make relative positions, once a pass: the same for all images, so no image's."""
    biases = [model.shared_rel_pos] if getattr(model, "shared_rel_pos", None) is not None else [
        block.attn.rel_pos for block in model.blocks if getattr(block.attn, "rel_pos", None) is not None
    ]  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        for bias in biases:
            bias.get_bias()
    return counter.get_total_flops() / 2


@turns
@torch.no_grad()
def test_costs_are_what_torch_counts(name: str, scenes: Tensor) -> None:
    model, one = made(name).requires_grad_(False), scenes[:1]
    dense = reduce_tokens(model, Placement()).trace(one)[1].macs[0]
    assert float(dense) == multiply_adds(model, one) - bias_macs(model)
    for placement in (at(range(DEPTH), Identity()), at(BLOCKS, TopK(Ratio(0.6), score="value_norm"))):
        fast = reduce_tokens(model, placement)
        trace = fast.trace(one)[1]  # the reducer's norms are no product that torch counts
        assert float(trace.macs[0] - trace.reducer_macs[0]) == multiply_adds(fast, one) - bias_macs(model)
        assert float(fast.cost(one)[0]) == float(fast.trace(one)[1].macs[0])


# --- places -----------------------------------------------------------------------------------------------------------


class Shuffled(TokenReducer):
    """The patches in another order, each image in its own."""

    name = "shuffled"

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        assert layout.uniform is not None
        tokens, prefix = layout.uniform
        generator = torch.Generator().manual_seed(state.block)
        orders = [prefix + torch.randperm(tokens - prefix, generator=generator) for _ in range(layout.images)]
        rows = [
            torch.cat([torch.arange(prefix), order]) + int(s) for order, s in zip(orders, layout.starts, strict=True)
        ]
        return Decision(Keep(layout, layout, torch.cat(rows)))


class Unplaced(TokenReducer):
    """A block that does nothing, or makes all tokens forget their places."""

    name = "unplaced"

    def __init__(self, forget: bool) -> None:
        super().__init__()
        self.forget = forget

    def decide(self, signals: Signals, state: State) -> Decision | None:
        return None

    def block(self, block: Any, batch: Any, state: State) -> Any:
        return replace(batch, pos=torch.full_like(batch.pos, -1)) if self.forget else batch


@pytest.mark.parametrize("name", PLACED)
@torch.no_grad()
def test_tokens_shuffled_with_their_places_change_nothing_and_without_them_they_do(name: str, scenes: Tensor) -> None:
    model = made(name)
    expected = model(scenes)
    for blocks in ([0], [1], [0, 2]):
        found = reduce_tokens(model, at(blocks, Shuffled()))(scenes)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    with_places, without = (reduce_tokens(model, at(0, Unplaced(forget)))(scenes) for forget in (False, True))
    assert (with_places - without).abs().max() > 1e-3


@pytest.mark.parametrize("name", PLACED)
@torch.no_grad()
def test_what_is_left_is_what_timms_blocks_compute_of_those_rows(name: str, scenes: Tensor) -> None:
    """A selection at the last block but one, then timm's block on its rows with their own rotations or biases."""
    model, host = made(name), host_of(made(name))
    kept = torch.tensor([0, 3, 8, 9, 17, 22, 30, 35])
    prefix = model.num_prefix_tokens
    rows = torch.cat([torch.arange(prefix), prefix + kept])

    class These(TokenReducer):
        name = "these"

        def decide(self, signals: Signals, state: State) -> Decision | None:
            chosen = torch.zeros(signals.layout.images, 36, dtype=torch.bool)
            chosen[:, kept] = True
            return Decision(keep_patches(signals.layout, chosen))

    batch = host.embed(scenes)
    length = 36 + prefix
    for index in range(DEPTH - 1):
        after = host.plain(index, index + 1, batch)
        assert after is not None
        batch = after
    x = batch.x.view(len(scenes), length, -1)[:, rows]  # after the block: its MLP works row by row
    block = model.blocks[DEPTH - 1]
    if name in ROPES or name.startswith("pe"):
        table = host.embed(scenes).tables.of_block(DEPTH - 1)[kept].transpose(0, 1)
        x = block(x, rope=table)
    else:
        x = _biased_by_hand(model, block, x, rows)
    found = reduce_tokens(model, at(DEPTH - 2, These()))(scenes)
    torch.testing.assert_close(found, model.forward_head(model.norm(x)), rtol=0, atol=1e-9)


def _biased_by_hand(model: Any, block: Any, x: Tensor, rows: Tensor) -> Tensor:
    """A block whose biases are those of some rows, by timm's own forward without a bias of its own."""
    attn = copy.copy(block.attn)
    if hasattr(attn, "rel_pos"):
        shared = model.shared_rel_pos.get_bias() if model.shared_rel_pos is not None else attn.rel_pos.get_bias()
        attn._modules = {**attn._modules, "rel_pos": None}
        named = {"shared_rel_pos": shared[..., rows[:, None], rows]}
    else:
        shared = attn._get_rel_pos_bias() + (0 if model.rel_pos_bias is None else model.rel_pos_bias())
        attn._parameters = {**attn._parameters, "relative_position_bias_table": None}
        named = {"shared_rel_pos_bias": shared[..., rows[:, None], rows]}
    twin = copy.copy(block)
    twin._modules = {**block._modules, "attn": attn}
    found: Tensor = twin(x, **named)
    return found


def merged(batch: Any, groups: list[list[int]]) -> Any:
    """Every image's patches of a group made one, in the place of the group's first."""
    layout = batch.layout
    prefix, tokens = int(layout.lead), layout.longest
    goes, weight = list(range(tokens)), [1.0] * tokens
    for group in groups:
        for member in group:
            goes[prefix + member] = prefix + group[0]
            weight[prefix + member] = (1.5 if member == group[0] else 1.0) / (len(group) + 0.5)
    left = sorted(set(goes))
    goes = [left.index(row) for row in goes]
    new = layout.alike(layout.images, len(left), prefix, batch.x.device)
    group_rows = torch.tensor(goes).repeat(layout.images) + new.starts.repeat_interleave(tokens)
    return advance(batch, Decision(Merge(layout, new, group_rows, torch.tensor(weight).repeat(layout.images))))


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_merged_tokens_lie_where_the_heaviest_did_or_at_the_mean_by_size(name: str, scenes: Tensor) -> None:
    model = made(name)
    heaviest, mean = (host_of(model, places=places).embed(scenes) for places in ("heaviest", "mean"))  # type: ignore[arg-type]
    table = heaviest.tables.of_block(2)
    # 6 x 6 patches: 0, 2 and 12, 14 are corners of a square around 7; then 7 itself five times over with 25 moves it
    at_first = merged(heaviest, [[0, 2, 12, 14], [20, 21]])
    at_mean = merged(mean, [[0, 2, 12, 14], [20, 22]])
    prefix = model.num_prefix_tokens
    rows = at_first.tables.rows(at_first, 2).view(3, -1, *table.shape[1:])
    torch.testing.assert_close(rows[0, prefix], table[0], rtol=0, atol=0)
    rows = at_mean.tables.rows(at_mean, 2).view(3, -1, *table.shape[1:])
    torch.testing.assert_close(rows[1, prefix], table[7], rtol=0, atol=1e-5)
    place = prefix + 20 - 3  # three tokens before it are gone
    torch.testing.assert_close(rows[1, place], table[21], rtol=0, atol=1e-5)
    again = merged(at_mean, [[0, 1]])  # four patches around 7, and patch 1 (numbered anew): (4 * 7 + 1) / 5
    sums = again.centroid.view(3, -1, 3)[0, prefix]
    assert sums[2] == 5
    expected = mean.centroid.view(3, -1, 3)[0, prefix + torch.tensor([0, 2, 12, 14, 1])].sum(0)
    torch.testing.assert_close(sums, expected)
    if prefix:
        still = rows[:, :prefix].chunk(2, dim=-1)
        assert (still[0] == 0).all() and (still[1] == 1).all()


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_mean_places_change_what_merging_does_and_nothing_else(name: str, scenes: Tensor) -> None:
    model = made(name)
    plain = model(scenes)
    keep = at(BLOCKS, TopK(Ratio(0.5), score="value_norm"))
    merge = at(BLOCKS, ToMe(Ratio(0.6)))
    torch.testing.assert_close(reduce_tokens(model, at(1, Identity()), places="mean")(scenes), plain, rtol=0, atol=1e-9)
    assert torch.equal(reduce_tokens(model, keep, places="mean")(scenes), reduce_tokens(model, keep)(scenes))
    fast = reduce_tokens(model, merge, places="mean")
    together = fast(scenes)
    assert (together - reduce_tokens(model, merge)(scenes)).abs().max() > 1e-4
    torch.testing.assert_close(fast(scenes[1:2]), together[1:2], rtol=0, atol=1e-9)
    torch.testing.assert_close(fast.trace(scenes)[0], together, rtol=0, atol=1e-9)
    assert torch.equal(copy.deepcopy(fast)(scenes), together)


def test_mean_places_are_refused_by_name_where_they_mean_nothing(scenes: Tensor) -> None:
    for name in ("eva", "beit", "relpos", "naflex"):
        with pytest.raises(ReducerError, match=f"places='mean' is not for this {type(made(name)).__name__}"):
            reduce_tokens(made(name), Placement(), places="mean")
    with pytest.raises(ReducerError, match="places='middle' is unknown"):
        reduce_tokens(made("eva02"), Placement(), places="middle")  # type: ignore[arg-type]
    model = made("dinov3").train()  # its coordinates move in training
    with pytest.raises(ReducerError, match="aug_active = False"):
        reduce_tokens(model, Placement(), places="mean")(scenes)
    model.rope.aug_active = False
    assert torch.isfinite(reduce_tokens(model, Placement(), places="mean")(scenes)).all()


@torch.no_grad()
def test_reducers_see_keys_as_they_are_before_they_are_turned_and_under_every_head(scenes: Tensor) -> None:
    for name in ("sapiens2", "eva02"):
        model = made(name)
        listener = Listener(lambda signals: signals.keys())
        reduce_tokens(model, at(1, listener))(scenes)
        host = host_of(model)
        batch = host.plain(0, 1, host.embed(scenes))
        assert batch is not None
        attn = model.blocks[1].attn
        keys = attn.k_norm(attn.k_proj(model.blocks[1].norm1(batch.x)).unflatten(1, (-1, attn.head_dim)))
        keys = keys.repeat_interleave(2 // keys.shape[1], dim=1)
        torch.testing.assert_close(listener.heard[0], keys, rtol=0, atol=1e-12)
        turned = PackedAttention(host.block(1).core(batch), None).turned_keys
        assert (turned - keys).abs().max() > 0.1


# --- images of other sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eva02", "dinov3", "rope mixed", "pe", "naflex", "naflex rope"])
@torch.no_grad()
def test_a_smaller_image_is_the_model_at_that_size(name: str, scenes: Tensor) -> None:
    model = made(name)
    small = build({"name": "small_input", "budget": {"count": 16}})
    resized = small.prepare(scenes, host_of(model))
    assert resized.shape[-2:] == (32, 32)
    twin = copy.deepcopy(model)
    if not name.startswith("naflex") and name != "dinov3":
        twin.set_input_size((32, 32))
    expected = twin(resized)
    fast = reduce_tokens(model, at(0, small))
    torch.testing.assert_close(fast(scenes), expected, rtol=0, atol=1e-6)  # timm makes tables in float32
    # traced, places are told among the patches of the image as it was given, and still find their rows
    logits, trace = fast.trace(scenes)
    torch.testing.assert_close(logits, fast(scenes), rtol=0, atol=1e-12)
    assert trace.kept(DEPTH - 1).sum(1).tolist() == [16] * 3
    torch.testing.assert_close(
        fast(scenes), reduce_tokens(model, at(0, small) | at(range(1, DEPTH), Identity()))(scenes)
    )


@torch.no_grad()
def test_models_of_one_grid_are_not_resized_and_say_what_to_do(scenes: Tensor) -> None:
    small = build({"name": "small_input", "budget": {"count": 16}})
    for name in ("beit", "relpos"):
        with pytest.raises(ReducerError, match=r"set_input_size"):
            reduce_tokens(made(name), at(0, small))(scenes)
    with pytest.raises(ReducerError, match="no ready patches"):
        reduce_tokens(made("naflex"), Placement())({"patches": scenes})


# --- the contract -----------------------------------------------------------------------------------------------------


def fits(name: str, reducer: TokenReducer, model: str) -> bool:
    """Whether a method can act in a model: BEiT has tables for one grid."""
    return not (reducer.name == "small_input" and model == "beit")


@pytest.mark.parametrize("model", CONTRACT)
@pytest.mark.parametrize("name", sampled(reading("images"), quick=QUICK))
def test_the_contract_holds_in_every_family(name: str, model: str, scenes: Tensor) -> None:
    """Alone as in a batch, repeatable, costs positive and the same without running on, gradients finite."""
    reducer = settings(name)
    if not fits(name, reducer, model):
        with pytest.raises(ReducerError, match="cannot be resized"):
            reduce_tokens(made(model), at(BLOCKS, reducer))(scenes)
        return
    depth = DEPTH if unit(reducer) == 1 else unit(reducer) + 1
    fast = reduce_tokens(made(model, depth=depth), placed(reducer, at_blocks=BLOCKS)).double()
    with torch.no_grad():
        together, trace = fast.trace(scenes)
        torch.testing.assert_close(fast(scenes), together, rtol=0, atol=1e-12)
        assert torch.isfinite(together).all() and (trace.macs > 0).all()
        torch.testing.assert_close(fast.cost(scenes), trace.macs)
        alone, own = fast.trace(scenes[2:])
        torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-9)
        torch.testing.assert_close(own.macs[0], trace.macs[2])
        assert torch.equal(own.tokens[0], trace.tokens[2])
    # some act before, or as they have learned, or give all tokens back
    if name not in ("identity", "small_input", "avit", "ia_red2") and unit(reducer) == 1:
        assert (trace.tokens[:, -1] < trace.tokens[:, 0]).all()
    images = scenes.clone().requires_grad_()
    for parameter in fast.parameters():
        parameter.requires_grad_()
    fast.train()(images).square().sum().backward()
    assert images.grad is not None and torch.isfinite(images.grad).all() and images.grad.any()
    assert all(torch.isfinite(p.grad).all() for p in fast.parameters() if p.grad is not None)


@pytest.mark.parametrize("model", CONTRACT)
@pytest.mark.parametrize(
    "name", sampled([name for name in reading("images") if name not in NEVER_THE_IDENTITY], quick=QUICK)
)
@torch.no_grad()
def test_keeping_everything_is_the_plain_model(name: str, model: str, scenes: Tensor) -> None:
    plain = made(model)
    fast = reduce_tokens(plain, at(range(DEPTH), settings(name, KEEP_ALL.get(name, Ratio(1.0)))))
    if name == "small_input" and model == "beit":
        return
    torch.testing.assert_close(fast(scenes), plain(scenes), rtol=0, atol=1e-9)


class Halved(TokenReducer):
    """Keeps every third patch from the image's number on, by a gather or by a mask."""

    name = "halved"

    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.gather = gather

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout = signals.layout
        place = layout.row_index - layout.prefix[layout.row_image]
        left = layout.is_prefix | ((place + layout.row_image) % 3 == 0)
        mask = Mask.of(layout, left.double())
        return Decision(mask.harden() if self.gather else mask)


@pytest.mark.parametrize("name", [*CONTRACT, "rope mixed", "pe", "relpos", "relpos table", "sapiens2", "naflex rope"])
@torch.no_grad()
def test_a_gathered_pass_equals_a_masked_one(name: str, scenes: Tensor) -> None:
    model = made(name)
    gathered, masked = (reduce_tokens(model, at(1, Halved(gather)))(scenes) for gather in (True, False))
    torch.testing.assert_close(masked, gathered, rtol=0, atol=1e-4)
    assert (gathered - model(scenes)).abs().max() > 1e-2


@torch.no_grad()
def test_a_headless_model_gives_what_timm_gives(scenes: Tensor) -> None:
    model = made("dinov3")
    assert host_of(model).classes == 0
    features = reduce_tokens(model, at(1, EViT(Ratio(0.5))))(scenes)
    assert features.shape == (3, 32) == model(scenes).shape


def test_half_precision_and_checkpointing_run(scenes: Tensor) -> None:
    for name in ("eva02", "rope mixed", "beit", "relpos", "naflex"):
        model = made(name).bfloat16()
        out = reduce_tokens(model, at(BLOCKS, ToMe(Ratio(0.7))))(scenes.bfloat16())
        assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
        model = made(name)
        fast = reduce_tokens(model, at(BLOCKS, ATS(Ratio(0.7), score="value_norm")))
        fast(scenes).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        model.set_grad_checkpointing()
        fast(scenes).square().sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, expected, strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


class OtherRope(RotaryEmbeddingCat):
    """A rope that is not timm's own."""


def _with_talking_heads(model: Any) -> None:
    model.blocks[2].attn = TalkingHeadAttn(32, num_heads=2)


def _with_another_rope(model: Any) -> None:
    model.rope = OtherRope(16, in_pixels=False, feat_shape=[6, 6])


def _with_another_bias(model: Any) -> None:
    model.blocks[2].attn.rel_pos = nn.Identity()


def _with_another_shared_bias(model: Any) -> None:
    model.rel_pos_bias = nn.Identity()


def _with_another_block(model: Any) -> None:
    model.blocks[2] = type("OtherBlock", (type(model.blocks[2]),), {})(32, 2)


def _with_a_hook(model: Any) -> None:
    model.blocks[2].attn.register_forward_hook(lambda *_: None)


def _with_mixing_tokens(model: Any) -> None:
    model.blocks[2].mlp = nn.Conv1d(32, 32, 1)


def _dropping_patches(model: Any) -> None:
    model.patch_drop = nn.Dropout(0.5)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("eva02", _with_talking_heads, "block 2 attends with TalkingHeadAttn"),
        ("beit", _with_talking_heads, "block 2 attends with TalkingHeadAttn"),
        ("eva02", _with_another_rope, "turns queries and keys by a OtherRope"),
        ("relpos", _with_another_bias, r"block 2's attn.rel_pos is a Identity"),
        ("beit shared", _with_another_shared_bias, "relative positions are a Identity"),
        ("relpos", _with_another_block, "block 2 is a OtherBlock"),
        ("naflex", _with_a_hook, "block 2 has a forward hook on its attn"),
        ("naflex", _with_mixing_tokens, "block 2 has the MLP Conv1d"),
        ("eva02", _dropping_patches, "patch_drop_rate"),
    ],
)
def test_an_unknown_part_is_refused_by_its_name(name: str, change: Any, said: str, scenes: Tensor) -> None:
    model = made(name)
    fast = reduce_tokens(model, at(1, TopK(Ratio(0.5), score="value_norm")))
    change(model)
    for ask in (lambda: fast(scenes), lambda: reduce_tokens(model, Placement())):
        with pytest.raises(UnsupportedModel, match=said) as refusal:
            ask()
        assert "Supported" in str(refusal.value) or "create" in str(refusal.value)


# --- every entry point ------------------------------------------------------------------------------------------------

REFUSED: set[str] = set()


def test_at_least_290_entry_points_are_driven() -> None:
    driven = {
        name
        for host in hosts()
        for family in host.families
        for name in set(host.entry_points(family)) - {name for names in family.refused.values() for name in names}
    }
    assert len(driven) >= 290
    assert {family.name for host in hosts() for family in host.families} >= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_families_those_and_no_others_are_refused(family: str) -> None:
    """On the meta device, two blocks of each; of entry points that differ in the size of their images alone, one."""
    names = {name.rstrip("0123456789"): name for name in timm.list_models(module=family)}
    refused = set()
    for name in names.values():
        probe = shallow(name)
        try:
            host_of(probe)
        except UnsupportedModel:
            refused.add(name)
    assert refused == REFUSED


_QUICK = ("cait", "pit", "twins", "xcit")
NOT_DRIVEN = {  # timm's further transformers: module -> entry points, every one of which is refused by its type
    "cait": 10, "coat": 8, "convit": 3, "crossvit": 11, "davit": 8, "deepseek_vit": 3, "efficientformer": 3,
    "efficientformer_v2": 4, "gcvit": 5, "gemma4_vit": 4, "hiera": 8, "hieradet_sam2": 5, "levit": 20, "maxxvit": 58,
    "mobilevit": 10, "mvitv2": 8, "nest": 6, "nextvit": 3, "pit": 8, "pvt_v2": 7, "qwen3_vit": 9,
    "swin_transformer_v2": 12, "swin_transformer_v2_cr": 16, "tiny_vit": 5, "tnt": 3,
    "twins": 6, "visformer": 2, "vision_transformer_sam": 4, "volo": 11, "xcit": 28,
}  # fmt: skip


def test_further_families_are_known_by_name() -> None:
    assert {module: len(timm.list_models(module=module)) for module in NOT_DRIVEN} == NOT_DRIVEN
    assert not NOT_DRIVEN.keys() & {family.name for host in hosts() for family in host.families}


@pytest.mark.parametrize("module", [pytest.param(m, marks=() if m in _QUICK else pytest.mark.slow) for m in NOT_DRIVEN])
def test_a_further_family_is_refused_by_its_type(module: str) -> None:
    """Under ``slow`` every entry point of every module, in ``make test`` one of each of a few."""
    names = timm.list_models(module=module)
    for name in names[:1] if module in _QUICK else names:
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(UnsupportedModel, match=f"^{type(model).__name__} is not supported. Supported: timm"):
            reduce_tokens(model, Placement())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_no_reduction_is_plain_timm_on_every_entry_point(family: str) -> None:
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    checked = 0
    for name in timm.list_models(module=family):
        model, images = filled(name, noise)
        expected = model(images)
        scale = float(expected.abs().max())
        assert scale > 1e-3, name
        for placement in (Placement(), at([0, 1], Identity())):
            found = reduce_tokens(model, placement)(images)
            torch.testing.assert_close(
                found, expected, rtol=0, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
            )
        checked += 1
    assert checked >= {"eva": 65, "beit": 7, "vision_transformer_relpos": 14, "naflexvit": 14}[family]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="this VisionTransformer has no blocks left"):
        reduce_tokens(timm.create_model("vit_tiny_patch16_224", depth=0), Placement())
