"""Reducers written for an earlier version (tests/data/reducer_3d191f9.py) run unchanged, and mean what they meant."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from reducers import ATS, Ratio, ReducedViT, Stack, TokenReducer, at, build, reduce_tokens, registry

FILE = Path(__file__).parent / "data" / "reducer_3d191f9.py"
DATA = json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))  # settings of each of its reducers
SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
LAST = 2


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The user's file, imported anew; what it registers is forgotten after the test."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    spec = importlib.util.spec_from_file_location("reducer_3d191f9", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        spec.loader.exec_module(module)
    assert [str(one.message) for one in told if "is now" not in str(one.message)] == []
    return module


def model(**more: object) -> VisionTransformer:
    torch.manual_seed(0)
    made = VisionTransformer(**SIZES, **more)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def entering(base: VisionTransformer, images: Tensor, block: int) -> Tensor:
    """The tokens that enter a block, by timm alone."""
    x = base._pos_embed(base.patch_embed(images))
    return base.blocks[:block](x)


@torch.no_grad()
def projected(base: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the last block, (B, N, heads, width) each."""
    block = base.blocks[LAST]
    parts = block.attn.qkv(block.norm1(entering(base, images, LAST)))
    return parts.unflatten(2, (3, 2, 16)).unbind(2)


@torch.no_grad()
def finished(base: VisionTransformer, after_attention: Tensor) -> Tensor:
    """Logits from the tokens that enter the last block's MLP."""
    block = base.blocks[LAST]
    x = after_attention + block.mlp(block.norm2(after_attention))
    return base.head(base.norm(x)[:, 0])


def kept_by(scores: Tensor, count: int) -> Tensor:
    """(B, N) bool: the highest of the patches' scores."""
    return torch.zeros(scores.shape, dtype=torch.bool).scatter(1, scores.topk(count, dim=1).indices, True)


@pytest.mark.slow  # tests/test_public_paths.py imports it in its fresh process
def test_the_file_registers_its_reducers_in_a_process_of_its_own() -> None:
    program = (
        "import json, runpy, sys\n"
        "runpy.run_path(sys.argv[1], run_name='mine')\n"
        "from reducers import available, build\n"
        "data = {name: {'name': name, **settings} for name, settings in json.loads(sys.argv[2]).items()}\n"
        "print(json.dumps({name: build(one).spec() for name, one in data.items() if name in available()}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", program, FILE, json.dumps(DATA)],
        cwd=FILE.parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert [line for line in told if "is now" not in line] == [], "each says where the thing is by now"
    assert json.loads(done.stdout) == {name: {"name": name, **settings} for name, settings in DATA.items()}


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("name", DATA)
@torch.no_grad()
def test_each_runs_from_plain_data_and_is_traced(name: str, images: Tensor) -> None:
    driven = reduce_tokens(model(), at([1, LAST], build({"name": name, **DATA[name]})))
    logits, trace = driven.trace(images)
    torch.testing.assert_close(logits, driven(images))
    assert trace.tokens.shape == (3, 4) and (trace.tokens[:, -1] < 37).all()
    assert (trace.macs < reduce_tokens(model(), at([], ATS(Ratio(1.0)))).trace(images)[1].macs).all()


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("name", sorted(set(DATA) - {"brighter", "half_input"}))  # the others do more than decide
@torch.no_grad()
def test_each_that_only_decides_stacks_with_ats(name: str, images: Tensor) -> None:
    mine, ats = build({"name": name, **DATA[name]}), ATS(Ratio(0.5))
    alone = reduce_tokens(model(), at(LAST, mine)).trace(images)[1]
    stack = Stack(mine, ats)
    both = reduce_tokens(model(), at(LAST, stack)).trace(images)[1]
    assert stack.adaptive and stack.members == [mine, ats]
    assert (both.tokens[:, -1] <= alone.tokens[:, -1]).all() and (both.tokens[:, -1] < alone.tokens[:, -1]).any()
    assert not (both.kept(LAST) & ~alone.kept(LAST)).any(), "what the first removed stays removed"


@torch.no_grad()
def test_behind_ats_images_of_different_lengths_are_merged_by_place(written: ModuleType, images: Tensor) -> None:
    before = reduce_tokens(model(), at(1, ATS(Ratio(0.5)))).trace(images)[1]
    after = reduce_tokens(model(), at(1, Stack(ATS(Ratio(0.5)), written.PairUp()))).trace(images)[1]
    pairs = before.kept(1).view(3, 6, 3, 2).any(dim=3)
    assert len(set(before.tokens[:, -1].tolist())) > 1
    assert after.tokens[:, -1].tolist() == (1 + pairs.sum(dim=(1, 2))).tolist()


@torch.no_grad()
def test_the_longest_keys_and_values_are_those_that_timm_computes(written: ModuleType, images: Tensor) -> None:
    base = model()
    _, keys, values = projected(base, images)
    for reducer, rows in ((written.KeepLongestKeys, keys), (written.Largest, values)):
        trace = reduce_tokens(base, at(LAST, reducer(Ratio(0.3)))).trace(images)[1]
        assert torch.equal(trace.kept(LAST), kept_by(rows.flatten(2).norm(dim=2)[:, 1:], 10))


