"""Hosts: the worked example of docs/hosts.md runs, and the families that are driven are those that are listed."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
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
    Drop,
    EViT,
    Identity,
    Placement,
    Ratio,
    ReducerError,
    Shared,
    Stack,
    ToMe,
    TopK,
    Trace,
    UnsupportedModel,
    at,
    available,
    build,
    every,
    reduce_tokens,
)  # fmt: skip
from reducers.hosts import TYPES, host_of, hosts
from reducers.hosts.protocol import Family, HostBlock, Stage
from reducers.placement import placement_from
from reducers.reducer import Traits
from reducers.schedule import Flat
from reducers.tokens import TokenBatch
from tests.samples import reading

from .test_contract import unit

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


@pytest.mark.parametrize("name", reading("images"))
@torch.no_grad()
def test_every_method_runs_in_the_toy_and_alone_is_as_in_a_batch(name: str, toy: ModuleType, scenes: Tensor) -> None:
    settings = {"budget": {"count": 9}} if "budget" in {p.name for p in available()[name].settings()} else {}
    reducer = build({"name": name, **settings})
    if unit(reducer) > 1:
        with pytest.raises(ReducerError, match="in units of"):
            reduce_tokens(made(toy), at([1, 2], reducer))
        return
    fast = reduce_tokens(made(toy), at([1, 2], reducer)).double()
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


# --- options of a model -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_is_asked_for_its_own_options_and_for_no_others(
    toy: ModuleType, scenes: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(toy)
    assert host_of(model).chosen == {}
    with pytest.raises(ReducerError, match="Toy has no option 'fill': it knows none"):
        reduce_tokens(model, Placement(), host={"fill": "zero"})
    monkeypatch.setattr(toy.ToyHost, "options", {"fill": ("last", "zero"), "spread": ("mass", "nearest")})
    assert host_of(model).chosen == {"fill": "last", "spread": "mass"}
    fast = reduce_tokens(model, at(1, TopK(Ratio(0.5))), host={"fill": "zero"})
    for each in (fast, copy.deepcopy(fast)):  # a copy's base is another one, and its host is made anew
        each(scenes)
        assert each.host.model is each.base and each.host.chosen == {"fill": "zero", "spread": "mass"}
    for wrong, message in (
        ({"filling": "zero"}, "Toy has no option 'filling': it knows 'fill', 'spread'"),
        ({"fill": "owner"}, "the option 'fill' of Toy is one of 'last', 'zero'; got 'owner'"),
        ({"fill": None}, "the option 'fill' of Toy is one of 'last', 'zero'; got None"),
        ("zero", "options of a model are written {name: value}; got 'zero'"),
    ):
        with pytest.raises(ReducerError, match=message):
            reduce_tokens(model, Placement(), host=wrong)  # type: ignore[arg-type]


# --- blocks that are a part of the embedding --------------------------------------------------------------------------

WALL = 2  # blocks of the walled toy that `embed` computes


@pytest.fixture
def walled(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A toy of five blocks, and the same toy under a host that embeds the first two of them."""

    class Walled(toy.ToyHost):  # type: ignore[misc,name-defined]
        embedded, embedded_as = WALL, "their tokens feed a convolution"

        @property
        def stages(self) -> tuple[Stage, ...]:
            (whole,) = super().stages
            other = replace(whole, last=WALL - 1, grid=(12, 12), width=8, heads=1, prefix=0, has_class_token=False)
            return other, replace(whole, first=WALL)

        def embed(self, images: Tensor, **named: bool) -> TokenBatch:
            batch = super().embed(images, **named)
            x = batch.layout.pad(batch.x)
            for layer in self.model.layers[:WALL]:
                x = layer(x, self.model.angles)
            return replace(batch, x=x.flatten(0, 1))

        def embed_macs(self, images: Tensor, **named: bool) -> int:
            rows = torch.tensor(37)
            block = super().block(0).cost.macs(queries=rows, keys=rows, outputs=rows, mlp=rows)
            return super().embed_macs(images, **named) + WALL * int(block)

        def block(self, index: int) -> HostBlock:
            assert index >= WALL, "a block of the embedding is nobody's to run"
            return super().block(index)

        def enter(self, block: int, batch: TokenBatch) -> TokenBatch:
            raise AssertionError("the embedding has entered the stage of the first block behind it")

    module = ModuleType("walled_host")
    module.HOST = Walled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "walled_host", module)
    kind = type("Wall", (toy.Toy,), {"__module__": "toy_host"})
    monkeypatch.setitem(TYPES, "toy_host.Wall", "walled_host")
    torch.manual_seed(0)
    plain, wall = toy.Toy(depth=5).double().eval(), kind(depth=5).double().eval()
    wall.load_state_dict(plain.state_dict())
    return plain, wall


