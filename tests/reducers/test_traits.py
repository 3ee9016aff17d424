"""What reducers say of themselves: traits, merged by a stack; optional steps; what is their own in a pass."""

from __future__ import annotations

import copy
import gc
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reducers import ATS, Count, Drop, EViT, Identity, Ratio, ReducerError, Stack, TokenReducer, ToMe, at, reduce_tokens
from reducers.methods import DPCKNN, GTP, BackTracking, DynamicViT, KMedoids, SmallInput, STViT
from reducers.reducer import ByReducer, Finishes, Plans, Prepares, RunsBlocks, State, Steps, Traits

from .conftest import make_vit


class Plain(TokenReducer):
    """Leaves everything alone."""

    name = "plain"

    def decide(self, signals: Any, state: State) -> None:
        return None


class Told(Plain):
    """As reducers were written before there were traits: by attributes of the class, of the instance, by a property."""

    adaptive = True
    uses_positions = True

    def __init__(self, *, teach: bool = True) -> None:
        super().__init__()
        self.uses_random = True
        self.teach = teach

    @property
    def needs_teacher(self) -> bool:
        return self.teach


def test_traits_are_those_of_the_instance() -> None:
    assert DynamicViT.traits == Traits(trained=True, site="input")
    assert DynamicViT(Ratio(0.5)).traits == Traits(trained=True, site="input", needs_teacher=True)
    alone = DynamicViT(Ratio(0.5), threshold=0.5, distill_weight=0.0, token_weight=0.0)
    assert alone.traits == Traits(adaptive=True, trained=True, site="input")
    assert DPCKNN(Ratio(0.5), weights="learned", site="input").traits == Traits(trained=True, site="input")
    assert KMedoids(Ratio(0.5)).traits == Traits(uses_previous_attention=True)
    assert BackTracking(Ratio(0.5), count_planning=False).traits.oracle and not BackTracking(Ratio(0.5)).traits.oracle
    chosen = EViT(Ratio(0.7), select=ATS(Ratio(0.5), score="random")).traits
    assert chosen.adaptive and chosen.uses_random and not EViT(Ratio(0.7)).traits.adaptive
    assert STViT(class_token="pool").traits.may_drop_class_token and not STViT().traits.may_drop_class_token


def test_a_copy_has_its_own_traits() -> None:
    first = ATS(Ratio(0.5))
    second = copy.deepcopy(first)
    second.traits = replace(second.traits, uses_random=True)
    assert not first.traits.uses_random and second.traits == replace(first.traits, uses_random=True)


def test_a_stack_has_the_traits_of_its_members_together() -> None:
    ats, tome, gtp = ATS(Ratio(0.5)), ToMe(Drop(3)), GTP(Drop(3))
    assert Stack(tome, ats).traits == Traits(adaptive=True, needs_class_token=True)
    assert Stack(ats, Identity()).traits.cuts_before_values and not Stack(ats, tome).traits.cuts_before_values
    assert Stack(Stack(gtp, tome), ats).traits == Traits(
        adaptive=True, needs_class_token=True, uses_positions=True, needs_token_keys=True
    )
    inputs = DPCKNN(Ratio(0.9), site="input"), KMedoids(Ratio(0.9), site="input")
    assert Stack(*inputs).traits == Traits(site="input", uses_previous_attention=True)
    assert Stack(*inputs, tome).traits.site == "attention"
    dropping = ATS(Ratio(0.5), keep_class_token=False)
    assert Stack(tome, dropping).traits.may_drop_class_token


def test_merged_traits_ask_for_all_that_a_member_asks_for_and_act_where_all_can() -> None:
    flags = [one.name for one in fields(Traits) if one.type == "bool" and one.name != "cuts_before_values"]
    assert len(flags) == 13
    for flag in flags:
        one = replace(Traits(), **{flag: True})
        assert getattr(Traits.merged([Traits(), one, Traits()]), flag) and one == Traits.merged([one, Traits()])
    alone = Traits(inputs=("images",))
    assert Traits.merged([Traits(), Traits()]).inputs == ("images", "clips")
    assert Traits.merged([alone, Traits()]).inputs == Traits.merged([Traits(), alone]).inputs == ("images",)


def test_traits_said_one_by_one_are_understood() -> None:
    assert Told().traits == Traits(adaptive=True, uses_positions=True, uses_random=True, needs_teacher=True)
    assert not Told(teach=False).traits.needs_teacher
    assert Told.adaptive and Told().adaptive and not Plain.adaptive and not Plain().adaptive
    assert not Told.uses_random and Told().uses_random
    assert Stack(Told(teach=False), ToMe(Drop(2))).traits == Traits(
        adaptive=True, uses_positions=True, uses_random=True
    )


def test_a_class_made_from_a_told_one_may_say_otherwise() -> None:
    class Further(Told):
        adaptive = False
        needs_teacher = False
        site = "input"

    class Property(ATS):
        @property
        def may_drop_class_token(self) -> bool:
            return True

    assert Further().traits == Traits(site="input", uses_positions=True, uses_random=True)
    assert Told().traits.adaptive, "and the one it is made from stays"
    assert Property(Ratio(0.5)).traits == replace(ATS(Ratio(0.5)).traits, may_drop_class_token=True)
    assert not ATS(Ratio(0.5)).traits.may_drop_class_token


def test_the_runtime_goes_by_what_an_instance_said_one_by_one() -> None:
    class Asks(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.needs_class_token = True

    with pytest.raises(ReducerError, match="plain needs a class token"):
        reduce_tokens(make_vit("average"), at(1, Asks()))


def test_steps_are_those_that_are_defined() -> None:
    class Prepared(Plain):
        plan = None  # as a user of an earlier version may have it

        def prepare(self, images: Tensor, host: Any) -> Tensor:
            return images

    class ByProperty(Plain):
        @property
        def finish(self) -> Any:
            return None

    assert isinstance(Prepared(), Prepares) and not isinstance(Prepared(), Plans)
    assert Prepared().steps == replace(Plain().steps, prepares=True) and not Prepared().only_decides
    assert Plain().only_decides and not any(vars(Plain().steps).values())
    assert ByProperty().only_decides
    assert isinstance(SmallInput(Count(9)), Prepares) and isinstance(STViT(), RunsBlocks)
    assert not isinstance(ToMe(Drop(1)), Finishes)


def test_protocols_are_asked_once_for_a_reducer(monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = ToMe(Drop(2))
    driven = reduce_tokens(make_vit(), at([1, 3], reducer))
    monkeypatch.setattr(Steps, "of", lambda reducer: pytest.fail("a pass asks again"))
    with torch.no_grad():
        driven(torch.zeros(2, 3, 48, 48))


def test_what_belongs_to_a_reducer_is_found_by_it_and_as_before_by_its_id() -> None:
    first, second = Plain(), Plain()
    plans: ByReducer[int] = ByReducer({first: 1, second: 2})
    assert (plans[first], plans[second], plans[id(first)], plans[id(second)]) == (1, 2, 1, 2)
    with pytest.raises(KeyError):
        plans[Plain()]
    state = State(0, 4, 36)
    state.note(first, "a")
    state.note(first, "b")
    assert state.noted(first) == ["a", "b"] and state.noted(second) == []


def test_a_reducer_is_held_as_long_as_what_belongs_to_it() -> None:
    plans: ByReducer[int] = ByReducer({Plain(): 1})
    gc.collect()
    others = [Plain() for _ in range(100)]  # one of them could have taken the id of one that was gone
    assert len(plans) == 1 and not any(one in plans for one in others)
