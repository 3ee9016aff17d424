"""Calibration: targets are met as nearly as a method can, whatever was tried before, by looking at costs alone."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablations.measure import calibrate
from ablations.measure.calibrate import calibration_batches, mean_cost, search, solve
from ablations.measure.context import DensePredictions, TrialContext, dense_predictions, model_facts
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.spec.plain_yaml import SpecError
from ablations.trial.free_settings import drop_schedule, free_kinds, ladder, realised_drops, settle, sought_schedules
from ablations.trial.target import Target
from ablations.trial.trial import Solution, Trial, TrialError
from ablations.workloads import open_model
from ablations.workloads.base import Workload, data_digest
from ablations.workloads.embedded import first_calibration_scenes, first_workload
from reducers import ATS, Count, Decision, Placement, State, TokenReducer, at, placement_from, reduce_tokens
from reducers.kit.selection import keep_highest
from reducers.reducer import Traits
from reducers.signals import Signals
from reducers.tokens import Counts

ATS3 = "{at: 3, stack: [{name: ats, budget: {count: auto}}]}"


def context_of(model: torch.nn.Module, name: str, workload: Workload, calibration: Workload) -> TrialContext:
    facts = model_facts(model, name=name, weights="file", digest="w", params_m=1.0)
    _, trace = reduce_tokens(model, Placement()).trace(workload.batch(0, 1))
    dense = DensePredictions({}, float(trace.macs[0]) / 1e9)
    return TrialContext(workload, model, facts, dense, torch.device("cpu"), calibration=calibration)


@pytest.fixture(scope="module")
def embedded() -> TrialContext:
    """The trained embedded model: its scores are as peaked as those of a real one."""
    model = open_model("digits_vit_small", weights=None, workload_name="embedded:v1").model.eval()
    return context_of(model, "digits_vit_small", first_workload(limit=40), first_calibration_scenes(40, 32))


@pytest.fixture(scope="module")
def tiny() -> TrialContext:
    """196 patches of random images in a narrow model with random weights: scores are flat, so any cost is in reach."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=6, embed_dim=24, num_heads=2, num_classes=3).eval()
    random = np.random.RandomState(0)

    def images(name: str, count: int) -> Workload:
        pixels = random.randint(0, 256, (count, 224, 224, 3)).astype(np.uint8)
        labels, ids = np.zeros(count, dtype=np.int64), tuple(f"{name}/{i}" for i in range(count))
        digest = data_digest(pixels, labels=labels, ids=ids, mean=(0.5,) * 3, std=(0.5,) * 3)
        return Workload("random", pixels, labels, ids, (0.5,) * 3, (0.5,) * 3, 3, digest)

    return context_of(model, "tiny", images("evaluated", 1), images("calibration", 4))


def trial_for(context: TrialContext, stages: str, target: float) -> Trial:
    text = f"{{name: a, title: A, arms: [{{variant: v, target: [{target}], stages: [{stages}]}}]}}"
    about = Target(context.facts, "embedded", "d", len(context.workload), 8, "c")
    return expand(parse_spec(text), about)[0]


def fresh(context: TrialContext) -> TrialContext:
    return dataclasses.replace(context, probes={})


def cost_of(solution: Solution, context: TrialContext) -> float:
    """What the solved stages cost on the calibration images, by the full forward pass."""
    assert context.calibration is not None
    model = reduce_tokens(context.model, solution.stages.placement(context.facts.depth))
    _, trace = model.eval().trace(context.calibration.batch(0, len(context.calibration)))
    return float(trace.macs.mean()) / 1e9


REACHABLE_TINY = [
    (ATS3, 0.6), (ATS3, 0.8),
    ("{at: 2, stack: [{name: topk, budget: {count: auto}}]}", 0.5),
    ("{at: 2-5, stack: [{name: topk, budget: {ratio: auto}}]}", 0.6),
    ("{at: 1, stack: [{name: evit, budget: {count: auto}}]}", 0.4),
    ("{at: [1, 3, 5], stack: [{name: evit, budget: {ratio: auto}}]}", 0.7),
    ("{at: 2-5, stack: [{name: ats, budget: {count: auto}}]}", 0.7),
    ("{at: all, stack: [{name: tome, budget: {drop: auto}}]}", 0.5),
    ("{at: all, stack: [{name: tome, budget: {drop: auto}, schedule: {late: 2}}]}", 0.7),
    ("{at: 1-5, stack: [{name: topk, budget: {drop: auto}, schedule: {early: 1.5}}]}", 0.5),
    ("{at: 1-5, stack: [{name: evit, budget: {drop: auto}, schedule: {linear: [1, 3]}}]}", 0.6),
]  # fmt: skip
REACHABLE_EMBEDDED = [
    (ATS3, 0.36),
    ("{at: 3-11, stack: [{name: ats, budget: {count: auto}}]}", 0.33),
    ("{at: 3, stack: [{name: topk, budget: {count: auto}}]}", 0.5),
    ("{at: [3, 6, 9], stack: [{name: evit, budget: {ratio: auto}}]}", 0.6),
    ("{at: all, stack: [{name: tome, budget: {drop: auto}}]}", 0.6),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "target"), REACHABLE_TINY)
