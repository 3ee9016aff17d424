"""Trials: keys that change with everything that matters and nothing else, and the labels of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.trial.labels import budget_label, budget_number, labels_of, placement_label, resolve_count, target_label
from ablations.trial.stages import DENSE, HostOptions, Stages, Training
from ablations.trial.target import Target
from ablations.trial.trial import ModelFacts, Solution, Trial, base_row, estimated_cost, failed, relabel, trial_from
from tests.ablations.runs import SPEC

CHANGED: dict[str, Any] = {
    "spec": "other", "variant": "other", "x": 17.0, "stages": Stages('[{"at":[4],"stack":[{"name":"identity"}]}]'),
    "model": "other", "weights": "file", "weights_digest": "e" * 64, "workload": "imagefolder",
    "data_digest": "f" * 64, "images": 11, "batch": 5, "seed": 1,
    "target": 0.5, "training": Training('{"epochs":1}'), "measure": "speed", "calibration": "c" * 64,
    "code": "evaluation=other", "task": "embed", "host": HostOptions.of({"fill": "zero"}),
    "restore": "zero",
}  # fmt: skip


@pytest.fixture(scope="module")
def trial(target: Target) -> Trial:
    return expand(parse_spec(SPEC), target)[0]


def test_every_field_changes_the_key(trial: Trial) -> None:
    assert set(CHANGED) == {field.name for field in dataclasses.fields(Trial)}, "a new field belongs into this test"
    keys = [dataclasses.replace(trial, **{name: value}).key for name, value in CHANGED.items()]
    assert len({trial.key, *keys}) == len(CHANGED) + 1


def test_labels_alone_leave_the_computation_as_it_is(trial: Trial) -> None:
    for name, value in CHANGED.items():
        other = dataclasses.replace(trial, **{name: value})
        assert (other.computation == trial.computation) == (name in ("spec", "variant", "x"))


def test_a_family_is_what_a_cost_depends_on_beside_the_free_setting(trial: Trial) -> None:
    related = {"stages", "model", "weights", "weights_digest", "workload", "seed", "training", "calibration", "code"}
    related |= {"host"}
    for name, value in CHANGED.items():
        other = dataclasses.replace(trial, **{name: value})
        assert (other.family != trial.family) == (name in related), name


def test_two_targets_that_come_to_one_setting_are_one_computation(trial: Trial) -> None:
    low, high = (dataclasses.replace(trial, target=target, calibration="c" * 64) for target in (0.8, 0.9))
    assert low.computation != high.computation
    assert low.resolved(trial.stages).computation == high.resolved(trial.stages).computation == trial.computation


def test_a_calibrated_row_shows_the_stages_as_run_and_how_near_they_come(trial: Trial, facts: ModelFacts) -> None:
    free = '[{"at":[3],"stack":[{"budget":{"count":"auto"},"name":"ats"}]}]'
    solved = free.replace('"auto"', "9")
    sought = dataclasses.replace(trial, stages=Stages(free), target=0.5, calibration="c" * 64)
    solution = Solution(
        Stages(solved), "K = 9", target_gmacs=2.0, calibration_gmacs=2.1, probes=5, reached=False, note="why"
    )
    assert solution.error == pytest.approx(0.05)
    row = base_row(sought, facts, solution)
    assert (row["reducer"], row["budget"], row["key"]) == (solved, "K = 9", sought.key)
    assert (row["target"], row["target_gmacs"], row["calibration_gmacs"], row["probes"]) == (0.5, 2.0, 2.1, 5)
    assert (row["calibrated"], row["target_reached"], row["target_note"]) == (True, False, "why")
    unsolved = base_row(sought, facts)
    assert (unsolved["budget"], unsolved["calibrated"], unsolved["target_gmacs"]) == ("K = auto", False, None)


def test_spelling_does_not_change_a_key(target: Target) -> None:
    def key(stage: str) -> str:
        text = "{name: a, title: A, arms: [{variant: v, stages: [%s]}]}" % stage  # noqa: UP031
        return expand(parse_spec(text), target)[0].key

    written = key("{at: [3, 4, 5], stack: [{name: evit, budget: {ratio: 0.5}}]}")
    assert written == key("{stack: [{budget: {ratio: 0.5}, name: evit}], at: 3-5}")
    assert written == key("{at: [5, 3, 4], stack: [{name: evit, budget: {ratio: 1/2, of: current}, fuse: true}]}")
    assert written != key("{at: 3-5, stack: [{name: evit, budget: {ratio: 0.5}, fuse: false}]}")


def test_a_key_stays_what_it_is_from_version_to_version() -> None:
    fixed = Trial("s", "v", 1.5, DENSE, "m", "file", "0" * 64, "w", "1" * 64, 10, 5, 0)
    assert dataclasses.replace(fixed, target=0.5).key != fixed.key
    assert fixed.key == "6267ff8511430d8f", "results on disk would be lost: raise RESULT_VERSION only on purpose"


def test_placements_read_as_a_person_writes_them() -> None:
    assert placement_label([3]) == "block 3"
    assert placement_label(list(range(3, 12))) == "blocks 3-11"
    assert placement_label([3, 6, 9]) == "blocks 3, 6, 9"
    assert placement_label([0, 1, 4, 5, 6]) == "blocks 0, 1, 4-6"
    assert placement_label([]) == "no block"


def test_budgets_read_as_the_field_names_them() -> None:
    assert budget_label({"count": 98}, 196) == "K = 98"
    assert budget_label({"drop": 13}, 196) == "r = 13"
    assert budget_label({"ratio": 0.7}, 196) == "keep 0.7"
    assert budget_label({"ratio": "48/196", "of": "initial", "rounding": "nearest"}, 64) == "K = 16"
    assert budget_number({"ratio": "7/10"}, 64) == 0.7


def test_counts_are_exact_and_halves_round_up() -> None:
    assert resolve_count(0.7, 10, "ceil") == 7, "0.7 is seven tenths, not a little more"
    assert [resolve_count(0.5, 5, rounding) for rounding in ("floor", "nearest", "ceil")] == [2, 3, 3]


def test_labels_name_what_decides_also_inside_a_stack() -> None:
    ats = {"name": "ats", "budget": {"ratio": 0.7}}
    chosen = [{"at": [3], "stack": [{"name": "evit", "budget": {"ratio": 0.7}, "select": ats}]}]
    assert labels_of(chosen, 64) == {"score": "class_attention_value_norm", "budget": "keep 0.7"}
    both = [{"at": [3], "stack": [{"name": "topk", "budget": {"count": 9}}, ats]}]
    assert labels_of(both, 64) == {
        "score": "class_attention + class_attention_value_norm", "budget": "K = 9 + keep 0.7",
    }  # fmt: skip
    assert labels_of([{"at": [3], "stack": [{"name": "identity"}]}], 64) == {"score": None, "budget": None}


def test_drops_that_vary_over_blocks_are_named_by_their_mean() -> None:
    def stage(blocks: list[int], drop: int) -> dict[str, Any]:
        return {"at": blocks, "stack": [{"name": "tome", "budget": {"drop": drop}}]}

    assert labels_of([stage([0, 1, 2], 13)], 196)["budget"] == "r = 13"
    assert labels_of([stage([0, 2, 4], 5), stage([1], 6)], 196)["budget"] == "r = 5.25 on average"


def test_targets_read_as_shares_of_the_dense_model() -> None:
    assert [target_label(target) for target in (0.5, 0.35, 0.125)] == [
        "0.50 of dense",
        "0.35 of dense",
        "0.125 of dense",
    ]


def test_cost_estimates_order_placements_as_their_real_costs(facts: ModelFacts) -> None:
    def cost(block: int, **budget: object) -> float:
        return estimated_cost([{"at": [block], "stack": [{"name": "topk", "budget": budget}]}], facts)

    whole = estimated_cost([], facts)
    assert cost(3, count=16) < cost(3, count=32) < cost(8, count=32) < whole
    assert cost(3, drop=10) < whole and cost(3, ratio=0.5) < cost(3, ratio=0.9)


def test_a_failed_trial_keeps_its_reason_and_no_metric(trial: Trial, facts: ModelFacts) -> None:
    row = failed(trial, facts, ValueError("no such token")).row
    assert (row["status"], row["error"], row["top1"]) == ("failed", "ValueError: no such token", None)


def test_relabelling_changes_labels_only(trial: Trial, facts: ModelFacts) -> None:
    first = failed(trial, facts, "reason")
    other = dataclasses.replace(trial, spec="other", variant="elsewhere", x=3.0)
    row = relabel(first, other, facts).row
    assert {name for name in row if row[name] != first.row[name]} == {"spec", "key", "variant", "x", "trial"}


def test_a_timed_trial_shares_its_evaluation_whatever_code_times_it(trial: Trial) -> None:
    timed = dataclasses.replace(trial, measure="speed", batch=1, code=f"{trial.code} timing=0123")
    assert timed.evaluated(trial.batch) == trial and timed.evaluated(trial.batch).computation == trial.computation
    assert timed.family == dataclasses.replace(trial, batch=1).family


def test_seeds_derive_from_what_is_computed(trial: Trial) -> None:
    """The same draws under any name, in any batch, at any target, whatever is asked; others for anything that is
    evaluated otherwise.
    """
    alike = {
        "spec",
        "variant",
        "x",
        "batch",
        "target",
        "measure",
        "calibration",
        "code",
        "weights",
        "task",
        "host",
        "restore",
    }
    for name, value in CHANGED.items():
        other = dataclasses.replace(trial, **{name: value})
        assert (other.random_seed == trial.random_seed) == (name in alike), name
    assert 0 <= trial.random_seed < 2**63


def test_a_trial_is_read_back_from_its_description(trial: Trial) -> None:
    for name, value in CHANGED.items():
        other = dataclasses.replace(trial, **{name: value})
        assert trial_from(other.description) == other and trial_from(other.description).key == other.key
