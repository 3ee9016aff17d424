"""timm's Swin: windows are units of one layout, without a mask; what is left of them is what a masked Swin computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reducers import (
    ATS,
    Count,
    Decision,
    Drop,
    EViT,
    Flat,
    Identity,
    Keep,
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
    UnsupportedModel,
    at,
    reduce_tokens,
)  # fmt: skip
from reducers.hosts import host_of
from reducers.hosts.timm_swin import TimmSwin, windows
from reducers.maps import Mask, Merge, keep_patches
from reducers.methods import DynamicViT
from reducers.signals import Signals
from reducers.tokens import Layout
from tests.samples import sampled

from .test_contract import CASES

SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
    "num_classes": 7, "drop_path_rate": 0.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "two stages": {},  # 8 x 8 and 4 x 4
    "padded": {"img_size": 36},  # 9 x 9 in windows of 4, and 5 x 5
    "padded both ways": {"img_size": (28, 44), "depths": (2, 2, 2), "num_heads": (2, 4, 4)},  # 7 x 11, 4 x 6, 2 x 3
    "no bias": {"img_size": 40, "qkv_bias": False, "mlp_ratio": 2.0},
    "any size": {"strict_img_size": False},
    "one window": {"img_size": 20, "window_size": 7},  # 5 x 5: no shift
    "always": {"img_size": 20, "window_size": 7, "always_partition": True},  # 5 x 5 in one of 7 x 7, shifted
    "oblong": {"window_size": (2, 4)},
    "wide heads": {"head_dim": 12, "global_pool": "avgmax"},
}
each = pytest.mark.parametrize("name", MODELS)
some = pytest.mark.parametrize("name", sampled(MODELS, quick=("two stages", "padded both ways", "always")))


def made(name: str = "two stages", **changes: Any) -> Any:
    """A model whose every parameter matters, tables of biases included, in float64."""
    torch.manual_seed(0)
    model = SwinTransformer(**{**SIZES, **MODELS[name], **changes})
    return far(model).double().eval()


def far(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def scenes(model: Any, count: int = 3) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(count, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def blocks_of(model: Any) -> list[Any]:
    return [block for stage in model.layers for block in stage.blocks]


class Chosen(TokenReducer):
    """Drops one in ``every`` patches by its place, and all patches of one in ``empty`` units.

    In training it masks what inference drops.
    """

    name = "chosen"

    def __init__(self, every: int = 2, empty: int = 0) -> None:
        super().__init__()
        self.every, self.empty = every, empty

    def decide(self, signals: Signals, state: State) -> Decision | None:
        layout, place = signals.layout, signals.positions() + state.block
        stays = (place + layout.row_image) % self.every > 0
        if self.empty:
            stays = stays & (layout.row_image % self.empty > 0)
        if state.training:
            return Decision(Mask.of(layout, stays.double()))
        return Decision(keep_patches(layout, layout.pad(stays)))


# --- without reduction ------------------------------------------------------------------------------------------------


@each
@torch.no_grad()
def test_without_reduction_a_model_is_timms_block_by_block_and_by_its_own_blocks(name: str) -> None:
    model = made(name)
    images = scenes(model)
    expected = model(images)
    assert expected.abs().max() > 0.3
    depth = len(blocks_of(model))
    for placement in (Placement(), at(1, Identity()), at(range(depth), Identity())):
        found, trace = reduce_tokens(model, placement).trace(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        patches = [stage.grid[0] * stage.grid[1] for stage in host_of(model).stages for _ in range(2)]
        assert trace.tokens.tolist() == [[patches[0], *patches]] * 3
        assert trace.kept(depth - 1).shape == (3, patches[0]) and trace.kept(depth - 1).all()
    assert reduce_tokens(model, at(1, ToMe(Ratio(0.5))))(images[:0]).shape == (0, 7)


@torch.no_grad()
def test_a_model_of_any_size_takes_other_sizes_that_pad() -> None:
    model = made("any size")
    for size in ((36, 52), (64, 32)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        expected = model(images)
        for placement in (Placement(), at(range(4), Identity())):
            torch.testing.assert_close(reduce_tokens(model, placement)(images), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [16, pytest.param(96, marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_shapes_of_swin_tiny_without_reduction_are_timms(width: int) -> None:
    """56 x 56 to 7 x 7, twelve blocks, windows of 7; at the full width in the slow tests."""
    torch.manual_seed(0)
    model = SwinTransformer(embed_dim=width, num_heads=[width * side // 16 for side in (1, 2, 4, 8)], num_classes=9)
    model = far(model).double().eval()
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    expected = model(images)
    found, trace = reduce_tokens(model, at(range(12), Identity())).trace(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(reduce_tokens(model, Placement())(images), expected, rtol=0, atol=1e-9)
    assert trace.tokens.tolist() == [[3136] * 3 + [784] * 2 + [196] * 6 + [49] * 2]


@some
def test_gradients_are_timms_without_reduction_and_reach_every_parameter_with_it(name: str) -> None:
    model = made(name)
    images = scenes(model)
    model(images).square().sum().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    depth = len(blocks_of(model))
    reduce_tokens(model, at(range(depth), Identity()))(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-7, atol=1e-9, msg=key)
    model.zero_grad()
    reduce_tokens(model, at(range(depth), ToMe(Ratio(0.8))))(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), key


def test_windows_that_were_first_met_without_gradients_serve_a_pass_with_them() -> None:
    windows.cache_clear()
    model = made("padded")
    fast = reduce_tokens(model, at(range(4), ToMe(Ratio(0.8))))
    with torch.inference_mode():
        fast(scenes(model))
    fast(scenes(model)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stochastic_depth_drops_an_image_with_all_its_windows() -> None:
    """The same numbers drawn in the same order: what timm drops in training is dropped here."""
    model = made("two stages", drop_path_rate=0.5).train()
    images = scenes(model)
    placement = at(range(4), Identity())
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model(images)
        torch.manual_seed(seed)
        torch.testing.assert_close(reduce_tokens(model, placement)(images), expected, rtol=0, atol=1e-9)
    model.set_grad_checkpointing()
    torch.manual_seed(0)
    reduce_tokens(model, placement)(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- reduced: against a Swin that masks -------------------------------------------------------------------------------


def masked_swin(model: Any, images: Tensor, kept: list[Tensor], fill: str) -> Tensor:
    """Logits of timm's Swin in whose windows dropped tokens are no keys any more, written on the whole map.

    kept: for each block (B, N) bool, patches of its stage that are left behind it.
    """
    x, block_index, alive, left = model.patch_embed(images), 0, torch.empty(0), torch.empty(0)
    for stage in model.layers:
        if block_index:
            x = stage.downsample(torch.where(alive[..., None], x, left if fill == "last" else torch.zeros_like(x)))
        batch, rows, columns, _ = x.shape
        alive, left = torch.ones(x.shape[:3], dtype=torch.bool), torch.zeros_like(x)
        for block in stage.blocks:
            entering = x
            x = x + window_attention(block, block.norm1(x), alive)
            now = kept[block_index].view(batch, rows, columns)
            left = torch.where((alive & ~now)[..., None], entering, left)
            alive = alive & now
            x = x + block.mlp(block.norm2(x))
            block_index += 1
    weight = alive.flatten(1)[..., None].double()
    x = model.norm(x).flatten(1, 2)
    mean = (x * weight).sum(1) / weight.sum(1).clamp(min=1)
    if model.head.global_pool.pool_type == "avgmax":
        mean = 0.5 * (mean + x.masked_fill(weight == 0, -torch.inf).amax(1))
    return model.head.fc(mean)


def window_attention(block: Any, x: Tensor, alive: Tensor) -> Tensor:
    batch, rows, columns, _ = x.shape
    shift, window = block.shift_size, block.window_size
    down, across = (-rows % window[0]), (-columns % window[1])

    def windows_of(values: Tensor, beyond: float) -> Tensor:
        rolled = torch.roll(values, (-shift[0], -shift[1]), (1, 2))
        whole = F.pad(rolled, (0, 0, 0, across, 0, down), value=beyond)
        return window_partition(whole, window).flatten(1, 2)

    attn = block.attn
    tokens, keys = windows_of(x, 0.0), windows_of(alive[..., None].double(), 1.0)[..., 0] > 0.5
    q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * attn.scale + attn._get_rel_pos_bias()
    if any(shift):
        mask = block.get_attn_mask(F.pad(x, (0, 0, 0, across, 0, down)))
        logits = (logits.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
    shares = logits.masked_fill(~keys[:, None, None], -1e6).softmax(-1)
    out = attn.proj((shares @ v).transpose(1, 2).flatten(2))
    whole = window_reverse(out.unflatten(1, window), window, rows + down, columns + across)[:, :rows, :columns]
    return torch.roll(whole, shift, (1, 2))


def kept_by_stage(model: Any, trace: Trace) -> list[Tensor]:
    """(B, N) of each block's own stage, read off what is told of the first stage's patches."""
    found, grids = [], [stage.grid for stage in host_of(model).stages]
    place = torch.arange(grids[0][0] * grids[0][1])
    block = 0
    for number, stage in enumerate(model.layers):
        if number:
            rows, columns = torch.meshgrid(*(torch.arange(side) for side in grids[number - 1]), indexing="ij")
            place = (rows // 2 * grids[number][1] + columns // 2).flatten()[place]
        for _ in stage.blocks:
            whole = torch.zeros(len(trace.tokens), grids[number][0] * grids[number][1], dtype=torch.bool)
            whole[:, place] = trace.kept(block)
            found.append(whole)
            block += 1
    return found


@pytest.mark.parametrize("fill", ["last", "zero"])
@some
@torch.no_grad()
def test_what_is_left_of_windows_is_what_a_masked_swin_computes(name: str, fill: str) -> None:
    """Selections in every block, shifted or not, over stages whose merging finds holes."""
    model = made(name)
    images = scenes(model)
    depth = len(blocks_of(model))
    for reducer in (TopK(Ratio(0.7), score="value_norm"), ATS(Ratio(0.7), score="attention_received")):
        fast = reduce_tokens(model, at(range(depth), reducer), host={"fill": fill})
        found, trace = fast.trace(images)
        expected = masked_swin(model, images, kept_by_stage(model, trace), fill)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(fast(images), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["two stages", "padded"])
@torch.no_grad()
def test_a_window_without_tokens_is_legal(name: str) -> None:
    model = made(name)
    images = scenes(model)
    fast = reduce_tokens(model, at([0, 1, 2, 3], Chosen(every=4, empty=3)))
    found, trace = fast.trace(images)
    kept = kept_by_stage(model, trace)
    first = windows(host_of(model).stages[0].grid, (4, 4), (0, 0), torch.device("cpu"))
    left = [kept[0][0][places[places >= 0]].sum() for places in first.places]
    assert 0 in left and max(left) > 2
    torch.testing.assert_close(found, masked_swin(model, images, kept, "last"), rtol=0, atol=1e-9)
    for everything in (1, 2, 4):  # nothing is left of any window
        nothing = reduce_tokens(model, at(range(everything), Chosen(empty=1)))(images)
        assert torch.isfinite(nothing).all()


@pytest.mark.parametrize("name", ["two stages", "padded both ways"])
def test_a_masked_pass_is_the_gathered_pass(name: str) -> None:
    model = made(name)
    images, last = scenes(model), len(blocks_of(model)) - 2
    fast = reduce_tokens(model, at([last, last + 1], Chosen(every=3)))
    with torch.no_grad():
        expected = fast(images)
        found = fast.train()(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # the masked softmax adds 1e-6 to each sum
    early = reduce_tokens(model, at(0, Chosen())).train()
    with pytest.raises(ReducerError, match="train in the last stage"):
        early(images)


@torch.no_grad()
def test_the_map_that_a_later_stage_merges_has_every_patch_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fill against a loop over the patches; owner is for methods that merge."""
    model = made("padded")
    images = scenes(model)
    seen: list[tuple[Any, Tensor]] = []
    enter = TimmSwin.enter

    def noted(self: TimmSwin, block: int, batch: Any, whole: Any) -> Any:
        seen.append((batch, whole()))
        return enter(self, block, batch, whole)

    monkeypatch.setattr(TimmSwin, "enter", noted)
    for reducer, fills in (
        (ToMe(Ratio(0.6)), ("last", "owner", "zero")),
        (TopK(Count(3), score="value_norm"), ("zero",)),
    ):
        for fill in fills:
            _, trace = reduce_tokens(model, at([0, 1], reducer), host={"fill": fill}).trace(images)
            batch, whole = seen.pop()
            owner = trace.owner(1)
            for image, patches in enumerate(whole):
                for patch, features in enumerate(patches):
                    row = owner[image, patch]
                    expected = batch.x[batch.layout.starts[image] + row] if row >= 0 else torch.zeros_like(features)
                    assert torch.equal(features, expected)
            assert (owner < 0).any() == (fill == "zero" and isinstance(reducer, TopK))
    with pytest.raises(ReducerError, match="topk at block 0 drops patches"):
        reduce_tokens(model, at(0, TopK(Count(3), score="value_norm")), host={"fill": "owner"})(images)
    with pytest.raises(ReducerError, match="the option 'fill' of SwinTransformer is one of 'last', 'owner', 'zero'"):
        reduce_tokens(model, Placement(), host={"fill": "mean"})