def test_a_fine_control_meets_its_target_within_one_percent(stages: str, target: float, tiny: TrialContext) -> None:
    check_reached(stages, target, tiny)


@pytest.mark.parametrize(("stages", "target"), REACHABLE_EMBEDDED)
def test_so_it_does_on_the_embedded_model(stages: str, target: float, embedded: TrialContext) -> None:
    check_reached(stages, target, embedded)


def check_reached(stages: str, target: float, context: TrialContext) -> None:
    solution = solve(trial_for(context, stages, target), context)
    assert solution.target_gmacs == pytest.approx(target * context.dense.gmacs)
    assert solution.reached and solution.note == "" and abs(solution.error) <= 0.01
    assert not free_kinds(solution.stages.data), "the solution is plain data"
    assert cost_of(solution, context) == pytest.approx(solution.calibration_gmacs, rel=1e-6)
    assert 1 < solution.probes <= 20


def test_the_solution_is_the_same_whatever_was_tried_before(embedded: TrialContext) -> None:
    def solved(order: list[float]) -> dict[float, Solution]:
        context = fresh(embedded)
        return {target: solve(trial_for(context, ATS3, target), context) for target in order}

    levels = [0.3, 0.33, 0.36, 0.4, 0.6]
    upwards, downwards = solved(levels), solved(levels[::-1])
    assert upwards == downwards
    assert solved([0.36])[0.36] == upwards[0.36]


