"""Specs: what is read, and that every mistake is a SpecError that names the file, the place and the remedy."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ablations.models.digits import MOVING, shows_clips
from ablations.records.columns import ROW
from ablations.records.kinds import ANSWERS, kind_of
from ablations.spec.arms import SPECS, combinations, merged
from ablations.spec.expand import expand
from ablations.spec.model import MAX_BYTES, find_specs, load_spec, parse_spec
from ablations.spec.plain_yaml import SpecError, parse_yaml
from ablations.trial.target import Target
from ablations.trial.trial import base_row, trial_from
from reducers import Drop, EViT, Placement, Ratio, ReducerError, ToMe, at, available, load, reduce_tokens
from reducers.hosts import hosts
from reducers.placement_file import placement_text
from tests.ablations.runs import SPEC


def refused(text: str, target: Target) -> str:
    """The message a spec is refused with, when read or when expanded."""
    with pytest.raises(SpecError) as caught:
        expand(parse_spec(text, "my.yaml"), target)
    message = str(caught.value)
    assert message.startswith("my.yaml"), "a message begins with the file"
    return message


def test_a_short_spec_becomes_one_trial_for_each_combination(target: Target) -> None:
    trials = expand(parse_spec(SPEC), target)
    assert [(trial.variant, trial.x) for trial in trials] == [
        ("ATS", 16.0), ("ATS", 31.0), ("top-K", 16.0), ("top-K", 31.0),
    ]  # fmt: skip
    assert trials[0].stages.plain() == [
        {"at": [3], "stack": [{"name": "ats", "budget": {"ratio": "12/49", "of": "initial", "rounding": "nearest"}}]}
    ]


def test_the_same_spec_fits_models_with_other_patch_counts(target: Target) -> None:
    wide = dataclasses.replace(target, facts=dataclasses.replace(target.facts, patches=196))
    assert [trial.x for trial in expand(parse_spec(SPEC), wide)] == [48, 96, 48, 96]


def test_blocks_can_be_written_in_every_way_and_varied(target: Target) -> None:
    def blocks(at: str) -> list[list[int]]:
        text = (
            "{name: a, title: A, arms: [{variant: v, vary: {b: [1, 5]}, stages: [{at: " + at + ", stack: "
            "[{name: random, seed: $b, budget: {count: 9}}]}]}]}"
        )
        return [trial.stages.plain()[0]["at"] for trial in expand(parse_spec(text), target)]

    assert blocks("$b") == [[1], [5]]
    assert blocks("[$b, 7]") == [[1, 7], [5, 7]]
    assert blocks("'$b-6'") == [[1, 2, 3, 4, 5, 6], [5, 6]]
    assert blocks("all") == [list(range(12))] * 2
    assert blocks("'0, 4-5'") == [[0, 4, 5]] * 2
    assert blocks("{last: 0.75}") == [list(range(3, 12))] * 2
    assert blocks("{thirds: true}") == [[3, 6, 9]] * 2


def _in_blocks(data: Any) -> Any:
    """A spec as it is written for networks of 12 blocks alone."""
    if isinstance(data, dict):
        if "last" in data:
            return {0.75: "3-11", 0.6: "5-11"}.get(data["last"], data)
        if "from" in data:
            return {0: 0, 3: 3, 4: 4}[data["from"]]
        return [3, 6, 9] if data == {"thirds": True} else {key: _in_blocks(part) for key, part in data.items()}
    return [_in_blocks(part) for part in data] if isinstance(data, list) else data


def test_shipped_specs_fit_any_depth_and_their_trials_on_twelve_blocks_are_those_of_blocks_by_number(
    target: Target,
) -> None:
    deep = dataclasses.replace(target, facts=dataclasses.replace(target.facts, depth=24))
    changed = 0
    for file in find_specs(only_default=False):
        data = yaml.safe_load(file.path.read_text())
        numbered = parse_spec(yaml.safe_dump(_in_blocks(data), sort_keys=False))
        trials = expand(file, target)
        assert [trial.key for trial in trials] == [trial.key for trial in expand(numbered, target)], file.spec.name
        assert len({trial.key for trial in expand(file, deep)}) == len(trials)
        changed += _in_blocks(data) != data
    assert changed >= 12
    placed = {tuple(stage["at"]) for trial in expand(find_specs(["methods"])[0], deep) for stage in trial.stages.data}
    assert {(6, 12, 18), tuple(range(6, 24))} <= placed and (3, 6, 9) not in placed


def test_cases_go_together_and_vary_spans_all_combinations(target: Target) -> None:
    text = """