def told(trace: Trace) -> list[Tensor]:
    by_block = [each(block) for block in range(5) for each in (trace.owner, trace.kept, trace.class_kept)]
    return [trace.tokens, trace.macs, trace.reference_macs, trace.reducer_macs, *by_block]


# the unit of six of stvit_r has no room here
@pytest.mark.parametrize("name", sorted({*reading("images")} - {*REFUSING, "stvit_r"}))
@torch.no_grad()
def test_behind_a_wall_every_method_does_what_it_does_in_the_whole_model(
    name: str, walled: tuple[Any, Any], scenes: Tensor
) -> None:
    """Numbers of blocks, tokens of the trace, provenance, costs: nothing tells that two blocks were embedded."""
    settings = {"budget": {"count": 9}} if "budget" in {p.name for p in available()[name].settings()} else {}
    reducer = build({"name": name, **settings})
    blocks = [WALL + 1, WALL + 2] if reducer.traits.uses_previous_attention or name == "stvit" else range(WALL, 5)
    plain, wall = (reduce_tokens(model, at(blocks, copy.deepcopy(reducer))).double() for model in walled)
    if name == "sttabt":  # its own network has a block for each that the runtime runs
        assert len(wall.members()[0].approx.blocks) == 5 - WALL
        assert torch.isfinite(wall(scenes)).all()
        return
    wall.reducers.load_state_dict(plain.reducers.state_dict())
    (first, one), (second, other) = plain.trace(scenes), wall.trace(scenes)
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    if name == "back_tracking":  # it asks the blocks that are run for their maps, and books no embedding
        unasked = wall.host.embed_macs(scenes) - plain.host.embed_macs(scenes) + WALL * 37**2 * plain.host.width
        one = replace(one, macs=one.macs - unasked, reducer_macs=one.reducer_macs - unasked)
    for mine, its in zip(told(one), told(other), strict=True):
        torch.testing.assert_close(its, mine, rtol=0, atol=0)
    torch.testing.assert_close(wall.cost(scenes), other.macs, rtol=1e-12, atol=0)
    assert wall.first_block == plain.first_block


@torch.no_grad()
def test_what_a_placement_means_behind_a_wall(walled: tuple[Any, Any], scenes: Tensor) -> None:
    _, wall = walled
    host = host_of(wall)
    assert (host.first_free, host.depth, host.width, host.prefix, host.grid) == (WALL, 5, 32, 1, (6, 6))
    for placement, blocks in (
        (every(1, Identity()), [2, 3, 4]),
        (every(2, Identity(), start=1), [3]),
        (placement_from([{"at": "all", "reducer": {"name": "identity"}}]), [2, 3, 4]),
        (at({"last": 1}, Identity()), [2, 3, 4]),
        (at({"thirds": True}, Identity()), [2, 3, 4]),
        (at(range(2, 5), ToMe(Drop(12)), schedule=Flat()), [2, 3, 4]),
    ):
        fast = reduce_tokens(wall, placement)
        assert sorted(fast.placement.blocks) == blocks
        torch.testing.assert_close(fast.trace(scenes)[1].tokens[:, : WALL + 1], torch.full((4, WALL + 1), 37))
    assert fast.trace(scenes)[1].tokens[0].tolist() == [37, 37, 37, 33, 29, 25]
    with pytest.raises(ReducerError, match="identity at block 1: blocks 0 to 1 of this Wall take no reducer, as their "
                       "tokens feed a convolution; place it at block 2 or later"):  # fmt: skip
        reduce_tokens(wall, at([1, 3], Identity()))
    with pytest.raises(ReducerError, match="'every 4' needs a block of the network where reducers may act"):
        every(4, Identity()).resolve(4, 2)
    with pytest.raises(ReducerError, match="asks for the attention of the block before, and block 1 .* shows none"):
        reduce_tokens(wall, at(2, build({"name": "dynamicvit", "budget": {"ratio": 0.6}})) | at(2, Previous()))


class Previous(Identity):
    traits = Traits(uses_previous_attention=True)


@torch.no_grad()
def test_work_is_shared_behind_a_wall_and_changes_no_bit(walled: tuple[Any, Any], scenes: Tensor) -> None:
    _, wall = walled
    embedded = Embedded(wall)
    shared = Shared()
    for blocks in ([2, 4], [2], [3], [4]):
        fast = reduce_tokens(wall, at(blocks, TopK(Ratio(0.5))))
        alone = fast.trace(scenes)
        before = embedded.times
        together = fast.trace(scenes, shared=shared)
        assert embedded.times - before == (blocks == [2, 4]), "embedded once for all of them"
        assert torch.equal(alone[0], together[0])
        assert all(torch.equal(a, b) for a, b in zip(told(alone[1]), told(together[1]), strict=True))


class Embedded:
    """How often a model's patches were computed."""

    def __init__(self, model: Any) -> None:
        self.times = 0
        model.patches.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.times += 1


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
