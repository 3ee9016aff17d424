"""The space: every candidate is plain stages with one kind of budget open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ablations.search.errors import SearchError
from ablations.search.planner import Sampled
from ablations.search.space import AS_TRAINED, EACH, Method, Space, describe, spread, starts, trained
from ablations.trial.free_settings import filled, free_kinds
from ablations.trial.given import given_training, short_name
from ablations.trial.stages import Stages, Training
from reducers import placement_from
from tests.search.conftest import Scripted

TOME = Method("tome", ("ratio", "drop"), {"proportional": (True, False)}, scheduled=True)
ATS = Method("ats", ("ratio", "count"))
EVIT = Method("evit", settings={"select": (None, {"name": "ats", "budget": {"ratio": 1.0}})})
SPACE = Space((TOME, ATS, EVIT), tuple(range(12)))


def test_blocks_are_spread_evenly_to_the_last() -> None:
    blocks = list(range(3, 12))
    assert spread(blocks, 3) == [3, 6, 9] and spread(blocks, 1) == [3] and spread(blocks, EACH) == blocks
    assert spread(blocks, 2) == [3, 7] and spread([10, 11], 6) == [10, 11]


def test_one_method_with_a_schedule() -> None:
    chooser = Scripted(first_blocks=EACH, tome_budget="drop", schedule="later", first_tome_proportional=False)
    stages = SPACE.draw(chooser).stages
    (stage,) = stages
    assert stage["at"] == list(range(12))
    assert stage["stack"] == [
        {"name": "tome", "budget": {"drop": "auto"}, "proportional": False, "schedule": {"late": 2}}
    ]
    assert describe(stages) == "ToMe 0-11 (proportional off, schedule late 2)"


def test_two_methods_in_turn_and_in_one_block() -> None:
    apart = SPACE.draw(Scripted(shape="two", second_method="ats", second_from=6, second_blocks=EACH, first_blocks=2,
                                first_keeps=0.8)).stages  # fmt: skip
    assert apart[0] == {"at": [0], "stack": [{"name": "tome", "budget": {"ratio": 0.894}}]}
    assert describe(apart) == "ToMe 0, 6 (keep 0.894), then ATS 6-11"
    at_six = next(stage for stage in apart if 6 in stage["at"])
    assert [reducer["name"] for reducer in at_six["stack"]] == ["tome", "ats"]
    assert free_kinds(Stages.of(apart).data) == {"ratio"}


def test_every_candidate_can_be_built_and_leaves_one_kind_of_budget_open() -> None:
    draw = np.random.default_rng(0)

    class Anything:
        def one_of(self, name: str, options: list[object]) -> object:
            return options[int(draw.integers(len(options)))]

        def whole(self, name: str, low: int, high: int) -> int:
            return int(draw.integers(low, high + 1))

    kinds = set()
    for _ in range(300):
        stages = Stages.of(SPACE.draw(Anything()).stages)
        (kind,) = free_kinds(stages.data)
        kinds.add(kind)
        placement_from(filled(stages.data, {"count": 20, "ratio": 0.9, "drop": 12}), depth=12, patches=196)
        assert describe(stages.data)
    assert kinds == {"ratio", "drop", "count"}


def test_the_first_method_begins_before_the_cost_is_spent() -> None:
    space = Space((TOME, ATS), tuple(range(12)), latest=4)
    asked: dict[str, int] = {}

    class Highest(Scripted):
        def whole(self, name: str, low: int, high: int) -> int:
            asked[name] = high
            return high

    stages = space.draw(Highest(shape="two", second_method="ats")).stages
    assert asked == {"first from": 4, "second from": 11} and stages[0]["at"][0] == 4


def test_each_method_is_tried_first_as_papers_place_it() -> None:
    planner = Sampled(SPACE, size=3, seed=0, label=describe, fits=lambda *_: None, starts=starts(SPACE))
    asked = [planner.ask() for _ in range(4)]
    assert [one.label for one in asked if one is not None] == ["ToMe 3, 6, 9", "ATS 3, 6, 9", "EViT 3, 6, 9"]
    assert asked[3] is None


def test_what_a_model_refuses_is_never_handed_out() -> None:
    def fits(stages: Stages, training: Training) -> None:
        if any(reducer["name"] == "ats" for stage in stages.data for reducer in stage["stack"]):
            raise ValueError("no class token")

    planner = Sampled(SPACE, size=20, seed=0, label=describe, fits=fits)
    handed_out = []
    while (one := planner.ask()) is not None:
        handed_out.append(one)
        planner.tell(one.number, 0.0)
    assert len(handed_out) == len({one.stages for one in handed_out}) == 20
    assert not any("ATS" in one.label.replace("select ATS", "") for one in handed_out)


def test_a_small_space_ends_when_all_of_it_was_tried() -> None:
    space = Space((Method("topk"),), (0, 1))
    planner = Sampled(space, size=500, seed=0, label=describe, fits=lambda *_: None)
    found = []
    while (one := planner.ask()) is not None:
        found.append(one.stages.text)
        planner.tell(one.number, 0.0)
    assert 3 <= len(found) < 500 and len(set(found)) == len(found)


def test_a_space_without_methods_is_refused() -> None:
    with pytest.raises(SearchError, match="no method"):
        Space((), (0,))


GIVEN = given_training(
    Stages.of([{"at": [3, 6, 9], "stack": [{"name": "dynamicvit", "budget": {"ratio": 0.7}, "threshold": 0.5}]}]),
    model="a" * 64, reducers="b" * 64,
)  # fmt: skip


def test_what_was_trained_is_tried_with_its_budget_open_and_as_it_is_and_first_of_all() -> None:
    one = trained(GIVEN, lambda stages: None)
    assert list(one.placements) == ["ratio", AS_TRAINED]
    assert one.placements[AS_TRAINED] == GIVEN.stages.plain()
    (opened,) = one.placements["ratio"]
    assert opened["at"] == [3, 6, 9]
    assert opened["stack"] == [{"name": "dynamicvit", "budget": {"ratio": "auto"}, "threshold": 0.5}]
    space = Space(SPACE.methods, SPACE.free, given=(one,))
    planner = Sampled(space, size=3, seed=0, label=describe, fits=lambda *_: None, starts=starts(space))
    first, second, third = (planner.ask() for _ in range(3))
    assert first is not None and second is not None and third is not None
    assert first.training == second.training == GIVEN and not third.training
    assert first.label == f"DynamicViT 3, 6, 9 (threshold 0.5) (trained {one.name})"
    assert second.label == f"DynamicViT 3, 6, 9 (threshold 0.5, keep 0.7) (trained {one.name})"


def test_budgets_of_another_kind_are_tried_as_shares_where_the_method_takes_them() -> None:
    counts = [{"at": [3], "stack": [{"name": "topk", "budget": {"count": 90}}]}]
    given = given_training(Stages.of(counts), model="a" * 64, reducers="")
    assert list(trained(given, lambda stages: None).placements) == ["count", "ratio", AS_TRAINED]

    def fits(stages: Any) -> None:
        if free_kinds(stages) == {"ratio"}:
            raise ValueError("it takes counts alone")

    assert list(trained(given, fits).placements) == ["count", AS_TRAINED]
    without = [{"at": [3], "stack": [{"name": "avit"}]}]
    assert list(trained(given_training(Stages.of(without), model="a" * 64, reducers=""), fits).placements) == [
        AS_TRAINED
    ]


def test_a_method_behind_what_was_trained_has_blocks_of_its_own() -> None:
    space = Space(SPACE.methods, SPACE.free, given=(trained(GIVEN, lambda stages: None),))
    chooser = Scripted(shape="trained", behind_trained="ats", behind_from=1, behind_blocks=EACH)
    drawn = space.draw(chooser)
    assert drawn.training == GIVEN and drawn.stages[0]["at"] == [3, 6, 9]
    assert drawn.stages[1]["at"] == [5, 7, 8, 10, 11] and drawn.stages[1]["stack"][0]["name"] == "ats"
    assert describe(drawn.stages, drawn.training).endswith(f"then ATS 5, 7, 8, 10, 11 (trained {short_name(GIVEN)})")


def test_a_space_without_given_weights_asks_the_same_questions_as_ever() -> None:
    shapes: list[tuple[Any, ...]] = []

    class Shapes(Scripted):
        def one_of(self, name: str, options: Any) -> Any:
            if name == "shape":
                shapes.append(tuple(options))
            return super().one_of(name, options)

    Space(SPACE.methods, SPACE.free).draw(Shapes())
    Space(SPACE.methods, SPACE.free, given=(trained(GIVEN, lambda stages: None),)).draw(Shapes())
    assert shapes == [("one", "two"), ("one", "two", "trained")]