name: a
title: A
arms:
  - variant: block $at
    x: at
    cases: [{at: 0, K: 40}, {at: 5, K: 20}]
    vary: {score: [class_attention, value_norm]}
    stages: [{at: $at, stack: [{name: topk, score: $score, budget: {count: $K}}]}]
"""
    trials = expand(parse_spec(text), target)
    assert [(trial.variant, trial.x) for trial in trials] == [("block 0", 0)] * 2 + [("block 5", 5)] * 2
    assert {trial.stages.plain()[0]["stack"][0]["budget"]["count"] for trial in trials[:2]} == {40}


def test_a_case_may_be_called_by_a_name_of_its_own(target: Target) -> None:
    text = """
name: a
title: A
arms:
  - variant: $label at once
    cases: [{label: top-K, method: topk}, {label: ATS, method: ats}]
    stages: [{at: 3, stack: [{name: $method, budget: {count: 40}}]}]
"""
    assert [trial.variant for trial in expand(parse_spec(text), target)] == ["top-K at once", "ATS at once"]
    with pytest.raises(SpecError, match="'label' varies but no stage uses"):
        expand(parse_spec(text.replace("$method", "topk")), target)


def test_trials_that_are_the_same_appear_once(target: Target) -> None:
    doubled = SPEC.replace("[48, 96]", "[48, 96, 48]")
    assert len(expand(parse_spec(doubled), target)) == 4


@pytest.mark.parametrize(
    ("change", "to", "expected"),
    [
        ("title:", "titel:", r":1: title: the key 'title' is missing(.|\n)*:2: titel: .* did you mean 'title'"),
        ("{variant: ATS,", "{variant: ATS, sedes: [0],", r":8: arms\[0\].sedes: unknown key .* did you mean 'seeds'"),
        ("{at: 3,", "{att: 3,", r":6: base.stages\[0\].att: unknown key 'att'; did you mean 'at'"),
        ("{method: ats}", "{method: atss}", r"base.stages\[0\].stack\[0\].name: unknown .*did you mean 'ats'"),
        ("name: $method,", "name: $method, scoer: random,", "no setting 'scoer'"),
        ("name: $method,", "name: $method, score: clas_attention,", "class_attention_value_norm"),
        ("name: $method,", "name: $method, score: [1],", r"stack\[0\]"),
        ("name: $method,", "", "a reducer is written"),
        ("[48, 96]", "[48, 0]", r"must lie in \(0, 1\]"),
        ("$K/196", "-$K/196", r"must lie in \(0, 1\]"),
        ("[48, 96]", "[48, 197]", r"must lie in \(0, 1\]"),
        ("$K/196", "$K/40", r"must lie in \(0, 1\]"),
        ("$K/196, of: initial", "$K/196, off: initial", "unknown key 'off'"),
        ("ratio: $K/196, of: initial, rounding: nearest}", "count: 0}, seed: $K", "at least 1"),
        ("ratio: $K/196, of: initial, rounding: nearest}", "drop: -1}, seed: $K", "0 or more"),
        ("ratio: $K/196, of: initial, rounding: nearest}", "keep: 0.5}, seed: $K", "a budget is written"),
        ("at: 3,", "at: 12,", r":6: base.stages\[0\].at: block 12 .* its 12 blocks count from 0 to 11"),
        ("at: 3,", "at: -1,", "block -1 is outside"),
        ("at: 3,", "at: 3-99999999999,", "outside the network"),
        ("at: 3,", "at: [],", "no block is named"),
        ("at: 3,", "at: [3, 3],", "named twice"),
        ("at: 3,", "at: three,", "blocks are written"),
        ("at: 3,", "at: 3.5,", r"base.stages\[0\].at"),
        ("at: 3,", "at: {last: 0},", r":6: base.stages\[0\].at: .*a share of the blocks above 0 and at most 1"),
        ("at: 3,", "at: {thirds: false},", "says nothing; write {thirds: true}"),
        ("at: 3,", "at: {first: 0.5},", r"base.stages\[0\].at"),
        ("$K/196", "$k/196", r"\$k has no value; did you mean 'K'"),
        ("$K/196", "0.5", "'K' varies but no stage uses"),
        ("x: budget", "x: budgets", r"'budgets' is none of K, budget"),
        ("x: budget", "x: method", "is no number"),
        ("x: budget", "x: budget\n  seeds: [0, 1]", r"no stage uses \$seed"),
        ("x: budget", "x: budget\n  seeds: [-1]", r"base.seeds\[0\]"),
        ("x: budget", "x: budget\n  set: {seed: 1}", "given by `seeds"),
        ("x: budget", "x: budget\n  set: {K: 1}", "'K' is given twice"),
        ("x: budget", "x: budget\n  cases: [{a: 1}, {b: 1}]", "every case names the same"),
        ("[48, 96]", "[]", "base.vary.K"),
        ("[48, 96]", "[.nan]", "no finite number"),
        ("[48, 96]", "[1.0e+400]", "no finite number"),
        ("[48, 96]", "[{a: 1}]", "base.vary.K"),
        ("name: tiny", "name: ../../etc/passwd", "lower-case letters"),
        ("name: tiny", "name: 7", "name: "),
        ("name: tiny", "name: tiny\nanswers: opinions", ":2: answers: .*'scores'.*'ranking'"),
        ("name: tiny", "name: tiny\nname: other", ":2: duplicate key 'name'"),
        ("{method: ats}", "{method: ats, method: topk}", "duplicate key 'method'"),
        ("title: A tiny question", "1: A", "no plain name"),
        ("title: A tiny question", "title: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("title: A tiny question", "title: !!binary aGk=", "a bytes is no plain value"),
        ("title: A tiny question", "title: &a [x]\nquestion: *a", "aliases"),
        ("title: A tiny question", "title: [", ":4: expected"),
        ("arms:", "arms: []\nx:", "arms: "),
        ("{variant: ATS, ", "{", "arms[0] has no 'variant'".replace("[", r"\[").replace("]", r"\]")),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_remedy(change: str, to: str, expected: str, target: Target) -> None:
    assert change in SPEC
    message = refused(SPEC.replace(change, to, 1), target)
    assert re.search(expected, message), message


@pytest.mark.parametrize("text", ["", "[]", "7", "just words", "- a\n- b", "\x00", "a: b: c", "%TAG", "!!int ''"])
def test_what_is_no_spec_at_all_is_refused(text: str, target: Target) -> None:
    assert refused(text, target), "the refusal says why"


def test_deep_nesting_is_refused(target: Target) -> None:
    assert "nested too deeply" in refused("a: " + "[" * 3000 + "]" * 3000, target)
    assert "nested too deeply" in refused("a: " + "[" * 40 + "]" * 40, target)


def test_too_many_combinations_are_refused_before_they_are_made(target: Target) -> None:
    many = SPEC.replace("{K: [48, 96]}", f"{{K: {list(range(1, 197))}, a: {list(range(196))}, b: [1, 2]}}")
    many = many.replace("name: $method", "name: $method, seed: $a, score: $b")
    assert "combinations" in refused(many, target)


def test_a_file_that_is_large_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("#" * (MAX_BYTES + 1))
    for content, expected in ((None, "split it"), (b"\xff\xfe", "not UTF-8")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SpecError, match=expected) as caught:
            load_spec(path)
        assert str(path) in str(caught.value)
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / "missing.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_spec_names_the_kind_of_its_answer_which_is_in_no_key(path: Path, target: Target) -> None:
    file = load_spec(path)
    assert kind_of(path.stem) in (file.spec.answers, "ranking"), "records of before are read alike, or tell nothing"
    assert kind_of(path.stem, {ANSWERS: file.spec.answers}) == file.spec.answers
    other = dataclasses.replace(file, spec=file.spec.model_copy(update={ANSWERS: "ranking"}))
    assert [trial.key for trial in expand(other, target)] == [trial.key for trial in expand(file, target)]


def test_of_a_spec_that_says_nothing_else_who_leads_is_asked() -> None:
    assert parse_spec(SPEC).spec.answers == kind_of("tiny") == kind_of("methods", {ANSWERS: "unheard of"}) == "ranking"


def test_an_unknown_spec_name_gets_a_suggestion() -> None:
    with pytest.raises(SpecError, match=r"no spec 'k_valus'; did you mean 'k_values'"):
        find_specs(["k_valus"])


def test_two_specs_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(SPEC)
    with pytest.raises(SpecError, match="rename one"):
        find_specs([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])


def test_what_the_model_cannot_carry_out_is_named_with_its_arm(target: Target) -> None:
    headless = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", depth=12)
    with pytest.raises(SpecError, match=r"my.yaml:8: arms\[0\]: .*class token"):
        expand(parse_spec(SPEC, "my.yaml"), target, check=lambda placement: reduce_tokens(headless, placement))


def test_what_is_run_where_no_spec_is_named_depends_on_what_the_workload_shows() -> None:
    images, clips = ({file.spec.name for file in find_specs(clips=shown)} for shown in (False, True))
    assert clips == {"video_methods", "video_over", "video_placement", "video_score"} and not images & clips
    assert {file.spec.name for file in find_specs(["k_values", "video_over"], clips=True)} == {"k_values", "video_over"}
    assert [shows_clips(name) for name in ("embedded", "imagefolder", MOVING, "clips")] == [False, False, True, True]


def test_an_option_that_a_model_lacks_leaves_its_arm_out(target: Target) -> None:
    """And is refused where no arm is left, or where no host knows it."""
    (file,) = find_specs(["video_over"])
    assert [trial.variant for trial in expand(file, target)][::2] == ["ATS, over frames", "top-K, over frames"]
    framed = dataclasses.replace(target, facts=dataclasses.replace(target.facts, options={"over": ("frame", "clip")}))
    one = "{name: a, title: A, arms: [{variant: v, host: {%s: clip}, stages: [{at: 3, stack: [{name: identity}]}]}]}"
    for option in ("over", "overr"):
        with pytest.raises(SpecError, match=f"has no option .{option}"):
            expand(parse_spec(one % option), target)
    assert len(expand(parse_spec(one % "over"), framed)) == 1


def test_the_shipped_specs_fit_the_embedded_model_and_its_time(target: Target) -> None:
    files = find_specs()
    assert {file.spec.name for file in files} >= {
        "score_functions", "k_values", "stage_placement", "class_token", "evit_stacking", "methods",
    }  # fmt: skip
    assert {file.spec.name for file in files} <= {file.spec.name for file in find_specs(only_default=False)}
    trials = [trial for file in files for trial in expand(file, target)]
    assert len(trials) >= 150
    # a trial that is timed is evaluated as any other of its setting, and timed beside it
    evaluated = {trial.evaluated(target.batch).computation for trial in trials}
    assert len(evaluated) <= 245, "more computations than two cores finish in an hour on ImageNet"
    for file in files:
        assert file.spec.title and file.spec.question and file.spec.caption and file.spec.published


def test_every_method_that_needs_no_training_is_compared(target: Target) -> None:
    (file,) = find_specs(["methods"])
    used = {reducer["name"] for trial in expand(file, target) for s in trial.stages.plain() for reducer in s["stack"]}
    assert {
        "identity", "random", "topk", "ats", "evit", "tome", "tofu", "pitome", "gtp", "dpc_knn", "kmedoids",
        "token_pooling", "atc", "zero_tprune", "fixed_pattern", "small_input", "hvt_pool", "back_tracking",
    } <= used  # fmt: skip
    assert not any(available()[name].trained for name in used)


def test_the_score_functions_are_compared_at_the_same_costs_with_three_random_seeds(target: Target) -> None:
    (file,) = find_specs(["score_functions"])
    levels: dict[tuple[str, int], set[float | None]] = {}
    for trial in expand(file, target):
        assert [stage["at"] for stage in trial.stages.plain()] == [[3]]
        seed = trial.stages.plain()[0]["stack"][0].get("seed", 0)
        levels.setdefault((trial.variant, seed), set()).add(trial.target)
    assert len(levels) == 4 + 3
    assert len(next(iter(levels.values()))) >= 6 and len({tuple(sorted(v)) for v in levels.values()}) == 1  # type: ignore[type-var]


TARGETED = """\
name: tiny
title: A tiny question
base:
  x: target
  target: [0.5, 0.75]
  stages: [{at: 3, stack: [{name: $method, budget: {count: auto}}]}]
