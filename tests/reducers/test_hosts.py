"""Hosts: the worked example of docs/hosts.md runs, and the families that are driven are those that are listed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reducers import (
    ATS,
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
from reducers.hosts import TYPES, host_of, hosts
from reducers.hosts.protocol import Family

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
DEPTH = 3


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example of the page as one file, and its one line in the table of types."""
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    module = ModuleType("toy_host")
    monkeypatch.setitem(sys.modules, "toy_host", module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(TYPES, "toy_host.Toy", "toy_host")
    return module


def made(toy: ModuleType) -> Any:
    torch.manual_seed(0)
    model = toy.Toy(depth=DEPTH).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def scenes() -> Tensor:
    return torch.randn(4, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_toy_without_reduction_is_the_toy(toy: ModuleType, scenes: Tensor) -> None:
    model = made(toy)
    for placement in (Placement(), at(range(DEPTH), Identity()), at(1, ATS(Ratio(1.0), variant="official"))):
        fast = reduce_tokens(model, placement)
        if not isinstance(placement.blocks.get(1), ATS):
            torch.testing.assert_close(fast(scenes), model(scenes), rtol=0, atol=1e-10)
    with FlopCounterMode(display=False) as counter:
        model(scenes[:1])
    assert reduce_tokens(model, Placement()).trace(scenes[:1])[1].macs[0] == counter.get_total_flops() / 2


@torch.no_grad()
def test_what_stays_is_turned_by_the_place_it_came_from(toy: ModuleType, scenes: Tensor) -> None:
    """A selection, against the toy's own layers on the rows that are left and with their own angles."""
    model = made(toy)
    found, trace = reduce_tokens(model, at(1, ATS(Ratio(0.5)))).trace(scenes)
    assert len(set(trace.tokens[:, 2].tolist())) > 1, "images keep different numbers"
    for image, kept in enumerate(trace.kept(1)):
        x = model.layers[0](model.tokens(scenes[image : image + 1]), model.angles)
        rows = torch.cat([torch.tensor([0]), kept.nonzero().flatten() + 1])
        layer = model.layers[1]
        feed, layer.feed = layer.feed, torch.nn.Sequential(layer.feed[0], torch.nn.GELU(), layer.feed[2])
        x = layer(x, model.angles)[:, rows]  # attention over all, then the MLP row by row: gathering commutes
        layer.feed = feed
        x = model.layers[2](x, model.angles[rows])
        torch.testing.assert_close(found[image], model.head(model.norm(x[:, 0]))[0], rtol=0, atol=1e-10)


REFUSING = {"small_input": "cannot be resized"}  # what the toy does not take


@pytest.mark.parametrize("name", sorted(available()))
@torch.no_grad()
def test_every_method_runs_in_the_toy_and_alone_is_as_in_a_batch(name: str, toy: ModuleType, scenes: Tensor) -> None:
    settings = {"budget": {"count": 9}} if "budget" in {p.name for p in available()[name].settings()} else {}
    fast = reduce_tokens(made(toy), at([1, 2], build({"name": name, **settings}))).double()
    if name in REFUSING:
        with pytest.raises(ReducerError, match=REFUSING[name]):
            fast(scenes)
        return
    together, trace = fast.trace(scenes)
    assert torch.isfinite(together).all() and (trace.macs > 0).all()
    alone, own = fast.trace(scenes[2:3])
    torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-9)
    assert torch.equal(own.tokens[0], trace.tokens[2])


def test_gradients_reach_every_part_of_the_toy(toy: ModuleType, scenes: Tensor) -> None:
    model = made(toy)
    reduce_tokens(model, at([0, 1], Stack(EViT(Ratio(0.8)), ToMe(Ratio(0.8)))))(scenes).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and torch.isfinite(grad).all() and grad.any() for grad in grads.values())


def test_a_toy_that_was_changed_is_refused_and_an_unknown_model_is_refused_by_name(
    toy: ModuleType, scenes: Tensor
) -> None:
    model = made(toy)
    fast = reduce_tokens(model, at(1, TopK(Ratio(0.5))))
    model.layers[2] = torch.nn.Sequential(model.layers[2])
    for ask in (fast, lambda _: reduce_tokens(model, Placement())):
        with pytest.raises(UnsupportedModel, match="block 2 is no plain Layer"):
            ask(scenes)
    with pytest.raises(UnsupportedModel, match=r"Subtoy is not supported\. Supported: timm's"):
        reduce_tokens(type("Subtoy", (toy.Toy,), {})(), Placement())


# --- the families -----------------------------------------------------------------------------------------------------


def probes(family: str) -> Iterator[tuple[str, torch.nn.Module]]:
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            yield name, timm.create_model(name)


def test_the_hosts_are_those_of_the_table() -> None:
    assert [host.__module__ for host in hosts()] == list(dict.fromkeys(TYPES.values()))
    named = [(host.library, family.name) for host in hosts() for family in host.families]
    assert len(set(named)) == len(named)


FAMILIES = [family for host in hosts() if host.library == "timm" for family in host.families]


def test_refused_entry_points_exist() -> None:
    for host in hosts():
        for family in host.families:
            refused = [name for names in family.refused.values() for name in names]
            assert set(refused) <= set(host.entry_points(family)) and len(set(refused)) == len(refused)


@pytest.mark.slow
@pytest.mark.parametrize("told", FAMILIES, ids=lambda family: family.name)
def test_the_families_are_driven_but_for_what_is_said_to_be_refused(told: Family) -> None:
    refused = set()
    for name, probe in probes(told.name):
        try:
            host_of(probe)
        except UnsupportedModel:
            refused.add(name)
    assert refused == {name for names in told.refused.values() for name in names}


def small(name: str) -> Any:
    """A model with a convolutional stem, cut to two blocks, far from neutral."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=7)
    del model.blocks[2:]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vitamin_small_224"])
@torch.no_grad()
def test_a_hybrid_and_a_vitamin_without_reduction_are_timms_and_cost_what_their_layers_cost(name: str) -> None:
    model, images = small(name), torch.randn(1, 3, 224, 224)
    fast = reduce_tokens(model, at([0, 1], Identity()))
    with FlopCounterMode(display=False) as counter:
        expected = model(images)
    found, trace = fast.trace(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert float(trace.macs[0]) == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
    reduced = reduce_tokens(model, at(0, build({"name": "tome", "budget": {"drop": 20}}))).trace(images)[1]
    assert reduced.tokens[0, 1] == reduced.tokens[0, 0] - 20