@torch.no_grad()
def test_the_dense_map_is_that_of_the_last_stage() -> None:
    model = made("padded")
    images = scenes(model)
    plain = model.forward_features(images).flatten(1, 2)
    for rule in ("owner", "zero", "last"):
        found = reduce_tokens(model, at(range(4), Identity())).features(images, rule)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)
    fast = reduce_tokens(model, at([0, 3], TopK(Ratio(0.5), score="value_norm")))
    dense, (_, trace) = fast.features(images, "zero"), fast.trace(images)
    assert torch.equal(dense.abs().sum(-1) > 0, kept_by_stage(model, trace)[3])


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "gmacs"),
    [("tiny", 4.4906), pytest.param("small", 8.7409, marks=pytest.mark.slow),
     pytest.param("base", 15.4309, marks=pytest.mark.slow)],
)  # fmt: skip
@torch.inference_mode()
def test_the_published_models_cost_what_is_known(size: str, gmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"swin_{size}_patch4_window7_224")
    model = model.to_empty(device="cpu")
    for part in model.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    trace = reduce_tokens(model.eval(), Placement()).trace(torch.zeros(1, 3, 224, 224))[1]
    assert round(float(trace.macs[0]) / 1e9, 4) == gmacs
    assert torch.equal(trace.macs, trace.reference_macs)