arms:
  - {variant: ATS, set: {method: ats}}
  - {variant: top-K, set: {method: topk}, target: [0.5]}
"""

TRAINED = "{stages: [{%s, stack: [{name: ats}]}]}"


def test_a_target_gives_one_trial_for_each_level(target: Target) -> None:
    trials = expand(parse_spec(TARGETED), dataclasses.replace(target, calibration="c" * 64))
    assert [(t.variant, t.x, t.target) for t in trials] == [("ATS", 0.5, 0.5), ("ATS", 0.75, 0.75), ("top-K", 0.5, 0.5)]
    assert trials[0].stages.plain() == [{"at": [3], "stack": [{"name": "ats", "budget": {"count": "auto"}}]}]
    assert {trial.calibration for trial in trials} == {"c" * 64}, "the key names the images it was calibrated on"


def test_what_is_free_stays_free_beside_the_same_number_written_out(target: Target) -> None:
    """Half of the patches is written in one stage and sought in the other: they must not be taken for one."""
    half = target.facts.patches // 2
    stages = (
        "[{at: 3, stack: [{name: topk, budget: {count: %d}}]}, {at: 6, stack: [{name: topk, budget: {count: auto}}]}]"
    )
    text = "{name: a, title: A, arms: [{variant: v, target: [0.5], stages: %s}]}" % (stages % half)
    (trial,) = expand(parse_spec(text), target)
    assert [stage["stack"][0]["budget"]["count"] for stage in trial.stages.plain()] == [half, "auto"]


def test_a_free_selector_is_tied_to_its_reducer(target: Target) -> None:
    stack = "{name: evit, budget: {ratio: auto}, select: {name: ats, budget: {ratio: auto, rounding: nearest}}}"
    text = "{name: a, title: A, arms: [{variant: v, target: [0.5], stages: [{at: 3-5, stack: [%s]}]}]}" % stack  # noqa: UP031
    (reducer,) = expand(parse_spec(text), target)[0].stages.plain()[0]["stack"]
    assert reducer["budget"] == {"ratio": "auto"}
    assert reducer["select"]["budget"] == {"ratio": "auto", "rounding": "nearest"}


def test_speed_is_measured_at_every_batch_size(target: Target) -> None:
    text = TARGETED.replace("x: target", "x: batch\n  measure: speed\n  batch: [1, 8]")
    trials = expand(parse_spec(text), target)
    assert len(trials) == 2 * 2 + 2 and {trial.measure for trial in trials} == {"speed"}
    assert {trial.batch for trial in trials} == {1, 8}
    assert all(trial.x == trial.batch for trial in trials)


def test_a_training_becomes_its_whole_recipe_with_canonical_stages(target: Target) -> None:
    def recipe(training: str) -> str:
        arm = "{variant: v, training: %s, stages: [{at: 3, stack: [{name: topk, budget: {count: 9}}]}]}" % training  # noqa: UP031
        return expand(parse_spec("{name: a, title: A, arms: [%s]}" % arm), target)[0].training  # noqa: UP031

    written = recipe("{epochs: 2, stages: [{at: 3-5, stack: [{name: ats, budget: {ratio: 0.5}}]}]}")
    assert written == recipe("{stages: [{at: [3, 4, 5], stack: [{name: ats, budget: {ratio: 1/2}}]}], epochs: 2}")
    assert written != recipe("{epochs: 3, stages: [{at: 3-5, stack: [{name: ats, budget: {ratio: 0.5}}]}]}")
    seeded = "{name: a, title: A, arms: [{variant: v, seeds: [0, 1], training: {epochs: 1, seed: $seed}, stages: %s}]}"
    seeds = expand(parse_spec(seeded % "[{at: 3, stack: [{name: identity}]}]"), target)
    assert len({trial.training for trial in seeds}) == 2


@pytest.mark.parametrize(
    ("change", "to", "expected"),
    [
        ("[0.5, 0.75]", "[0]", r":5: base.target\[0\]: a target of 0 cannot be reached"),
        ("[0.5, 0.75]", "[0.5, 1.01]", r"base.target\[1\]: a target of 1.01 cannot be reached: .* at most 1"),
        ("[0.5, 0.75]", "[-1]", "cannot be reached"),
        ("[0.5, 0.75]", "[.inf]", "no finite number"),
        ("[0.5, 0.75]", "[]", "base.target"),
        ("[0.5, 0.75]", "0.5", "base.target"),
        ("x: target\n  target: [0.5, 0.75]", "x: 1", r"base.stages: the budget .* add `target: \[0.5\]`"),
        ("{count: auto}", "{count: 9}", r"arms\[0\].target: a target needs a budget that may give way"),
        ("{count: auto}", "{ratio: auto, count: auto}", r"several kinds of budget are auto \(count, ratio\)"),
        ("{count: auto}", "{count: Auto}", r"base.stages\[0\].stack\[0\]: Count\('Auto'\)"),
        ("{count: auto}", "{count: auto, of: initial}", "unknown key 'of'"),
        ("{count: auto}", "auto", "a budget is written"),
        ("budget: {count: auto}}]", "budget: {count: auto}}, {name: tome, budget: {drop: auto}}]", "count, drop"),
        ("x: target", "x: budget", r"x: budget has no number where the budget is auto"),
        ("x: target", "x: batch", "'batch' is none of"),
        ("x: target", "vary: {target: [1]}", r"'target' is given by `target: \[...\]`"),
        ("x: target", "batch: [1, 8]", "the batch changes no result but speed"),
        ("x: target", "measure: sped", r"base.measure"),
        ("x: target", "batch: [0]\n  measure: speed", r"base.batch\[0\]"),
        ("x: target", "training: {epochs: 0}", r"base.training: epochs must be"),
        ("x: target", "training: {epoch: 1}", r"base.training: unknown setting 'epoch'.*did you mean 'epochs'"),
        ("x: target", f"training: {TRAINED % 'at: 12'}", r"base.training.stages\[0\].at: block 12"),
        ("x: target", f"training: {TRAINED % 'at: 3'}", r"training.stages\[0\].stack\[0\]: .*budget"),
        (
            "x: target",
            f"training: {(TRAINED % 'at: 3').replace('ats', 'ats, budget: {count: auto}')}",
            "a training needs a budget",
        ),
        ("x: target", "training: {epochs: $n}", r"\$n has no value"),
        ("title: A", "models: both\ntitle: A", "models: "),
        ("title: A", "default: 1\ntitle: A", "default: "),
    ],
)  # fmt: skip
def test_a_mistake_about_targets_is_named_with_its_place_and_remedy(
    change: str, to: str, expected: str, target: Target
) -> None:
    assert change in TARGETED
    message = refused(TARGETED.replace(change, to, 1), target)
    assert re.search(expected, message), message


def test_specs_that_are_not_run_by_default_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(SPEC.replace("title:", "default: false\ntitle:"))
    assert find_specs(folder=tmp_path) == []
    assert [file.spec.name for file in find_specs(folder=tmp_path, only_default=False)] == ["tiny"]
    assert [file.spec.name for file in find_specs(["tiny"], folder=tmp_path)] == ["tiny"]


_WORDS = st.sampled_from(
    [
        "name",
        "ats",
        "budget",
        "count",
        "ratio",
        "$K",
        "$",
        "${}",
        "auto",
        "drop",
        "at",
        "all",
        "3-11",
        "stack",
        "select",
        "48/0",
    ]
)
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | _WORDS
_DATA = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), text=st.sampled_from([SPEC, TARGETED]))
def test_no_content_of_a_spec_can_cause_anything_but_a_spec_error(
    data: st.DataObject, text: str, target: Target
) -> None:
    spec = copy.deepcopy(yaml.safe_load(text))
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(_places(spec)[1:]))
        inside = spec
        for part in path:
            inside = inside[part]
        inside[last] = data.draw(_DATA)
    try:
        trials = expand(parse_spec(yaml.safe_dump(spec, allow_unicode=True)), target)
    except SpecError:
        return
    assert all(re.fullmatch("[0-9a-f]{16}", trial.key) for trial in trials)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="[]{}:,-&*!|>'\"#% \nab1$", max_size=60))
def test_no_text_can_cause_anything_but_a_spec_error(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text)


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_arms_span_the_same_values_with_and_without_validation(path: Path) -> None:
    _, data = parse_yaml(path.read_text(), path)
    plain = [merged(data.get("base", {}), arm) for arm in data["arms"]]
    validated = [dict(arm) for arm in load_spec(path).spec.merged()]
    assert [list(combinations(arm)) for arm in plain] == [list(combinations(arm)) for arm in validated]
    assert [arm["variant"] for arm in plain] == [arm["variant"] for arm in validated]


def test_a_placement_file_is_a_spec_and_what_was_found_is_in_no_key(
    tmp_path: Path, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    placed = at([1, 2], ToMe(Drop(5))) | at([2, 3], EViT(Ratio("2/3"), fuse=False))
    about = {"model": "m", "cost": 0.6, "interval": [0.7, 0.8], "by": {"images": 256}}
    path = tmp_path / "0.60.yaml"
    path.write_text(placement_text(placed, about, name="recommended_0_60", title="A"), encoding="utf-8")
    file = load_spec(path)
    (trial,) = expand(file, target)
    assert trial.stages.plain() == placed.spec() == load(path).spec()
    assert file.spec.recommended == {"version": 1, **about}
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    del data["recommended"]
    (same,) = expand(parse_spec(yaml.safe_dump(data)), target)
    assert same == trial and same.key == trial.key
    assert not caplog.records
    for name, value in (("depth", target.facts.depth + 1), ("patches", 7), ("weights_digest", "another")):
        data["recommended"] = {"version": 1, **about, name: value}
        assert expand(parse_spec(yaml.safe_dump(data)), target) == [trial]
        assert "was found for m" in caplog.records[-1].getMessage()
    data["recommended"] = {**about, "version": 2}
    with pytest.raises(SpecError, match=r"recommended.version: it is 2, and this is read: 1"):
        expand(parse_spec(yaml.safe_dump(data)), target)
    with pytest.raises(SpecError, match="recommended"):
        parse_spec(yaml.safe_dump({**data, "recommended": [1]}))


OPTIONS = (
    "{name: a, title: A, arms: [{variant: v $fill, vary: {fill: [last, zero]}, host: {fill: $fill, spread: mass}, "
)
PLACED = "stages: [{at: 3, stack: [{name: topk, budget: {count: 9}}]}]}]}"


def test_options_of_the_models_host_stand_in_the_key_where_they_are_not_the_default(target: Target) -> None:
    options = {"fill": ("last", "zero"), "spread": ("mass", "nearest")}
    driven = dataclasses.replace(target, facts=dataclasses.replace(target.facts, options=options))
    usual, zero = expand(parse_spec(OPTIONS + PLACED), driven)
    assert not usual.host and zero.host.data == {"fill": "zero"}
    (plain,) = expand(parse_spec(OPTIONS.partition("vary")[0].replace("$fill", "last") + PLACED), driven)
    assert plain.key == usual.key, "the default is in no key"
    assert zero.key != usual.key and zero.computation != usual.computation and zero.random_seed == usual.random_seed
    rows = [base_row(trial, driven.facts) for trial in (usual, zero)]
    assert [(row["fill"], row["spread"]) for row in rows] == [("last", "mass"), ("zero", "mass")]
    assert base_row(usual, target.facts)["fill"] is None
    assert trial_from(zero.description) == zero
    base = parse_spec("{name: a, title: A, base: {host: {fill: zero}}, arms: [{variant: v, " + PLACED)
    assert expand(base, driven)[0].host == zero.host
    wrong = OPTIONS.replace("fill: $fill, ", "filling: $fill, ") + PLACED
    with pytest.raises(SpecError, match=r"host.filling: .* has no option 'filling': it knows fill, spread"):
        expand(parse_spec(wrong), driven)
    with pytest.raises(SpecError, match=r"host.spread: spread is one of mass, nearest for .*; got 'all'"):
        expand(parse_spec((OPTIONS + PLACED).replace("mass", "all")), driven)
    assert "has no option 'fill': it lets one choose nothing" in refused(OPTIONS + PLACED, target)


def test_every_option_of_a_host_has_a_column() -> None:
    assert {option for host in hosts() for option in host.options} <= set(ROW)


def test_a_model_whose_first_blocks_take_no_reducer_answers_what_it_can(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    walled = dataclasses.replace(target, facts=dataclasses.replace(target.facts, first_free=4))

    def check(placement: Placement) -> None:
        if min(placement.blocks) < 4:
            raise ReducerError("blocks 0 to 3 take no reducer")

    text = (
        "{name: a, title: A, arms: [{variant: early $b, vary: {b: [0, 3, 5]}, stages: [{at: $b, stack: [{name: topk, "
        "budget: {count: 9}}]}]}, "
        "{variant: from, stages: [{at: {from: 3}, stack: [{name: ats, budget: {count: 9}}]}]}]}"
    )
    with caplog.at_level("INFO"):
        trials = expand(parse_spec(text), walled, check=check)
    assert [(trial.variant, trial.stages.plain()[0]["at"]) for trial in trials] == [("early 5", [5]), ("from", [4])]
    assert [record.getMessage() for record in caplog.records] == [
        f"early {block} of a is left out for {target.facts.name}: blocks 0 to 3 take no reducer" for block in (0, 3)
    ]
    with pytest.raises(SpecError, match="blocks 0 to 3 take no reducer"):
        expand(parse_spec(text.replace("[0, 3, 5]", "[0, 3]").replace("{from: 3}", "2")), walled, check=check)
    with pytest.raises(
        SpecError, match="blocks 0 to 3 take no reducer"
    ):  # of any other model the whole spec is refused
        expand(parse_spec(text), target, check=check)
    assert [trial.stages.plain()[0]["at"] for trial in expand(parse_spec(text), target)] == [[0], [3], [5], [3]]


@pytest.mark.parametrize("fact", [{"closed": (4, 5)}, {"windows": True}], ids=str)
def test_a_model_of_windows_or_closed_blocks_answers_what_it_can(target: Target, fact: dict[str, Any]) -> None:
    def check(placement: Placement) -> None:
        if {4, 5} & set(placement.blocks):
            raise ReducerError("no reducer in blocks 4 and 5")

    text = (
        "{name: a, title: A, arms: [{variant: at $b, vary: {b: [3, 4, 6]}, stages: [{at: $b, stack: [{name: topk, "
        "budget: {count: 9}}]}]}]}"
    )
    picky = dataclasses.replace(target, facts=dataclasses.replace(target.facts, **fact))
    assert [trial.variant for trial in expand(parse_spec(text), picky, check=check)] == ["at 3", "at 6"]
    with pytest.raises(SpecError, match="no reducer in blocks 4 and 5"):
        expand(parse_spec(text), target, check=check)


def test_the_published_backbones_have_their_own_targets(target: Target) -> None:
    file = load_spec(SPECS / "paper_backbones.yaml")
    assert not file.spec.default
    printed = {  # GFLOPs with ATS in print, and the dense model's as counted here
        "cvt_13": (3.2, 4.5661, 13, 3), "cvt_21": (5.1, 7.1780, 21, 5), "cvt_13?img=384": (11.7, 16.2694, 13, 3),
        "cvt_21?img=384": (17.4, 24.8491, 21, 5), "ps_vit_b_14": (3.7, 5.3800, 14, 4),
        "ps_vit_b_18": (5.6, 8.7407, 14, 4),
    }  # fmt: skip
    for name, (with_ats, dense, depth, first) in printed.items():
        facts = dataclasses.replace(target.facts, name=name, depth=depth, first_free=first)
        anyones, *own = expand(file, dataclasses.replace(target, facts=facts))
        assert [trial.target for trial in own] == [round(with_ats / dense, 4)] * 2
        blocks = [trial.stages.plain()[0]["at"] for trial in own]
        assert blocks == [list(range(first, depth)), list(range(first + 1, depth))]
        assert anyones.target == 0.7
    assert [trial.variant for trial in expand(file, target)] == ["ATS"], "of another model the one that is for any"
    text = "{name: a, title: A, arms: [{variant: v, only: [cvt_13], " + PLACED
    assert "no arm is for" in refused(text, target) and "MODEL=cvt_13" in refused(text, target)


def test_a_model_answers_what_it_can_of_a_shipped_spec(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    def check(placement: Placement) -> None:
        if any(reducer.name == "evit" for reducer in placement.blocks.values()):
            raise ReducerError("there is no class token")

    methods = load_spec(SPECS / "methods.yaml")
    with caplog.at_level("INFO"):
        trials = expand(methods, target, check=check)
    assert {trial.variant for trial in expand(methods, target)} - {trial.variant for trial in trials} == {
        "EViT", "ATS chooses, EViT fuses",
    }  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        f"{variant} of methods is left out for {target.facts.name}: there is no class token"
        for variant in ("EViT", "ATS chooses, EViT fuses")
    ]
    copied = parse_spec((SPECS / "methods.yaml").read_text(), "mine.yaml")
    with pytest.raises(SpecError, match="there is no class token"):
        expand(copied, target, check=check)
