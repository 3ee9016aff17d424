"""A reduced model has one mode, the plain model's, whoever sets it."""

from __future__ import annotations

import pytest
import torch

from reducers import Ratio, Stack, TopK, at, build, reduce_tokens

from .conftest import make_vit


def masking(name: str):
    """A model whose reducer masks by chance in training and removes tokens otherwise."""
    model = make_vit()
    return model, reduce_tokens(model, at([1, 2], build({"name": name, "budget": {"ratio": 0.5}})))


@pytest.mark.parametrize("name", ["dynamicvit", "tps"])
@torch.no_grad()
def test_the_mode_of_the_model_is_that_of_the_reduced_one(name, images):
    model, reduced = masking(name)
    expected = reduced(images)
    for trains, evaluates in ((model.train, model.eval), (reduced.train, reduced.eval), (model.train, reduced.eval)):
        trains()
        assert reduced.training and model.training
        _, trace = reduced.trace(images)
        assert (trace.tokens == trace.tokens[:, :1]).all(), "in training all stay, under a mask"
        assert all(part.training for part in reduced.reducers.modules())
        assert not torch.equal(reduced(images), reduced(images)), "drawn by chance"
        evaluates()
        assert not reduced.training and not model.training
        assert torch.equal(reduced(images), expected)
        assert not any(part.training for part in reduced.reducers.modules())


def test_models_that_share_a_base_share_its_mode(images):
    model, first = masking("dynamicvit")
    second = reduce_tokens(model, at(1, Stack(TopK(Ratio(0.5)))))
    first.train()
    assert second.training
    second.eval()
    assert not first.training
    assert torch.equal(first(images), first(images))


def test_the_mode_set_by_hand_is_the_base_s_own():
    model, reduced = masking("tps")
    reduced.training = True
    assert model.training and not model.blocks[0].training