@torch.no_grad()
def test_dense_costs_are_what_torch_counts_of_timms_where_nothing_is_padded() -> None:
    for name in ("two stages", "one window", "oblong", "wide heads"):
        model = made(name).requires_grad_(False)
        images = scenes(model, 1)
        with FlopCounterMode(display=False) as counter:
            model(images)
        for placement in (Placement(), at(range(4), Identity())):
            assert float(reduce_tokens(model, placement).trace(images)[1].macs[0]) == counter.get_total_flops() / 2


def by_hand(model: Any, kept: list[Tensor], image: int) -> float:
    """Multiply-adds of an image from the patches that are left behind each block, window by window."""
    stages = host_of(model).stages
    rows, columns = stages[0].grid or (0, 0)
    convolution = model.patch_embed.proj.weight
    total = float(rows * columns * convolution.numel() + model.head.fc.weight.numel())
    block_index = 0
    for number, stage in enumerate(model.layers):
        rows, columns = stages[number].grid or (0, 0)
        if number:
            total += rows * columns * stage.downsample.reduction.weight.numel()
        before = torch.ones(rows * columns, dtype=torch.bool)
        for block in stage.blocks:
            now, attn = kept[block_index][image] & before, block.attn
            (high, wide), (down, across) = block.window_size, block.shift_size
            inner, width = attn.qkv.out_features // 3, block.dim
            window: dict[tuple[int, int], list[int]] = {}
            for row in range(-(-rows // high) * high):
                for column in range(-(-columns // wide) * wide):
                    met = window.setdefault((row // high, column // wide), [0, 0, 0])
                    if row >= rows or column >= columns:
                        met[0] += 1  # beyond the map: a key like any other, which costs no projection
                        continue
                    patch = (row + down) % rows * columns + (column + across) % columns
                    met[1] += int(before[patch])
                    met[2] += int(now[patch])
            for beyond, entering, leaving in window.values():
                total += entering * 2 * width * inner  # keys and values
                total += leaving * 2 * width * inner  # queries and the projection behind
                total += leaving * (entering + beyond) * 2 * inner
                total += leaving * 2 * block.mlp.fc1.weight.numel()
            before, block_index = now, block_index + 1
    return total


@pytest.mark.parametrize("name", sampled(MODELS, quick=("two stages", "padded both ways")))
@torch.no_grad()
def test_reduced_costs_are_those_of_windows_counted_by_hand(name: str) -> None:
    model = made(name)
    images = scenes(model)
    fast = reduce_tokens(model, at(range(len(blocks_of(model))), TopK(Ratio(0.6), score="value_norm")))
    _, trace = fast.trace(images)
    kept = kept_by_stage(model, trace)
    for image in range(len(images)):
        assert float(trace.macs[image] - trace.reducer_macs[image]) == by_hand(model, kept, image)
    assert torch.equal(fast.cost(images), trace.macs)
    assert (trace.reference_macs > trace.macs).all()


# --- what every method does, and who is refused -----------------------------------------------------------------------

OTHERWISE: dict[str, TokenReducer] = {  # by a score that asks no class token, where the default does
    "ats": ATS(Ratio(0.6), score="attention_received"),
    "topk": TopK(Ratio(0.6), score="value_norm"),
    "evit": EViT(Ratio(0.6), score="attention_received", fuse=False),
    "etps": CASES["etps attention received"],
    "tome": ToMe(Ratio(0.6)),
}
REFUSED = {
    "avit": "forms units of its own", "small_input": "forms units of its own", "stvit": "forms units of its own",
    "hvt_pool": "lie nowhere|no positions", "patch_merger": "lie nowhere", "sinkhorn": "lie nowhere",
    "sit": "lie nowhere", "token_learner": "lie nowhere", "stvit_r": "runs blocks .* forms units of its own",
}  # fmt: skip
ALL = {name: OTHERWISE.get(name, case) for name, case in CASES.items()}
QUICK = {"ats", "topk", "tome", "gtp", "kmedoids", *REFUSED, "back_tracking", "bat"}


@torch.no_grad()
def alone_as_in_a_batch(fast: ReducedViT, images: Tensor) -> Trace:
    together, trace = fast.trace(images)
    last = trace.tokens.shape[1] - 2
    for i in range(len(images)):
        alone, own = fast.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        assert torch.equal(own.tokens[0], trace.tokens[i])
        assert all(torch.equal(own.kept(b)[0], trace.kept(b)[i]) for b in range(last + 1))
        assert torch.equal(own.owner(last)[0], trace.owner(last)[i])
        torch.testing.assert_close(own.macs[0], trace.macs[i])
    torch.testing.assert_close(fast.cost(images), trace.macs)
    return trace


@pytest.mark.parametrize("name", sampled(ALL, quick=QUICK))
@torch.no_grad()
def test_every_method_acts_inside_windows_or_is_refused_by_name(name: str) -> None:
    for kind in ("two stages", "padded"):
        model = made(kind)
        images, reducer = scenes(model), copy.deepcopy(ALL[name])
        blocks = [1] if reducer.steps.attaches else [1, 3] if reducer.traits.uses_previous_attention else [1, 2, 3]
        why = "needs a class token" if reducer.traits.needs_class_token else REFUSED.get(name.split()[0])
        if why is not None:
            with pytest.raises(ReducerError, match=why):
                reduce_tokens(model, at(blocks, reducer))(images)
            continue
        if kind == "padded" and "gtp sparse" in name:
            with pytest.raises(ReducerError, match="the keys of this model are no tokens"):
                reduce_tokens(model, at(blocks, reducer))(images)
            continue
        before = copy.deepcopy(model.state_dict())
        trace = alone_as_in_a_batch(reduce_tokens(model, at(blocks, reducer)).double(), images)
        assert name == "identity" or (trace.tokens[:, 2] < trace.tokens[:, 1]).all()
        for block in range(len(blocks_of(model))):
            owner, kept = trace.owner(block), trace.kept(block)
            assert ((owner >= 0) | ~kept).all() and (owner < trace.tokens[:, block + 1 : block + 2]).all()
        assert (trace.reference_macs >= trace.macs - trace.reducer_macs - 1e-3).all()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@torch.no_grad()
def test_stacks_and_draws_act_inside_windows() -> None:
    model = made()
    images = scenes(model)
    stack = Stack(ATS(Ratio(0.8), score="value_norm"), ToMe(Ratio(0.8)))
    alone_as_in_a_batch(reduce_tokens(model, at(range(4), stack)), images)
    images = images[:1].expand(2, -1, -1, -1).clone()
    images[:] = images[:, :, :1, :1]  # every window shows the same
    trace = alone_as_in_a_batch(reduce_tokens(model, at(0, RandomDrop(Count(8)))), images)
    four = trace.kept(0)[0].view(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, 16)
    assert (four.sum(1) == 8).all(), "a budget is of each window"
    assert len({tuple(window.tolist()) for window in four}) == 4, "each window has numbers of its own"


@torch.no_grad()
def test_the_order_of_tokens_is_that_of_their_places_whatever_happened_before() -> None:
    """A selection that keeps all rows in another order changes nothing."""

    class Reversed(TokenReducer):
        name = "reversed"

        def decide(self, signals: Signals, state: State) -> Decision | None:
            layout = signals.layout
            rows = layout.starts[layout.row_image] + layout.lengths[layout.row_image] - 1 - layout.row_index
            again = type(layout)(layout.lengths, layout.prefix, layout.rows, layout.uniform, layout.on_host)
            return Decision(Keep(layout, again, rows))

    for name in ("two stages", "padded"):
        model = made(name)
        images = scenes(model)
        found = reduce_tokens(model, at(range(3), Reversed()))(images)
        torch.testing.assert_close(found, model(images), rtol=0, atol=1e-9)


def test_learned_dropping_has_the_width_of_its_stage_and_one_block() -> None:
    model = made()
    images = scenes(model)
    reducer = DynamicViT(Ratio(0.5), distill_weight=0, token_weight=0)
    fast = reduce_tokens(model, at(3, reducer))
    assert next(reducer.predictors.parameters()).shape == (32,)
    fast.train()(images).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    for blocks, why in (([2, 3], "place it at one block"), ([1, 3], "2 stages")):
        with pytest.raises(ReducerError, match=why):
            reduce_tokens(model, at(blocks, DynamicViT(Ratio(0.5))))


def test_who_cannot_be_driven_is_refused_by_name() -> None:
    model = made()
    with pytest.raises(ReducerError, match="evit needs a class token"):
        reduce_tokens(model, at(1, EViT(Ratio(0.5))))
    layout, group = Layout.listed([4], torch.device("cpu")), torch.tensor([0, 1, 1, 1])
    fused = Merge(layout, Layout.listed([2], layout.lengths.device), group, torch.ones(4), torch.tensor([False, True]))
    with pytest.raises(ReducerError, match="fusing leaves tokens that are no one patch's continuation"):
        host_of(model).block(0).allow("fusing", fused)
    with pytest.raises(ReducerError, match="kmedoids asks .* block 2 is the first of a stage"):
        reduce_tokens(model, at(2, CASES["kmedoids"]))
    with pytest.raises(ReducerError, match="a schedule shares the tokens of an image out over blocks"):
        reduce_tokens(model, at(range(4), ToMe(Drop(20)), schedule=Flat()))
    with pytest.raises(ReducerError, match="places='mean' is not for this SwinTransformer"):
        reduce_tokens(model, Placement(), places="mean")
    with torch.device("meta"):
        for name in ("swinv2_tiny_window8_256", "swinv2_cr_tiny_224"):
            with pytest.raises(UnsupportedModel, match=r"SwinTransformerV2(Cr)? is not supported\. Supported: timm's"):
                reduce_tokens(timm.create_model(name), Placement())
        with pytest.raises(UnsupportedModel, match="global_pool='max_avg_none'|global_pool=''"):
            reduce_tokens(timm.create_model("swin_tiny_patch4_window7_224", global_pool=""), Placement())


def test_what_was_changed_after_wrapping_counts_or_is_refused() -> None:
    model = made()
    images, fast = scenes(model), reduce_tokens(model, at(range(4), Identity()))
    with torch.no_grad():
        model.layers[0].blocks[1].attn.relative_position_bias_table.mul_(3)
        torch.testing.assert_close(fast(images), model(images), rtol=0, atol=1e-9)
    for change, why in (
        (lambda m: m.layers[1].blocks[0].attn.register_forward_hook(print), "block 2 has a forward hook on its attn"),
        (lambda m: setattr(m.layers[0], "blocks", torch.nn.ModuleList()), "stage 0 holds its blocks"),
        (lambda m: setattr(m.layers[1], "downsample", torch.nn.Identity()), "stage 1 begins with a Identity"),
        (lambda m: setattr(m, "head", torch.nn.Identity()), "the head Identity"),
    ):
        other = copy.deepcopy(model)
        fast = reduce_tokens(other, Placement())
        change(other)
        with pytest.raises(UnsupportedModel, match=why):
            fast(images)


@pytest.mark.slow
@torch.no_grad()
def test_every_entry_point_is_driven() -> None:
    for name in timm.list_models(module="swin_transformer"):
        with torch.device("meta"):
            probe = timm.create_model(name)
        sizes = [stage.width for stage in host_of(probe).stages]
        assert sizes == [sizes[0] * 2**number for number in range(4)]
    assert len(timm.list_models(module="swin_transformer")) == 9