def test_levels_of_one_method_share_what_was_tried(tiny: TrialContext) -> None:
    context = fresh(tiny)
    levels = [0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    looked_at = sum(solve(trial_for(context, ATS3, target), context).probes for target in levels)
    assert len(context.probes) < looked_at
    assert len(context.probes) <= 5 * len(levels)
    again = [solve(trial_for(context, ATS3, target), context) for target in levels]
    assert len({solution.stages for solution in again}) == len(levels)


def test_a_target_out_of_reach_gives_the_nearest_cost_and_says_so(embedded: TrialContext) -> None:
    late = "{at: 11, stack: [{name: ats, budget: {count: auto}}]}"
    below = solve(trial_for(embedded, late, 0.5), embedded)
    assert not below.reached and below.setting == "K = 1" and below.error > 0.5
    assert "out of reach" in below.note and "of the dense model" in below.note
    above = solve(trial_for(embedded, ATS3, 0.9), embedded)
    assert not above.reached and above.setting == "K = 4048" and above.error < 0  # about 64 points a patch
    also = solve(trial_for(embedded, ATS3, 0.8), embedded)
    trials = trial_for(embedded, ATS3, 0.9).resolved(above.stages), trial_for(embedded, ATS3, 0.8).resolved(also.stages)
    assert trials[0].computation == trials[1].computation, "both are answered by one evaluation"


def test_coarse_steps_give_the_nearest_attainable_cost(embedded: TrialContext) -> None:
    """A smaller input comes in few sizes: none other lies nearer than the one that is found."""
    stages = "{at: 0, stack: [{name: small_input, budget: {count: auto}}]}"
    trial = trial_for(embedded, stages, 0.5)
    solution = solve(trial, embedded)
    assert not solution.reached and "the steps are coarse" in solution.note
    costs = [
        mean_cost(placement_from(settle(trial.stages.data, "count", count, 64)), embedded, seed=0)
        for count in range(1, 65)
    ]
    assert abs(solution.calibration_gmacs - solution.target_gmacs) == pytest.approx(
        min(abs(cost - solution.target_gmacs) for cost in costs)
    )


def test_a_fixed_cost_is_measured_on_one_image_and_an_adaptive_one_on_all(
    embedded: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    model = type(reduce_tokens(embedded.model, Placement()))
    real: Callable[..., torch.Tensor] = model.cost

    def cost(self: object, images: torch.Tensor, shared: object = None) -> torch.Tensor:
        seen.append(len(images))
        return real(self, images, shared)

    monkeypatch.setattr(model, "cost", cost)
    solve(trial_for(embedded, "{at: 5, stack: [{name: topk, budget: {count: auto}}]}", 0.6), embedded)
    assert set(seen) == {1}
    seen.clear()
    solve(trial_for(embedded, ATS3, 0.35), fresh(embedded))
    assert set(seen) == {32}


def test_a_probe_costs_what_the_whole_pass_books(embedded: TrialContext) -> None:
    placement = at([3, 6], ATS(Count(20)))
    assert embedded.calibration is not None
    _, trace = reduce_tokens(embedded.model, placement).trace(embedded.calibration.batch(0, 32))
    assert mean_cost(placement, embedded, seed=0) == pytest.approx(float(trace.macs.mean()) / 1e9, rel=1e-9)


def test_where_the_gpu_holds_few_images_costs_are_the_same(embedded: TrialContext) -> None:
    """A GPU whose memory ends at five images; what it computes before is the CPU's."""
    trial = trial_for(embedded, ATS3, 0.6)
    expected = solve(trial, fresh(embedded))

    def five(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > 5:
            raise torch.OutOfMemoryError(f"CUDA out of memory with {len(inputs[0])} images")

    hook = embedded.model.get_submodule("patch_embed").register_forward_pre_hook(five)
    try:
        small = fresh(embedded)
        assert solve(trial, small) == expected
        assert len(calibration_batches(small)[0][0]) == 4, "32, 16, 8, 4"
        dense = dense_predictions(embedded.model, embedded.workload, batch=16, device=torch.device("cpu"))
    finally:
        hook.remove()
    true = dense_predictions(embedded.model, embedded.workload, batch=16, device=torch.device("cpu"))
    assert (dense.reference["prediction"] == true.reference["prediction"]).all() and dense.gmacs == true.gmacs


def test_labels_play_no_part(embedded: TrialContext) -> None:
    assert embedded.calibration is not None
    other = dataclasses.replace(embedded.calibration, labels=np.zeros_like(embedded.calibration.labels))
    trial = trial_for(embedded, ATS3, 0.37)
    assert solve(trial, fresh(embedded)) == solve(trial, dataclasses.replace(embedded, calibration=other, probes={}))


@pytest.mark.parametrize(("error", "reached"), [(0.0099, True), (-0.0099, True), (0.0101, False), (-0.0101, False)])
def test_a_target_is_reached_within_one_percent(
    error: float, reached: bool, tiny: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = 0.6 * tiny.dense.gmacs
    monkeypatch.setattr(calibrate, "mean_cost", lambda placement, context, seed, **_: (1 + error) * goal)
    solution = solve(trial_for(tiny, ATS3, 0.6), fresh(tiny))
    assert solution.reached == reached == (solution.note == "") and solution.error == pytest.approx(error)


class Drawn(TokenReducer):
    """Keeps a number of patches that PyTorch's own random numbers tell."""

    name = "drawn"
    traits = Traits(adaptive=True)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        scores = torch.rand(signals.layout.rows)
        counts = Counts.by(signals.layout, lambda patches, _: int(torch.randint(1, patches + 1, ())))
        kept = keep_highest(signals.layout, scores, counts)
        return None if kept is None else Decision(kept)


def test_what_is_drawn_while_a_setting_is_sought_follows_the_seed_of_the_trial(tiny: TrialContext) -> None:
    one, again, other = (mean_cost(at(2, Drawn()), fresh(tiny), seed=seed) for seed in (3, 3, 4))
    assert one == again != other


def test_calibration_images_are_needed(embedded: TrialContext) -> None:
    with pytest.raises(TrialError, match="calibration images"):
        calibration_batches(dataclasses.replace(embedded, calibration=None))
    with pytest.raises(TrialError, match="needs a target"):
        solve(dataclasses.replace(trial_for(embedded, ATS3, 0.5), target=None), embedded)


# --- the search and the ladder ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=300),
    share=st.floats(-0.2, 1.2, allow_subnormal=False),
)
def test_the_search_finds_the_nearest_rung_or_one_that_is_near_enough(steps: list[float], share: float) -> None:
    costs = 1 + np.cumsum(steps)
    goal = max(0.1, float(costs[0] + share * (costs[-1] - costs[0])))
    looked: list[int] = []

    def cost(rung: int) -> float:
        looked.append(rung)
        return float(costs[rung])

    found = search(cost, len(costs), goal)
    error = abs(found.cost - goal)
    assert error <= max(0.002 * goal, float(np.abs(costs - goal).min()) + 1e-12)
    assert found.inside == (costs[0] <= goal <= costs[-1])
    assert found.probes == len(set(looked)) == len(looked) <= 2 + 2 * len(costs).bit_length()


def test_the_search_finds_the_very_rung_where_steps_are_small_and_large_by_turns() -> None:
    """Every ladder of eight rungs a per cent or a half apart, and every goal on either side of the middle of a step."""
    for steps in itertools.product((1.01, 1.5), repeat=7):
        costs = list(itertools.accumulate(steps, lambda cost, step: cost * step, initial=1.0))
        for (rung, cost), above in zip(enumerate(costs), costs[1:], strict=False):
            for share, nearest in ((0.4, rung), (0.6, rung + 1)):
                found = search(costs.__getitem__, len(costs), cost + share * (above - cost))
                assert (found.rung, found.cost) == (nearest, costs[nearest])


def test_a_ladder_that_rises_late_is_searched_in_few_probes() -> None:
    """A straight line through its ends says nothing of it: every second look halves what is left."""
    for goal in (3e-9, 2e-4, 0.4):
        found = search(lambda rung: (rung / 1024) ** 12 + rung * 1e-12, 1025, goal)
        assert found.probes <= 2 + 2 * 10


def test_of_two_rungs_equally_near_the_cheaper_is_taken() -> None:
    assert search(lambda rung: [1.0, 2.0, 4.0][rung], 3, 3.0).rung == 1


def test_a_drop_rate_is_spread_over_the_blocks() -> None:
    assert drop_schedule(Fraction("5.5"), 4, 100) == [5, 6, 5, 6]
    assert drop_schedule(Fraction("0.25"), 4, 100) == [0, 0, 0, 1]
    assert drop_schedule(Fraction(30), 6, 100) == [30, 30, 20, 10, 5, 2], "at most half of what is left"
    for rate in map(Fraction, ("0.4", "3.7", "12.34")):
        drops = drop_schedule(rate, 12, 196)
        assert sum(drops) == int(12 * rate) and max(drops) - min(drops) <= 1


def test_the_ladder_of_drops_rises_in_cost_by_a_token_at_a_time() -> None:
    stages = [{"at": list(range(12)), "stack": [{"name": "tome", "budget": {"drop": "auto"}}]}]
    rungs = ladder(stages, "drop", 64)
    removed = [
        sum((12 - block) * drop for block, drop in enumerate(drop_schedule(Fraction(rate), 12, 64))) for rate in rungs
    ]
    assert len(rungs) > 100 and all(before > after for before, after in pairwise(removed))


def test_a_settled_drop_is_plain_stages_and_leaves_out_blocks_that_drop_nothing() -> None:
    stages = [{"at": [0, 1, 2, 3], "stack": [{"name": "tome", "budget": {"drop": "auto"}}]}]
    settled = settle(stages, "drop", Fraction("0.5"), 64)
    assert settled == [{"at": [block], "stack": [{"name": "tome", "budget": {"drop": 1}}]} for block in (1, 3)]
    merged = placement_from(settle(stages, "drop", Fraction(3), 64)).spec()
    assert merged == [{"at": [0, 1, 2, 3], "stack": [{"name": "tome", "budget": {"drop": 3}}]}]


def test_a_settled_ratio_is_exactly_what_it_says() -> None:
    stages = [{"at": [3], "stack": [{"name": "evit", "budget": {"ratio": "auto"}}]}]
    assert ladder(stages, "ratio", 64)[612] == Fraction(613, 1000)
    assert settle(stages, "ratio", Fraction(613, 1000), 64)[0]["stack"][0]["budget"] == {"ratio": 0.613}


LATE = {"at": list(range(12)), "stack": [{"name": "tome", "budget": {"drop": "auto"}, "schedule": {"late": 2}}]}


def test_the_ladder_of_a_schedule_has_the_totals_that_leave_other_counts() -> None:
    rungs = ladder([LATE], "drop", 196)
    assert rungs[-1] == 1 and all(before > after for before, after in pairwise(rungs))
    drops = [realised_drops([(12, {"late": 2})], int(rung), 196)[0] for rung in rungs]
    assert len(set(drops)) == len(drops)
    removed = [sum((12 - block) * drop for block, drop in enumerate(each)) for each in drops]
    slips = [after - before for before, after in pairwise(removed) if after > before]
    assert max(slips) <= 24, "with one more in all, two shares may fall by one: largest remainders do that"
    fine = [before - after for before, after in pairwise(removed[-1000:])]
    assert max(fine) <= 60
    assert len(drops[0]) == 12 and drops[0][:3] == (98, 49, 24), "the dearest keeps as little as can be"


def test_a_settled_schedule_keeps_its_total_until_it_is_placed() -> None:
    settled = settle([LATE], "drop", 192, 196)
    assert settled == [{**LATE, "stack": [{**LATE["stack"][0], "budget": {"drop": 192}}]}]
    placed = placement_from(settled, 12, patches=196)
    assert sorted(placed.blocks) == list(range(1, 12)) and sought_schedules(placed.spec()) == []


def test_a_solved_schedule_is_plain_stages_and_says_what_went(tiny: TrialContext) -> None:
    trial = trial_for(tiny, "{at: all, stack: [{name: tome, budget: {drop: auto}, schedule: {late: 2}}]}", 0.9)
    assert trial.stages.plain()[0]["stack"][0] == {"name": "tome", "budget": {"drop": "auto"}, "schedule": {"late": 2}}
    solution = solve(trial, tiny)
    assert "schedule" not in solution.stages.text
    gone = sum(stage["stack"][0]["budget"]["drop"] for stage in solution.stages.plain() for _ in stage["at"])
    assert re.fullmatch(rf"R = \d+, late 2 \({gone} go\)", solution.setting)
    drops = {block: s["stack"][0]["budget"]["drop"] for s in solution.stages.plain() for block in s["at"]}
    assert drops[5] > drops[2] and list(drops.values()) != sorted(drops.values(), reverse=True)


def test_with_a_number_a_schedule_is_written_out_and_leaves_other_keys_alone(tiny: TrialContext) -> None:
    about = Target(tiny.facts, "embedded", "d", 8, 8, "c")

    def trials(*stacks: str) -> list[Trial]:
        arms = ", ".join(f"{{variant: v, stages: [{{at: all, stack: [{stack}]}}]}}" for stack in stacks)
        return expand(parse_spec(f"{{name: a, title: A, arms: [{arms}]}}"), about)

    flat, each = "{name: tome, budget: {drop: 24}, schedule: flat}", "{name: tome, budget: {drop: 4}}"
    assert [trial.key for trial in trials(flat)] == [trial.key for trial in trials(each)]
    (late,) = trials("{name: tome, budget: {drop: 24}, schedule: {late: 2}}")
    assert "schedule" not in late.stages.text and late.stages.placement(6).spec() == late.stages.plain()
    free, scheduled = "{name: tome, budget: {drop: auto}}", "{name: tome, budget: {drop: auto}, schedule: flat}"
    sought = [trial_for(tiny, f"{{at: all, stack: [{stack}]}}", 0.5) for stack in (free, scheduled)]
    assert "schedule" not in sought[0].stages.text and sought[0].key != sought[1].key


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ("{name: tome, budget: {drop: auto}}, {name: tome, budget: {drop: auto}, schedule: flat}", "sought together"),
        ("{name: tome, budget: {drop: auto}, schedule: [1, 2, 3, 4, 5, 6]}", "nothing is left to seek"),
        ("{name: tome, budget: {ratio: auto}, schedule: flat}", "the total over all blocks"),
        ("{name: small_input, budget: {drop: auto}, schedule: flat}", "takes no schedule"),
        ("{name: tome, budget: {drop: auto}, schedule: {late: -1}}", "from 0 to 64"),
        (
            "{name: evit, budget: {drop: auto}, schedule: flat, select: {name: ats, budget: {drop: auto}}}",
            "two budgets",
        ),
    ],
)
def test_what_cannot_be_sought_is_refused_where_it_is_written(stack: str, message: str, tiny: TrialContext) -> None:
    with pytest.raises(SpecError, match=message):
        trial_for(tiny, f"{{at: all, stack: [{stack}]}}", 0.5)


def test_a_sought_schedule_must_be_able_to_act_at_all_of_its_blocks(tiny: TrialContext) -> None:
    """However little the early ones get of a small total."""
    asked: list[list[int]] = []
    stages = "[{at: all, stack: [{name: tome, budget: {drop: auto}, schedule: {late: 9}}]}]"
    text = f"{{name: a, title: A, arms: [{{variant: v, target: [0.5], stages: {stages}}}]}}"
    about = Target(tiny.facts, "embedded", "d", 8, 8, "c")
    expand(parse_spec(text), about, check=lambda placement: asked.append(sorted(placement.blocks)))
    assert asked == [[0, 1, 2, 3, 4, 5]]
