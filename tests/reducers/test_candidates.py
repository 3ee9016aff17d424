"""What of which method a search may try: what methods declare holds, and who is no candidate says why."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from reducers import (
    ATS,
    Count,
    Drop,
    EViT,
    Identity,
    Ratio,
    Stack,
    TokenReducer,
    TopK,
    at,
    available,
    build,
    reduce_tokens,
)
from reducers.candidates import (
    budget_kinds,
    searchable_faults,
    searchable_settings,
    takes_schedule,
    why_no_candidate,
)
from reducers.methods import DPCKNN, EVS, RLT, STTABT, BackTracking, HVTPool
from reducers.reducer import Searchable, Traits
from tests.samples import reading

from .conftest import make_vit
from .test_contract import model_for, placed

BUDGETS: dict[str, Any] = {"count": 20, "ratio": 0.5, "drop": 12}  # of 36 patches
CANDIDATES = {
    "atc", "ats", "bat", "dpc_knn", "etps", "evit", "gtp", "kmedoids", "pitome", "tofu", "token_pooling", "tome",
    "topk", "zero_tprune",
}  # fmt: skip
VALUES = [
    (name, setting, value)
    for name, method in available().items()
    if "images" in method.traits.inputs
    for setting, values in method.searchable.items()
    for value in values
]


def built(name: str, **settings: Any) -> TokenReducer:
    kinds = budget_kinds(available()[name])
    budget = {"budget": {kinds[0]: BUDGETS[kinds[0]]}} if kinds else {}
    return build({"name": name, **budget, **settings})


@pytest.mark.parametrize("name", sorted(available()))
def test_what_a_method_declares_are_its_settings_with_their_defaults_first(name: str) -> None:
    assert searchable_faults(available()[name]) == []


@pytest.mark.parametrize(("name", "setting", "value"), VALUES)
def test_every_value_is_another_method_that_works(name: str, setting: str, value: Any, images: Tensor) -> None:
    reducer = built(name, **{setting: value})
    default = value == available()[name].searchable[setting][0]
    assert (reducer.spec() == built(name).spec()) == default
    with torch.no_grad():
        logits, trace = reduce_tokens(make_vit(), at([1, 2], reducer)).trace(images)
    assert logits.isfinite().all()
    assert (trace.tokens[:, -1] < 37).all(), "it reduces"
    assert not reducer.traits.trained and not reducer.traits.control


@pytest.mark.parametrize("name", reading("images"))
def test_the_kinds_of_budget_it_names_are_taken(name: str, images: Tensor) -> None:
    method = available()[name]
    kinds = budget_kinds(method)
    assert set(kinds) <= set(BUDGETS) and len(set(kinds)) == len(kinds)
    for kind in kinds:
        reducer = build({"name": name, "budget": {kind: BUDGETS[kind]}})
        with torch.no_grad():
            cost = reduce_tokens(model_for(reducer), placed(reducer, at_blocks=[1, 2])).cost(images[:2])
        assert (cost > 0).all(), kind
    assert not takes_schedule(method) or "drop" in kinds or method.traits.trained


def test_the_candidates_are_the_methods_that_work_off_the_shelf_and_have_a_budget() -> None:
    assert {name for name, method in available().items() if not why_no_candidate(method)} == CANDIDATES
    with_weights = {name for name, method in available().items() if not why_no_candidate(method, weights=True)}
    assert with_weights - CANDIDATES == {
        "dynamicvit", "patch_merger", "sinkhorn", "sit", "sttabt", "stvit", "stvit_r", "token_learner", "tps",
    }  # fmt: skip
    controls = {name for name, method in available().items() if method.traits.control}
    assert controls == {
        "back_tracking", "fewer_frames", "fixed_pattern", "identity", "random", "shrinking_pattern", "small_input"
    }  # fmt: skip
    of_clips = {name for name, method in available().items() if not why_no_candidate(method, inputs="clips")}
    assert of_clips == CANDIDATES | {"evs", "vidcom2"}, "of these, methods for clips alone"
    assert "no images" in why_no_candidate(EVS) and "no budget" in why_no_candidate(RLT, inputs="clips")
    for name in CANDIDATES:
        assert built(name).traits.trained is built(name).traits.oracle is built(name).traits.control is False


def test_an_instance_is_told_as_it_is_set_up() -> None:
    assert why_no_candidate(TopK(Ratio(0.5))) == ""
    assert "control" in why_no_candidate(TopK(Ratio(0.5), score="random"))
    assert "control" in why_no_candidate(ATS(Count(9), score="random"))
    assert "control" in why_no_candidate(EViT(Ratio(0.5), select=ATS(Count(9), score="random")))
    assert "control" in why_no_candidate(Stack(TopK(Ratio(0.5)), Identity()))
    assert "training" in why_no_candidate(DPCKNN(Count(9), weights="learned"))
    assert why_no_candidate(DPCKNN(Count(9), weights="learned"), weights=True) == ""
    assert "no budget" in why_no_candidate(HVTPool()) and budget_kinds(HVTPool()) == ()
    assert "no clips" in why_no_candidate(STTABT, weights=True, inputs="clips")
    assert why_no_candidate(TopK, inputs="clips") == ""
    assert BackTracking.traits.control and BackTracking(Drop(3), count_planning=False).traits.oracle


class Declares(TokenReducer):
    """A user's own method."""

    name = "declares"
    traits = Traits(oracle=True)
    searchable: ClassVar[Searchable] = {"power": (1.0, 0.5), "budget": (1, 2), "sharp": (True, False), "wide": (True,)}

    def __init__(self, *, power: float = 2.0, sharp: bool = True, wide: bool = True) -> None:
        super().__init__()


def test_a_declaration_that_does_not_hold_is_found() -> None:
    assert searchable_faults(Declares) == [
        "it has no setting 'budget'",
        "power: its default 2.0 does not come first",
        "wide: (True,) are not several different values",
    ]
    assert searchable_settings(Declares) is Declares.searchable and searchable_settings(Identity) == {}
    assert "oracle" in why_no_candidate(Declares)
