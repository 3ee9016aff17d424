"""A batch without images: forward, trace and cost give what they give, of none."""

from __future__ import annotations

import pytest
import torch

from reducers import ReducerError, reduce_tokens
from tests.samples import shared_out

from .test_contract import CASES, model_for, placed


@pytest.mark.parametrize("kind", ["class", "map"])
@pytest.mark.parametrize("name", shared_out(CASES, of=3))
@torch.no_grad()
def test_no_image_gives_no_logits_no_trace_and_no_cost(name, kind):
    try:
        model = reduce_tokens(model_for(CASES[name], kind), placed(CASES[name]))
    except ReducerError:
        assert kind == "map", "only a class token may be lacking"
        return
    images = torch.zeros(0, 3, 48, 48)
    assert model(images).shape == (0, 7)
    logits, trace = model.trace(images)
    assert logits.shape == (0, 7)
    assert trace.tokens.shape == (0, len(model.base.blocks) + 1)
    assert trace.owner(3).shape == trace.kept(3).shape == (0, 36)
    assert model.cost(images).shape == trace.macs.shape == trace.reducer_macs.shape == (0,)
