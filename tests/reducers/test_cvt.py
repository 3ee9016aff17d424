"""CvT: identity with both implementations, the grid with its holes against slow references, costs, refusals."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
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
    Shared,
    Stack,
    TokenReducer,
    ToMe,
    TopK,
    UnsupportedModel,
    at,
    available,
    build,
    every,
    reduce_tokens,
)
from reducers.backbones.cvt import CvT, QuickGELU, cvt_13, cvt_21
from reducers.decision import Decision
from reducers.hosts import host_of
from reducers.hosts.cells import Window
from reducers.maps import Mask, keep_rows
from reducers.reducer import State, Traits
from reducers.signals import Signals
from tests.samples import reading, sampled

from .cvt_models import CLASSES, DEPTH, DEPTHS, FIRST, KINDS, SIDE, WIDTHS, logits_of, make_cvt

tf = pytest.importorskip("transformers")
ALL = range(FIRST, DEPTH)
D, PLACES, CELLS = WIDTHS[-1], 64, 16
both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


class Chosen(TokenReducer):
    """Keeps a share of each image's places at random, the same in every pass; as a gather or as a training mask."""

    name = "chosen"
    traits = Traits(uses_positions=True, adaptive=True)

    def __init__(self, share: float = 0.4, *, masked: bool = False, drops: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.share, self.masked, self.drops = share, masked, drops

    def decide(self, signals: Signals, state: State) -> Decision:
        layout, pos = signals.layout, signals.positions()
        drawn = torch.rand(8, state.initial, generator=torch.Generator().manual_seed(state.block)) * 1.3
        stays = drawn[layout.row_image, pos.clamp(min=0)] < self.share + 0.2 * layout.row_image / 8
        if self.drops:
            stays = ~torch.isin(pos, torch.tensor(self.drops))
        stays = stays | layout.is_prefix
        return Decision(Mask.of(layout, stays.float()) if self.masked else keep_rows(layout, stays))


class Listening(TokenReducer):
    """Keeps what it is shown."""

    name = "listening"

    def __init__(self, hear: Callable[[Signals], Any]) -> None:
        super().__init__()
        self.hear, self.heard = hear, []

    def decide(self, signals: Signals, state: State) -> None:
        self.heard.append(self.hear(signals))


# --- without reduction ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("stride", [1, 2])
def test_without_reduction_it_is_the_model_in_either_path_under_every_option(
    kind: str, stride: int, images: Tensor
) -> None:
    model = make_cvt(kind, stride=stride)
    expected = logits_of(model(images)).detach()
    with torch.no_grad():  # the library's own blocks
        close(logits_of(reduce_tokens(model, Placement())(images)), expected)
    close(logits_of(reduce_tokens(model, Placement())(images)).detach(), expected)  # block by block
    for fill in ("last", "zero", "owner"):
        for placement in (at(ALL, Identity()), at([3, 5], Chosen(2.0))):  # which gathers all tokens
            fast = reduce_tokens(model, placement, host={"fill": fill})
            close(logits_of(fast(images)).detach(), expected)


@torch.no_grad()
def test_a_bare_tower_answers_as_the_library_does(images: Tensor) -> None:
    model = make_cvt(bare=True)
    expected = model(images)
    for placement in (Placement(), at(ALL, Identity())):
        found = reduce_tokens(model, placement)(pixel_values=images)
        assert type(found) is type(expected)
        close(found.last_hidden_state, expected.last_hidden_state)
        close(found.cls_token_value, expected.cls_token_value)
    fast = reduce_tokens(model, at(4, TopK(Ratio(0.5))))
    with pytest.raises(ReducerError, match="topk at block 4 drops patches"):
        fast(images)
    answer = fast(pixel_values=images, restore="zero")
    assert (answer.last_hidden_state.abs().sum(1) == 0).sum((1, 2)).tolist() == [32] * 4
    close(fast.trace(images)[0], answer.cls_token_value[:, 0])


@torch.no_grad()
def test_the_answer_is_the_librarys_with_labels_and_without_what_it_does_not_answer(images: Tensor) -> None:
    model = make_cvt()
    fast, labels = reduce_tokens(model, Placement()), torch.arange(4)
    found, expected = fast(pixel_values=images, labels=labels), model(images, labels=labels)
    assert type(found) is type(expected)
    close(found.loss, expected.loss)
    close(fast(pixel_values=images, return_dict=False)[0], expected.logits)
    for named, message in (
        ({"pixel_values": images, "output_hidden_states": True}, "does not answer output_hidden_states=…"),
        ({}, r"called as fast\(pixel_values=…\)"),
        ({"pixel_values": images[:, :2]}, r"reads images \(B, 3, H, W\)"),
    ):
        with pytest.raises(ReducerError, match=message):
            fast(**named)


# --- the two implementations ------------------------------------------------------------------------------------------


def as_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of parameters as the authors have them."""
    words = {
        "cvt.encoder.stages.": "stage", "embedding.convolution_embeddings.projection": "patch_embed.proj",
        "embedding.convolution_embeddings.normalization": "patch_embed.norm", "layers.": "blocks.",
        "attention.attention.convolution_projection_query.convolution_projection": "attn.conv_proj_q",
        "attention.attention.convolution_projection_key.convolution_projection": "attn.conv_proj_k",
        "attention.attention.convolution_projection_value.convolution_projection": "attn.conv_proj_v",
        "attention.attention.projection_query": "attn.proj_q", "attention.attention.projection_key": "attn.proj_k",
        "attention.attention.projection_value": "attn.proj_v", "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", ".convolution.": ".conv.",
        ".normalization.": ".bn.", "layernorm_before": "norm1", "layernorm_after": "norm2", "layernorm": "norm",
        "classifier": "head",
    }  # fmt: skip
    found = {}
    for name, value in state.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return found


@torch.no_grad()
def test_the_authors_network_takes_their_weights_and_is_transformers_but_for_its_activation(images: Tensor) -> None:
    theirs, ours = make_cvt("transformers"), make_cvt("authors", seed=1)
    assert ours.load_state_dict(as_authors(theirs.state_dict())) == ([], [])
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    expected = [value / (1 + math.exp(-1.702 * value)) for value in x.tolist()]
    close(QuickGELU()(x), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert (ours(images) - theirs(images).logits).abs().max() > 1e-3
    for module in ours.modules():
        if "act" in module._modules:
            module.act = nn.GELU()
    close(ours(images), theirs(images).logits)
    with torch.device("meta"):
        names = set(cvt_13().state_dict())
    assert {  # as the release has them
        "stage0.patch_embed.proj.weight", "stage1.blocks.1.attn.conv_proj_k.bn.running_var", "stage2.cls_token",
        "stage2.blocks.9.attn.conv_proj_q.conv.weight", "stage2.blocks.0.attn.proj_v.bias",
        "stage1.blocks.1.norm2.bias",
        "stage2.blocks.9.mlp.fc2.weight", "stage2.blocks.5.attn.proj.weight", "norm.weight", "head.bias",
    } <= names  # fmt: skip
    assert len(names) == len(tf.CvtForImageClassification(tf.CvtConfig()).state_dict())


@pytest.mark.parametrize(("make", "millions"), [(cvt_13, 19.997), (cvt_21, 31.623)])
def test_the_published_sizes_have_the_published_numbers_of_parameters(make: Any, millions: float) -> None:
    with torch.device("meta"):
        assert round(sum(p.numel() for p in make().parameters()) / 1e6, 3) == millions


def test_stochastic_depth_is_each_implementations_own(images: Tensor) -> None:
    """At a rate of 1 the authors' blocks add nothing; transformers' lose the image itself."""
    ours = make_cvt("authors").train()
    theirs = make_cvt(drop_path_rate=[0.0, 0.0, 0.5]).train()
    for module in [*ours.modules(), *theirs.modules()]:
        if type(module).__name__ in ("DropPath", "CvtDropPath") and not isinstance(module, nn.Identity):
            module.drop_prob = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for block in ours.stage2.blocks:
        block.drop_path.drop_prob, block.drop_path.scale_by_keep = 1.0, True
    found = reduce_tokens(ours, at(ALL, Identity()))(images)
    lead = ours.stage2.cls_token.expand(4, -1, -1)
    close(found, ours.head(ours.norm(lead[:, 0])))
    for layer in theirs.cvt.encoder.stages[2].layers:
        if not isinstance(layer.drop_path, nn.Identity):
            layer.drop_path.drop_prob = 1 - 1e-12
    answer = reduce_tokens(theirs, at(ALL, Identity()))(images).logits
    close(answer, theirs.classifier(theirs.layernorm(torch.zeros(4, D, dtype=torch.float64))))


# --- the grid with its holes ------------------------------------------------------------------------------------------


def layers_of(model: Any) -> list[tuple[Any, ...]]:
    """Of the last stage of either implementation: norms, convolutions, linears, last layer, MLP, heads, scale."""
    if isinstance(model, CvT):
        return [
            (b.norm1, b.norm2, (b.attn.conv_proj_q, b.attn.conv_proj_k, b.attn.conv_proj_v),
             (b.attn.proj_q, b.attn.proj_k, b.attn.proj_v), b.attn.proj, b.mlp)
            for b in model.stage2.blocks
        ]  # fmt: skip
    found = []
    for layer in model.cvt.encoder.stages[2].layers:
        a = layer.attention.attention
        convolutions = [
            getattr(a, f"convolution_projection_{part}").convolution_projection for part in ("query", "key", "value")
        ]
        found.append((
            layer.layernorm_before, layer.layernorm_after, convolutions,
            (a.projection_query, a.projection_key, a.projection_value), layer.attention.output.dense,
            nn.Sequential(layer.intermediate, layer.output.dense),
        ))  # fmt: skip
    return found


def sees(cell: int, place: int, side: int = 8) -> bool:
    a, b = divmod(cell, -(-side // 2))
    i, j = divmod(place, side)
    return abs(2 * a - i) <= 1 and abs(2 * b - j) <= 1


def dense_with_masks(model: Any, image: Tensor, kept: dict[int, Tensor], fill: str) -> Tensor:
    """Logits of one image: the dense stage on all 64 places, what is gone masked or frozen; ``kept`` by block."""
    x = host_of(model).embed(image[None]).x  # (65, D), all there
    here, frozen = torch.ones(PLACES, dtype=torch.bool), x[1:].clone()
    for index, (norm1, norm2, convolutions, linears, out, mlp) in enumerate(layers_of(model)):
        frozen[here] = x[1:][here]
        h = norm1(torch.cat([x[:1], frozen]))
        if fill == "zero":
            h[1:][~here] = 0
        grid = h[1:].T.reshape(1, D, 8, 8)
        q, k, v = (
            linear(torch.cat([h[:1], convolution(grid)[0].flatten(1).T])).view(-1, 3, D // 3).transpose(0, 1)
            for convolution, linear in zip(convolutions, linears, strict=True)
        )
        logits = q @ k.transpose(1, 2) * D**-0.5  # (3, 65, 17)
        if fill == "zero":
            for cell in range(CELLS):
                if not any(here[place] and sees(cell, place) for place in range(PLACES)):
                    logits[:, :, 1 + cell] = -torch.inf
        x = x + out((logits.softmax(2) @ v).transpose(0, 1).flatten(1))
        here = kept.get(FIRST + index, here)
        x = x + mlp(norm2(x))
    norm, head = (model.norm, model.head) if isinstance(model, CvT) else (model.layernorm, model.classifier)
    return head(norm(x[0]))


@both
@pytest.mark.parametrize("fill", ["last", "zero"])
@torch.no_grad()
def test_a_gathered_pass_is_the_dense_one_with_what_is_gone_masked(kind: str, fill: str, images: Tensor) -> None:
    model = make_cvt(kind)
    for placement in (at([3, 5], ATS(Ratio(1.0))), at([4, 5], Chosen(0.2)), at(3, Chosen(0.05))):
        fast = reduce_tokens(model, placement, host={"fill": fill})
        found, trace = fast.trace(images)
        assert len(set(trace.tokens[:, -1].tolist())) > 1, "images keep different numbers"
        for index, image in enumerate(images):
            kept = {block: trace.kept(block)[index] for block in ALL}
            close(found[index], dense_with_masks(model, image, kept, fill))


@pytest.mark.parametrize("fill", ["last", "zero"])
@torch.no_grad()
def test_a_training_mask_shows_on_the_grid_what_a_gather_shows(fill: str, images: Tensor) -> None:
    model = make_cvt()
    placements = (at([3, 5], Chosen(masked=masked)) for masked in (False, True))
    gathered, masked = (reduce_tokens(model, each, host={"fill": fill}) for each in placements)
    found, trace = gathered.trace(images)
    assert len(set(trace.tokens[:, -1].tolist())) > 1
    # masked softmax adds 1e-6 to every key; where nothing is hidden it is not asked
    close(masked(images).logits, found, atol=1e-9 if fill == "last" else 1e-4)
    with pytest.raises(
        ReducerError, match=r"fill='owner' has nothing to show in their places.*host=\{'fill': 'last'\}"
    ):
        reduce_tokens(model, at([3, 5], Chosen(masked=True)), host={"fill": "owner"})(images)


def test_gradients_reach_a_mask_on_the_grid(images: Tensor) -> None:
    for fill in ("last", "zero"):
        model = make_cvt().train()
        fast = reduce_tokens(model, at([3, 4], build({"name": "dynamicvit", "budget": {"ratio": 0.6}})),
                             host={"fill": fill}).double()  # fmt: skip
        torch.manual_seed(0)
        fast(images).logits.square().sum().backward()
        grads = [p.grad for p in fast.reducers.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        assert any(g.abs().max() > 0 for g in grads)


@torch.no_grad()
def test_owner_shows_in_every_place_the_token_that_carries_it(images: Tensor) -> None:
    """Keys after a merge, against the block's own convolutions over a grid put together by the trace."""
    model = make_cvt()
    fast = reduce_tokens(model, at(3, ToMe(Drop(20))), host={"fill": "owner"})
    kept: dict[str, Any] = {}
    block = fast.host.block(4)
    core = type(block).core
    try:
        type(block).core = lambda self, batch: kept.setdefault(id(self.module), (batch, core(self, batch)))[1]  # type: ignore[method-assign]
        _, trace = fast.trace(images)
    finally:
        type(block).core = core  # type: ignore[method-assign]
    batch, asked = kept[id(block.module)]
    norm1, _, convolutions, linears, *_ = layers_of(model)[1]
    owner = trace.owner(3)
    assert len(set(owner[0].tolist())) == 44
    x = batch.layout.pad(batch.x)
    for index in range(4):
        h = norm1(x[index])
        grid = h[owner[index]].T.reshape(1, D, 8, 8)
        keys, values = asked.project(asked.x, 1, 3)
        rows = slice(index * 17, index * 17 + 17)
        for found, convolution, linear in zip((keys, values), convolutions[1:], linears[1:], strict=True):
            expected = linear(torch.cat([h[:1], convolution(grid)[0].flatten(1).T]))
            close(found[rows].flatten(1), expected)
    with pytest.raises(ReducerError, match="tokens were dropped, so fill='owner' has nothing to show"):
        reduce_tokens(model, at(3, TopK(Ratio(0.5))), host={"fill": "owner"})(images)


@torch.no_grad()
def test_what_is_dropped_in_a_far_corner_changes_no_query_but_those_next_to_it(images: Tensor) -> None:
    model, heard = make_cvt(), []
    for drops in ((), (63,)):
        reducer = Chosen(drops=drops) if drops else Identity()
        listening = Listening(lambda signals: signals.attention_core.queries())  # type: ignore[attr-defined]
        fast = reduce_tokens(model, at(3, reducer) | at(4, listening), host={"fill": "zero"})
        fast(images)
        heard.append(listening.heard[0].view(4, -1, 24))
    whole, holed = heard
    near = {54, 55, 62}
    for place in range(63):
        same = (whole[:, 1 + place] - holed[:, 1 + place]).abs().max() < 1e-12
        assert bool(same) == (place not in near), place
    close(whole[:, 0], holed[:, 0], atol=1e-12)


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (14, 14)])
@pytest.mark.parametrize("spread", ["mass", "nearest"])
def test_cells_and_their_places_are_those_of_a_loop(grid: tuple[int, int], spread: str) -> None:
    window = Window(3, 2, 1)
    cells = window.cells(grid)
    assert cells == tuple(F.conv2d(torch.zeros(1, 1, *grid), torch.zeros(1, 1, 3, 3), stride=2, padding=1).shape[2:])
    field = window.field(grid, spread, torch.device("cpu"))
    for cell in range(cells[0] * cells[1]):
        a, b = divmod(cell, cells[1])
        own = []
        for place in range(grid[0] * grid[1]):
            i, j = divmod(place, grid[1])
            seen = abs(2 * a - i) <= 1 and abs(2 * b - j) <= 1
            own += [place] if (seen if spread == "mass" else (i // 2, j // 2) == (a, b)) else []
        assert [place for place in field.places_of[cell].tolist() if place < grid[0] * grid[1]] == own
        assert all((cell in field.cells_of[place].tolist()) == (place in own) for place in range(grid[0] * grid[1]))


@pytest.mark.parametrize("fill", ["last", "zero"])
@pytest.mark.parametrize("spread", ["mass", "nearest"])
@torch.no_grad()
def test_attention_to_cells_is_shared_out_to_the_tokens_they_see(fill: str, spread: str, images: Tensor) -> None:
    """Class attention, the whole map, keys and values, against loops; and its mass, but for cells that see nobody."""
    model = make_cvt()

    def hear(signals: Any) -> tuple[Any, ...]:
        core = signals.attention_core
        cells = [signals.class_attention(), signals.attention(), signals.keys(), signals.values()]
        return signals.batch, core.map(), core.keys, core.values, core.keys_layout, *cells

    listening = Listening(hear)
    reduce_tokens(model, at(3, Chosen(0.1)) | at(4, listening), host={"fill": fill, "spread": spread})(images)
    batch, dense, keys, values, layout, row, square, shown_keys, shown_values = listening.heard[0]
    lost = 0
    for image in range(4):
        first, count = int(batch.layout.starts[image]), int(batch.layout.lengths[image])
        places = batch.pos[first + 1 : first + count].tolist()
        live = [c for c in range(CELLS) if fill == "last" or any(sees(c, p) for p in places)]
        assert layout.counts[image] == 1 + len(live)
        start = int(layout.starts[image])
        has = sees if spread == "mass" else lambda cell, place: (place // 16, place % 8 // 2) == divmod(cell, 4)
        belongs = {
            cell: [place for place in places if has(cell, place)]
            for cell in live
        }  # fmt: skip
        expected = torch.zeros(count, 3, count, dtype=torch.float64)  # token, head, query
        means = torch.zeros(2, count, 3, 8, dtype=torch.float64)
        expected[0], means[:, 0] = dense[image, :, :count, 0], torch.stack([keys[start], values[start]])
        for token, place in enumerate(places):
            own = [1 + number for number, cell in enumerate(live) if place in belongs[cell]]
            for key in own:
                expected[1 + token] += dense[image, :, :count, key] / len(belongs[live[key - 1]])
            means[0, 1 + token] = sum(keys[start + key] for key in own) / len(own)
            means[1, 1 + token] = sum(values[start + key] for key in own) / len(own)
        rows = slice(first, first + count)
        close(square[image, :, :count, :count], expected.permute(1, 2, 0))
        close(row[rows], expected[:, :, 0])
        close(torch.stack([shown_keys[rows], shown_values[rows]]), means)
        empty = [1 + number for number, cell in enumerate(live) if not belongs[cell]]
        mass = 1 - dense[image, :, 0, empty].sum(1)
        close(row[rows].sum(0), mass)
        lost += len(empty)
    assert (lost > 0) == (fill == "last" or spread == "nearest")


@torch.no_grad()
def test_a_fused_token_is_at_no_place_and_has_a_key_of_its_own(images: Tensor) -> None:
    model = make_cvt()
    listening = Listening(
        lambda signals: (signals.batch, signals.attention_core.keys_layout, signals.class_attention())
    )
    fast = reduce_tokens(model, at(3, EViT(Count(9))) | at(4, listening))
    fast(images)
    batch, layout, row = listening.heard[0]
    assert batch.layout.uniform == (11, 1) and layout.uniform == (18, 2)
    assert batch.pos.view(4, 11)[:, -1].tolist() == [-1] * 4
    assert (row.view(4, 11, 3)[:, -1] > 0).all()
    block = fast.host.block(4)
    core = block.core(block.arrive(batch))
    normed = block.norm(0)(batch.x).view(4, 11, D)
    keys = core.project(core.x, 1, 2)[0].view(4, 18, D)
    close(keys[:, :2], block.linears[1](normed[:, [0, -1]]))
    close(core.project(core.x, 0, 1)[0].view(4, 11, D)[:, [0, -1]], block.linears[0](normed[:, [0, -1]]))


# --- training mode ----------------------------------------------------------------------------------------------------


@both
def test_batch_norm_in_training_goes_by_the_batch_as_the_model_does(kind: str, images: Tensor) -> None:
    model, twin = make_cvt(kind).train(), make_cvt(kind).train()
    fast = reduce_tokens(twin, at(ALL, Identity()))
    close(logits_of(fast(images)).detach(), logits_of(model(images)).detach())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    frozen = reduce_tokens(twin, at([3, 5], ATS(Ratio(1.0))))
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    together = logits_of(frozen(images)).detach()
    close(logits_of(frozen(images[1:2])).detach()[0], together[1])


@both
def test_gradients_reach_every_parameter(kind: str, images: Tensor) -> None:
    model = make_cvt(kind)
    for fill, reducer in (
        ("last", ATS(Ratio(0.6))), ("zero", TopK(Ratio(0.5))), ("owner", ToMe(Drop(9))), ("last", EViT(Ratio(0.6))),
    ):  # fmt: skip
        model.zero_grad()
        fast = reduce_tokens(model, at([3, 5], copy.deepcopy(reducer)), host={"fill": fill})
        logits_of(fast(images)).square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values())
        silent = {name for name, grad in grads.items() if grad is not None and not grad.any()}
        # of the last block the head reads the class token alone, whose query is not convolved
        assert len(silent) == 3 and all(re.search(r"s\.3\.att.*(_q|_query)\.", name) for name in silent), fill


# --- costs ------------------------------------------------------------------------------------------------------------

DENSE = {(13, 224): 4.5661, (21, 224): 7.1780, (13, 384): 16.2694, (21, 384): 24.8491}


@pytest.mark.parametrize("which", sampled(DENSE, quick=[(13, 224)]))
def test_dense_costs_are_the_anchors_to_their_digits_in_both_implementations(which: tuple[int, int]) -> None:
    """On the meta device nothing can be read back, so the parts are added up here as a pass would book them."""
    size, side = which
    depth = (1, 2, 10) if size == 13 else (1, 4, 16)
    images = torch.empty(1, 3, side, side, device="meta")
    for model in ("authors", "transformers"):
        with torch.device("meta"):
            if model == "authors":
                made: Any = (cvt_13 if size == 13 else cvt_21)(side)
            else:
                made = tf.CvtForImageClassification(
                    tf.CvtConfig(depth=list(depth), num_labels=1000, drop_path_rate=[0.0] * 3)
                )
        host = host_of(made.eval())
        batch = host.embed(images)
        assert (host.embedded, host.depth) == (sum(depth[:2]), sum(depth))
        total = host.embed_macs(images) + host.classifier_macs
        tokens = torch.tensor((side // 16) ** 2 + 1)
        for index in range(host.embedded, host.depth):
            block = host.block(index)
            keys = torch.tensor(block.on_grid(batch).count + 1)
            total += block.convolution_macs(batch.tables.grid)
            total += float(block.cost.macs(queries=tokens, keys=keys, outputs=tokens, mlp=tokens))
        assert round(float(total) / 1e9, 4) == DENSE[size, side]


@pytest.mark.slow
@torch.no_grad()
def test_a_real_pass_of_cvt_13_books_its_anchor() -> None:
    model = cvt_13().eval()
    found, trace = reduce_tokens(model, Placement()).trace(torch.zeros(1, 3, 224, 224))
    assert float(trace.macs) == float(trace.reference_macs) == 4_566_089_216
    torch.testing.assert_close(found, model(torch.zeros(1, 3, 224, 224)), rtol=0, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() == 2 * 4_566_089_216


@both
@pytest.mark.parametrize("fill", ["last", "zero"])
@torch.no_grad()
def test_reduced_costs_are_the_formula_of_a_block(kind: str, fill: str, images: Tensor) -> None:
    model = make_cvt(kind)
    fast = reduce_tokens(model, at([3, 5], Chosen(0.08)), host={"fill": fill})
    _, trace = fast.trace(images)
    with FlopCounterMode(display=False) as counter:
        model(images[:1])
    dense = reduce_tokens(model, Placement()).trace(images[:1])[1].macs
    assert float(dense) == counter.get_total_flops() / 2
    dead = 0
    for image in range(4):
        executed = published = float(fast.host.embed_macs(images) + D * CLASSES)
        here = torch.ones(PLACES, dtype=torch.bool)
        for block in ALL:
            n, m = trace.tokens[image, block].item(), trace.tokens[image, block + 1].item()
            live = sum(
                fill == "last" or any(here[p] and sees(c, p) for p in range(PLACES)) for c in range(CELLS)
            )  # fmt: skip
            here = trace.kept(block)[image]
            fixed = 9 * D * (PLACES + 2 * CELLS)
            for order, keys in (("executed", live + 1), ("published", CELLS + 1)):
                queries = m if order == "executed" else n
                # query, key and value, logits; output, sum of values, MLP of ratio 2
                outputs = queries if order == "executed" else n
                macs = fixed + queries * D**2 + 2 * keys * D**2 + queries * keys * D
                macs += outputs * D**2 + outputs * keys * D + 4 * m * D**2
                executed += macs if order == "executed" else 0
                published += macs if order == "published" else 0
            dead += CELLS - live
        assert float(trace.macs[image]) == executed
        assert float(trace.reference_macs[image]) == published
    assert (dead > 0) == (fill == "zero")
    close(fast.cost(images), trace.macs, atol=0)


@torch.no_grad()
def test_work_is_shared_between_placements_and_between_options(images: Tensor) -> None:
    model, shared = make_cvt(), Shared()
    for blocks in ([3, 5], [4], [6]):
        for fill in ("last", "zero"):
            fast = reduce_tokens(model, at(blocks, TopK(Ratio(0.3))), host={"fill": fill})
            (alone, own), (together, trace) = fast.trace(images), fast.trace(images, shared)
            assert torch.equal(alone, together) and torch.equal(own.macs, trace.macs)
            assert torch.equal(own.tokens, trace.tokens)


# --- the methods ------------------------------------------------------------------------------------------------------

REFUSED = {
    **dict.fromkeys(
        ("patch_merger", "sinkhorn", "sit", "token_learner", "hvt_pool", "stvit", "stvit_r"), "read tokens in their "
    ),
    **dict.fromkeys(("gtp", "back_tracking", "sttabt"), "attend to cells of a coarser grid"),
}  # fmt: skip
FEW = ("ats", "evit", "tome", *REFUSED)
EACH = sampled(reading("images"), quick=FEW)


def settings(name: str) -> dict[str, Any]:
    takes = {parameter.name for parameter in available()[name].settings()}
    budget = {"drop": 9} if name == "tome" else {"ratio": 0.6}
    return {"name": name, **({"budget": budget} if "budget" in takes else {})}


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_every_method_runs_or_is_refused_by_name_and_alone_is_as_in_a_batch(name: str, images: Tensor) -> None:
    model, reducer = make_cvt(), build(settings(name))
    if name in REFUSED:
        with pytest.raises(ReducerError, match=f"{name} is not for this CvtForImageClassification.*{REFUSED[name]}"):
            reduce_tokens(model, at([3, 5], reducer))
        return
    if name == "zero_tprune":  # at the border of an even grid tokens of one cell tie, and its products break ties
        images = images[:, :, :56, :56]
    for fill in ("last", "zero"):
        fast = reduce_tokens(model, at([4, 5], copy.deepcopy(reducer)), host={"fill": fill}).double()
        together, trace = fast.trace(images)
        assert torch.isfinite(together).all() and (trace.macs > 0).all()
        assert (trace.reference_macs >= trace.macs - trace.reducer_macs - 1e-3).all()
        close(logits_of(fast(images)), together, atol=1e-12)
        close(fast.cost(images), trace.macs, atol=1e-3)
        for i in range(len(images)):
            alone, own = fast.trace(images[i : i + 1])
            close(alone[0], together[i])
            assert torch.equal(own.tokens[0], trace.tokens[i])
            torch.testing.assert_close(own.macs[0], trace.macs[i])


MERGING = ("tome", "tofu", "pitome", "atc", "dpc_knn", "token_pooling")


@pytest.mark.parametrize("name", sampled(MERGING, quick=("tome",)))
@torch.no_grad()
def test_merging_methods_run_with_their_owners_on_the_grid(name: str, images: Tensor) -> None:
    spec = {**settings(name), **({"switch": 0.0} if name == "tofu" else {})}
    fast = reduce_tokens(make_cvt("authors"), at([4, 5], build(spec)), host={"fill": "owner"}).double()
    together, trace = fast.trace(images)
    assert (trace.owner(DEPTH - 1) >= 0).all() and (trace.tokens[:, -1] < 65).all()
    for i in range(len(images)):
        alone, own = fast.trace(images[i : i + 1])
        close(alone[0], together[i])
        torch.testing.assert_close(own.macs[0], trace.macs[i])


@pytest.mark.parametrize("name", sampled([n for n in reading("images") if n not in REFUSED], quick=("ats", "tome")))
def test_every_method_trains(name: str, images: Tensor) -> None:
    model = make_cvt("authors")
    fast = reduce_tokens(model, at([4, 5], build(settings(name)))).double().train()
    fast(images).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not silent


@torch.no_grad()
def test_a_stack_and_a_schedule_and_half_precision_run(images: Tensor) -> None:
    model = make_cvt()
    fast = reduce_tokens(model, at([3, 5], Stack(EViT(Ratio(0.8)), ToMe(Drop(5)))) | every(1, TopK(Ratio(0.9))))
    assert sorted(fast.placement.blocks) == [*ALL]
    assert torch.isfinite(fast(images).logits).all()
    half = make_cvt("authors", dtype=torch.bfloat16)
    found, trace = reduce_tokens(half, at([3, 5], ATS(Ratio(0.5)))).trace(images.bfloat16())
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all() and trace.macs.dtype == torch.float64


@pytest.mark.parametrize("fill", ["last", "owner"])
@torch.no_grad()
def test_images_of_other_sizes_and_a_smaller_input_are_the_model_on_those(fill: str, images: Tensor) -> None:
    model, wide = make_cvt(), torch.randn(2, 3, 48, 80, dtype=torch.float64)
    fast = reduce_tokens(model, at([3, 5], TopK(Ratio(1.0))), host={"fill": fill})
    close(fast(wide).logits, model(wide).logits)
    assert fast.trace(wide)[1].tokens[0].tolist() == [61] * 8
    small = reduce_tokens(model, at(3, build({"name": "small_input", "budget": {"count": 16}})), host={"fill": fill})
    smaller = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    close(small(images).logits, model(smaller).logits)
    _, trace = small.trace(images)
    assert trace.tokens[0, 0] == 17 and trace.owner(3).shape == (4, 64)
    # tokens of one cell alone have equal keys, and ToMe's ties between them would go by the last bit
    merging = at(4, build({"name": "dpc_knn", "budget": {"count": 9}}) if fill == "owner" else TopK(Count(9)))
    both_ = reduce_tokens(model, at(3, build({"name": "small_input", "budget": {"count": 16}})) | merging,
                          host={"fill": fill})  # fmt: skip
    close(both_.trace(images)[0], reduce_tokens(model, merging, host={"fill": fill})(smaller).logits)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_reducers_of_other_stages_and_variants_are_refused_by_name(images: Tensor) -> None:
    model = make_cvt()
    refused = (
        "topk at block 2: blocks 0 to 2 of this CvtForImageClassification take no reducer, as the tokens of their "
        "stages feed a convolution; place it at block 3 or later"
    )
    with pytest.raises(ReducerError, match=refused):
        reduce_tokens(model, at([2, 4], TopK(Ratio(0.5))))
    for wrong, message in (
        ({"fill": "first"}, "'fill' of CvtForImageClassification is one of 'last', 'zero', 'owner'; got 'first'"),
        ({"over": "frame"}, "has no option 'over': it knows 'fill', 'spread'"),
    ):
        with pytest.raises(ReducerError, match=message):
            reduce_tokens(model, Placement(), host=wrong)
    with pytest.raises(UnsupportedModel, match=r"stage 2, the last one, has no class token"):
        reduce_tokens(make_cvt(cls_token=[False] * 3), Placement())
    with pytest.raises(UnsupportedModel, match="does not give a query for each token"):
        reduce_tokens(make_cvt(stride_q=[1, 1, 2]), Placement())
    assert host_of(make_cvt(stride_kv=[2, 2, 1])).block(3).window == Window(3, 1, 1)


class Other(nn.Module):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


def spoil(model: Any, where: str) -> None:
    layer = model.cvt.encoder.stages[2].layers[1]
    if where == "layer":
        model.cvt.encoder.stages[2].layers[1] = Other()
    elif where == "attention":
        layer.attention.attention = Other()
    elif where == "convolution":
        layer.attention.attention.convolution_projection_key.convolution_projection = Other()
    elif where == "reflecting":
        layer.attention.attention.convolution_projection_key.convolution_projection.convolution.padding_mode = "reflect"
    elif where == "mlp":
        layer.intermediate = Other()
    elif where == "hook":
        layer.attention.register_forward_hook(lambda *_: None)
    elif where == "stage":
        model.cvt.encoder.stages[2].forward = lambda *_: None
    else:
        layer.drop_path = Other()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("layer", "layer 1 of stage 2 is a Other, not CvtLayer"),
        ("attention", "the attention of layer 1 of stage 2 is a Other, not CvtSelfAttention"),
        ("convolution", "the key of layer 1 of stage 2 is a Other, not CvtSelfAttentionConvProjection"),
        ("reflecting", "the key of layer 1 of stage 2 is not convolved by a square depthwise"),
        ("mlp", "the MLP of layer 1 of stage 2 is a Other, not CvtIntermediate"),
        ("hook", "layer 1 of stage 2 has a forward hook, which would be bypassed"),
        ("stage", "stage 2 has a forward of its own, which would be bypassed"),
        ("path", "the drop_path of layer 1 of stage 2 is a Other, not CvtDropPath"),
    ],
)
def test_a_changed_part_is_refused_by_name_also_after_wrapping(where: str, message: str, images: Tensor) -> None:
    model = make_cvt()
    fast = reduce_tokens(model, Placement())
    spoil(model, where)
    for ask in (fast, lambda _: reduce_tokens(model, Placement())):
        with pytest.raises(UnsupportedModel, match=message):
            ask(images)


def test_the_authors_blocks_are_checked_too() -> None:
    model = make_cvt("authors")
    model.stage2.blocks[0].mlp.act = Other()
    with pytest.raises(UnsupportedModel, match="the MLP of block 0 of stage 2 is not known to act token by token"):
        reduce_tokens(model, Placement())
    assert sum(DEPTHS) == DEPTH


@pytest.mark.slow  # the exporter takes its time
@torch.no_grad()
def test_an_export_says_what_no_graph_can_hold(images: Tensor) -> None:
    model = make_cvt("authors")
    with pytest.raises(ReducerError, match="a graph that is exported has fixed sizes; run this model in PyTorch"):
        torch.export.export(reduce_tokens(model, at([3, 5], TopK(Ratio(0.5)))), (images,))
