"""Work shared between placements, and cost alone: nothing of either may show in a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reducers import ATS, Count, EViT, Identity, Ratio, ReducerError, Shared, TopK, at, reduce_tokens
from reducers.hosts import host_of
from reducers.placement import Placement
from tests.samples import reading, shared_out

from .clip_models import make_clips, make_inputs
from .conftest import DEPTH, make_vit
from .cvt_models import DEPTHS, SIDE, make_cvt
from .test_contract import CASES, fresh, model_for, placed, settings, some, unit
from .test_xvit import clips_for
from .test_xvit import made as make_xvit


def bits(trace):
    kept = [trace.kept(block) for block in range(DEPTH)]
    owner = [trace.owner(block) for block in range(DEPTH)]
    class_kept = [trace.class_kept(block) for block in range(DEPTH)]
    return [trace.tokens, trace.macs, trace.reference_macs, trace.reducer_macs, *kept, *owner, *class_kept]


@pytest.mark.parametrize("third", shared_out(range(3), of=3))
@torch.no_grad()
def test_sharing_changes_no_bit_of_any_method(third, images):
    base = make_vit()
    models = [reduce_tokens(base, Placement())]
    models += [
        reduce_tokens(base, at(blocks, fresh(reducer)))
        for reducer in [each for each in CASES.values() if unit(each) == 1][third::3]
        for blocks in (0, 2, [1, 3], 3)
        if blocks or not reducer.uses_previous_attention
    ]
    shared = Shared()
    for model in sorted(models, key=lambda model: model.first_block):
        alone, own = model.trace(images)
        together, trace = model.trace(images, shared=shared)
        assert torch.equal(alone, together)
        assert all(torch.equal(mine, its) for mine, its in zip(bits(own), bits(trace), strict=True))


def driven(host: str) -> tuple[Any, torch.Tensor, int]:
    """A model whose host has options, its inputs, and the block to reduce."""
    if host == "xvit":
        model = make_xvit()
        return model, clips_for(model), 1
    pytest.importorskip("transformers")
    if host == "timesformer":
        model = make_clips("TimesformerForVideoClassification")
        return model, make_inputs(model), 1
    images = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return make_cvt("authors"), images, sum(DEPTHS) - 2


@pytest.mark.parametrize("host", ["xvit", "timesformer", "cvt"])
@torch.no_grad()
def test_models_that_are_driven_otherwise_share_what_nobody_has_reduced(host):
    base, inputs, block = driven(host)
    shared, found = Shared(), []
    for option, values in host_of(base).options.items():
        for value in values if option != "fill" else ("last", "zero"):
            model = reduce_tokens(base, at(block, ATS(Count(5))), host={option: value})
            alone, own = model.trace(inputs)
            together, trace = model.trace(inputs, shared=shared)
            alone, together = (getattr(each, "logits", each) for each in (alone, together))
            assert torch.equal(alone, together), (option, value)
            assert torch.equal(own.tokens, trace.tokens) and torch.equal(own.macs, trace.macs)
            found.append(alone)
    assert len({each.sum().item() for each in found}) > 1, "options tell in results"


@torch.no_grad()
def test_sharing_spares_the_blocks_before_the_first_reduction(images):
    base = make_vit()
    runs = [0] * DEPTH
    for index, block in enumerate(base.blocks):
        block.norm2.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    shared = Shared()
    for placement in (at(2, TopK(Ratio(0.5))), at(2, ATS(Count(9))), at(3, EViT(Ratio(0.5))), at(1, TopK(Count(5)))):
        reduce_tokens(base, placement).trace(images, shared=shared)
    # block 2 runs for each of the first three, and the last, out of order, starts over
    assert runs == [2, 2, 4, 4]


@some
@torch.no_grad()
def test_cost_is_the_cost_of_the_whole_pass(reducer, images):
    base = model_for(reducer).double()
    images = images.double()
    for blocks in ([1, 3], 3) if reducer.uses_previous_attention else (0, [1, 3], 3):
        model = reduce_tokens(base, placed(reducer, at_blocks=blocks))
        _, trace = model.trace(images)
        assert torch.equal(model.cost(images), trace.macs)
        assert torch.equal(model.cost(images, shared=Shared()), trace.macs)


@torch.no_grad()
def test_cost_of_every_kind_of_head(images):
    for kind in ("average", "map", "distilled"):
        model = reduce_tokens(make_vit(kind), at([1], settings("random")))
        assert torch.equal(model.cost(images), model.trace(images)[1].macs)
    dense = reduce_tokens(make_vit(), at(1, Identity()))
    assert torch.equal(dense.cost(images), dense.trace(images)[1].macs)


def test_tokens_of_other_images_models_or_of_training_are_refused(images):
    base = make_vit()
    model = reduce_tokens(base, at(2, TopK(Ratio(0.5))))
    shared = Shared()
    model.trace(images, shared=shared)
    with pytest.raises(ReducerError, match="other images"):
        model.trace(images.clone(), shared=shared)
    with pytest.raises(ReducerError, match="another model"):
        reduce_tokens(make_vit(seed=1), at(2, TopK(Ratio(0.5)))).trace(images, shared=shared)
    with pytest.raises(ReducerError, match="eval mode"):
        reduce_tokens(base.train(), at(2, TopK(Ratio(0.5)))).trace(images, shared=Shared())


def test_the_first_block_counts_one_that_must_record_its_attention():
    base = make_vit()
    assert reduce_tokens(base, Placement()).first_block == DEPTH
    for name in reading("images"):
        reducer = settings(name)
        if unit(reducer) > 1:
            continue
        early = reducer.uses_previous_attention
        assert reduce_tokens(base, at([2, 3], reducer)).first_block == 2 - early