@torch.no_grad()
def test_scores_are_found_by_name_and_say_what_they_need(written: ModuleType, images: Tensor) -> None:
    base, budget = model(), Ratio(0.4)
    queries, keys, _ = projected(base, images)
    attention = (torch.einsum("bhd,bnhd->bhn", queries[:, 0], keys) / 4).softmax(dim=2).mean(dim=1)
    by_class = reduce_tokens(base, at(LAST, written.ByScore(budget))).trace(images)[1]
    assert torch.equal(by_class.kept(LAST), kept_by(attention[:, 1:], 14))
    assert written.ByScore(budget).needs_class_token and not written.ByScore(budget, score="random").needs_class_token
    drawn = [reduce_tokens(base, at(LAST, written.ByScore(budget, score="random", seed=seed))) for seed in (0, 0, 1)]
    kept = [one.trace(images)[1].kept(LAST) for one in drawn]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    assert torch.equal(drawn[0].trace(images[1:2])[1].kept(LAST), kept[0][1:2]), "alone as in the batch"


@pytest.mark.parametrize("pool", ["mean", "max"])
@torch.no_grad()
def test_a_merge_pools_what_lies_side_by_side_and_books_its_cost(
    written: ModuleType, images: Tensor, pool: str
) -> None:
    base = model()
    x = entering(base, images, LAST)
    x = x + base.blocks[LAST].attn(base.blocks[LAST].norm1(x))
    pairs = x[:, 1:].unflatten(1, (18, 2))
    pooled = pairs.mean(dim=2) if pool == "mean" else pairs.amax(dim=2)
    logits, trace = reduce_tokens(base, at(LAST, written.PairUp(pool))).trace(images)
    torch.testing.assert_close(logits, finished(base, torch.cat([x[:, :1], pooled], dim=1)), rtol=1e-4, atol=1e-4)
    assert trace.owner(LAST).tolist() == [[1 + patch // 2 for patch in range(36)]] * 3
    assert trace.reducer_macs.tolist() == [36_000.0] * 3


@torch.no_grad()
def test_merged_tokens_are_weighted_by_their_size_in_the_next_block(written: ModuleType, images: Tensor) -> None:
    base = model()
    first, last = base.blocks[1], base.blocks[LAST]
    x = entering(base, images, 1)
    x = x + first.attn(first.norm1(x))
    x = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (18, 2)).mean(dim=2)], dim=1)
    x = x + first.mlp(first.norm2(x))
    queries, keys, values = last.attn.qkv(last.norm1(x)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    sizes = torch.cat([torch.ones(1), torch.full((18,), 2.0)])
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sizes.log().expand(3, 1, 19, 19))
    x = x + last.attn.proj(mixed.transpose(1, 2).flatten(2))
    logits = reduce_tokens(base, at(1, written.PairUp()))(images)
    torch.testing.assert_close(logits, finished(base, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_plan_is_made_from_the_images_before_any_block(written: ModuleType, images: Tensor) -> None:
    bright = images.mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(3, 4)).flatten(1)
    expected = bright > bright.mean(dim=1, keepdim=True)
    trace = reduce_tokens(model(), at(1, written.Brighter())).trace(images)[1]
    assert written.Brighter.adaptive and not written.Brighter().only_decides
    assert torch.equal(trace.kept(LAST), expected)
    assert trace.tokens[:, -1].tolist() == (1 + expected.sum(dim=1)).tolist()


@torch.no_grad()
def test_a_prepared_image_is_what_timm_would_be_shown(written: ModuleType, images: Tensor) -> None:
    base, any_size = model(), model(dynamic_img_size=True)
    any_size.load_state_dict(base.state_dict())
    logits, trace = reduce_tokens(base, at(0, written.HalfInput())).trace(images)
    torch.testing.assert_close(logits, any_size(F.avg_pool2d(images, 2)), rtol=1e-4, atol=1e-4)
    assert trace.tokens[:, 0].tolist() == [10, 10, 10]


def asking(written: ModuleType) -> tuple[ReducedViT, TokenReducer]:
    mine = written.Asking(written.Count(5), weight=0.25)
    return reduce_tokens(model(), at([1, LAST], mine)), mine


def test_parameters_are_made_for_the_model_and_go_to_a_twin_by_state_dict(written: ModuleType, images: Tensor) -> None:
    driven, mine = asking(written)
    assert {name: tuple(one.shape) for name, one in mine.named_parameters()} == {
        "queries.1": (5, 32), "queries.2": (5, 32),
    }  # fmt: skip
    twin, other = asking(written)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        assert not torch.allclose(driven(images), twin(images))
        twin.load_state_dict(driven.state_dict())
        assert torch.equal(driven(images), twin(images))


@torch.no_grad()
def test_learned_queries_mix_the_tokens_that_enter_the_block(written: ModuleType, images: Tensor) -> None:
    mine = written.Asking(written.Count(5))
    base = model()
    driven = reduce_tokens(base, at(LAST, mine))
    x = entering(base, images, LAST)
    shares = (mine.queries[str(LAST)] @ x[:, 1:].transpose(1, 2)).softmax(dim=2)
    x = torch.cat([x[:, :1], shares @ x[:, 1:]], dim=1)
    torch.testing.assert_close(driven(images), base.head(base.norm(base.blocks[LAST](x))[:, 0]), rtol=1e-4, atol=1e-4)
    assert mine.site == "input" and mine.trained and mine.schedule == {"epochs": 1}


def test_losses_read_what_the_pass_noted_and_gradients_reach_the_parameters(
    written: ModuleType, images: Tensor
) -> None:
    from ablations.measure.finetune.objective import TrainingViT

    mine = written.Asking(written.Count(5), weight=0.25)
    driven = TrainingViT(model(), at([1, LAST], mine)).train()
    outputs, state = driven.observed(images)
    (loss,) = mine.losses(state, outputs, torch.zeros(3, dtype=torch.long), None).values()
    first, second = state.noted(mine)
    assert first.shape == (3, 5, 36) and second.shape == (3, 5, 5)
    expected = 0.25 * sum(torch.einsum("bmn,bkn->bmk", one, one).mean() for one in (first, second))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in mine.parameters())
