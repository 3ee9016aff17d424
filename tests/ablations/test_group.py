"""Trials evaluated together: each gives what it gives alone, to the last bit, and fails alone."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch

from ablations.measure.context import TrialContext, check_inputs
from ablations.measure.evaluate import run_group, run_trial
from ablations.run.contexts import make_context
from ablations.run.session import Session, Settings, open_session
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.trial.trial import Trial, TrialError
from reducers import TokenReducer
from reducers import registry as known_reducers
from reducers.runtime import ReducedViT
from tests.ablations.runs import SPEC
from tests.samples import shared_out

STAGES = {
    "ATS": "[{at: 3, stack: [{name: ats, budget: {count: 20}}]}]",
    "ATS in every block": "[{at: 3-11, stack: [{name: ats, budget: {count: 30}}]}]",
    "ATS that draws": "[{at: [5, 8], stack: [{name: ats, budget: {count: 20}, variant: gumbel}]}]",
    "top-K, received": "[{at: 3, stack: [{name: topk, budget: {count: 9}, score: attention_received}]}]",
    "top-K first": "[{at: 0, stack: [{name: topk, budget: {count: 32}}]}]",
    "EViT": "[{at: [3, 6, 9], stack: [{name: evit, budget: {ratio: 0.7}}]}]",
    "EViT with ATS in it": "[{at: [4, 7], stack: [{name: evit, budget: {ratio: 0.7}, "
    "select: {name: ats, budget: {ratio: 0.7, rounding: nearest}}}]}]",
    "a stack": "[{at: 6, stack: [{name: evit, budget: {ratio: 0.7}}, {name: ats, budget: {ratio: 0.7}}]}]",
    "random": "[{at: 3, stack: [{name: random, seed: 3, budget: {count: 20}}]}]",
    "ToMe": "[{at: all, stack: [{name: tome, budget: {drop: 3}}]}]",
    "ToMe, late": "[{at: 5-11, stack: [{name: tome, budget: {drop: 3}}]}]",
    "identity": "[{at: 11, stack: [{name: identity}]}]",
}
NOT_COMPARED = {"seconds", "created", "shared_prefix"}


@pytest.fixture(scope="module", params=shared_out(["random", None]), ids=["random weights", "shipped weights"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("group")
    (folder / "tiny.yaml").write_text(SPEC)
    return open_session(
        Settings(
            out=folder / "out", model="pairs_vit_tiny", weights=request.param, limit=10, batch=4,
            specs=(str(folder / "tiny.yaml"),),
        )
    )  # fmt: skip


@pytest.fixture
def context(session: Session) -> TrialContext:
    return make_context(session, torch.device("cpu"))


def trial_of(session: Session, name: str, stages: str, more: str = "") -> Trial:
    text = "{name: a, title: A, arms: [{variant: '%s', stages: %s%s}]}" % (name, stages, more)  # noqa: UP031
    return expand(parse_spec(text), session.target)[0]


def assert_same(one: dict[str, Any], other: dict[str, Any], name: str) -> None:
    assert one.keys() == other.keys()
    for column, value in one.items():
        if column in NOT_COMPARED:
            continue
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other[column], err_msg=f"{name}: {column}")
        else:
            assert value == other[column], (name, column)


def test_a_group_gives_what_its_trials_give_alone(session: Session, context: TrialContext) -> None:
    trials = [trial_of(session, name, stages) for name, stages in STAGES.items()]
    for trial, together in zip(trials, run_group(trials, context), strict=True):
        alone = run_trial(trial, context)
        assert together.ok, together.row["error"]
        assert_same(together.row, alone.row, trial.variant)
        assert_same(together.images, alone.images, trial.variant)
        assert together.row["shared_prefix"] == (trial.variant not in ("top-K first", "ToMe")), trial.variant
        assert alone.row["shared_prefix"] is False


def test_the_order_and_the_company_change_nothing(session: Session, context: TrialContext) -> None:
    names = ["random", "EViT", "ATS that draws", "a stack"]
    trials = [trial_of(session, name, STAGES[name]) for name in names]
    forward, backward = run_group(trials, context), run_group(trials[::-1], context)[::-1]
    for one, other in zip(forward, backward, strict=True):
        assert_same(one.row, other.row, one.row["variant"])
        assert_same(one.images, other.images, one.row["variant"])


def test_what_is_shared_is_computed_once(
    session: Session, context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    first: Any = context.model.blocks[0]  # type: ignore[index]
    forward = type(first.norm1).forward
    monkeypatch.setattr(
        first.norm1, "forward", lambda x: entered.append(len(x)) or forward(first.norm1, x), raising=False
    )
    run_group([trial_of(session, name, STAGES[name]) for name in ("ATS", "EViT", "a stack", "random")], context)
    assert len(entered) == 3, "once for each batch of images"


class _Fails(TokenReducer):
    """Fails from a certain call on."""

    name = "fails"
    calls = 0

    def __init__(self, after: int = 0, how: str = "raise") -> None:
        super().__init__()
        self.after, self.how = after, how

    def decide(self, signals: Any, state: object) -> None:
        type(self).calls += 1
        if self.calls > self.after:
            if self.how == "nan":
                signals.values().fill_(float("nan"))
                return
            raise MemoryError("too much") if self.how == "memory" else RuntimeError("this reducer refuses")


@pytest.mark.parametrize(
    ("how", "after", "expected"),
    [
        ("raise", 0, "RuntimeError: this reducer refuses"),
        ("raise", 2, "RuntimeError: this reducer refuses"),
        ("nan", 1, "not finite"),
        ("memory", 0, "MemoryError: too much"),
    ],
)
def test_a_trial_fails_alone(
    how: str, after: int, expected: str, session: Session, context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(known_reducers._METHODS, "fails", _Fails)
    monkeypatch.setattr(_Fails, "calls", 0)
    broken = trial_of(session, "broken", "[{at: 3, stack: [{name: fails, after: %d, how: %s}]}]" % (after, how))  # noqa: UP031
    others = [trial_of(session, name, STAGES[name]) for name in ("ATS", "EViT")]
    first, failed, last = run_group([others[0], broken, others[1]], context)
    assert not failed.ok and expected in failed.row["error"] and failed.row["top1"] is None and failed.images == {}
    for trial, result in zip(others, (first, last), strict=True):
        assert_same(result.row, run_trial(trial, context).row, trial.variant)


@pytest.mark.parametrize(
    ("changed", "what"), [("data_digest", "data"), ("weights_digest", "weights"), ("code", "code")]
)
def test_a_trial_planned_with_another_input_is_refused_by_its_name(
    changed: str, what: str, session: Session, context: TrialContext
) -> None:
    good = dataclasses.replace(trial_of(session, "ATS", STAGES["ATS"]))
    check_inputs(good, context)
    assert good.code, "a trial names the code it was planned with"
    other = "evaluation=000000000000" if changed == "code" else "0" * 64
    with pytest.raises(TrialError, match=f"the {what} changed after the trial was planned"):
        check_inputs(dataclasses.replace(good, **{changed: other}), context)


def test_a_trial_planned_for_other_inputs_fails_alone(session: Session, context: TrialContext) -> None:
    good = trial_of(session, "ATS", STAGES["ATS"])
    first, second = run_group([dataclasses.replace(good, data_digest="0" * 64), good], context)
    assert "changed after the trial was planned" in first.row["error"] and second.ok


def test_trials_with_a_target_are_calibrated_first(session: Session, context: TrialContext) -> None:
    free = "[{at: 3, stack: [{name: topk, budget: {count: auto}}]}]"
    target = trial_of(session, "top-K", free, ", target: [0.5]")
    out_of_reach = trial_of(
        session, "late", "[{at: 11, stack: [{name: topk, budget: {count: auto}}]}]", ", target: [0.3]"
    )
    together = run_group([trial_of(session, "ATS", STAGES["ATS"]), target, out_of_reach], context)
    row = together[1].row
    assert_same(row, run_trial(target, context).row, "calibrated")
    assert row["calibrated"] and row["target"] == 0.5 and row["target_gmacs"] == pytest.approx(0.5 * row["dense_gmacs"])
    assert row["calibration_images"] == len(context.calibration or ()) and row["probes"] >= 2
    assert row["gmacs_mean"] == pytest.approx(row["calibration_gmacs"]), "top-K costs the same on every image"
    assert "auto" not in row["reducer"] and row["target_reached"] == (
        abs(row["calibration_gmacs"] / row["target_gmacs"] - 1) <= 0.01
    )
    assert together[2].row["target_reached"] is False and together[0].row["calibrated"] is False
    missing = dataclasses.replace(context, calibration=None)
    assert "needs calibration images" in run_group([target], missing)[0].row["error"]
    moved = dataclasses.replace(context, calibration=dataclasses.replace(context.workload))
    assert "calibration images changed" in run_group([target], moved)[0].row["error"]


def test_seconds_are_a_trials_own_and_its_share_of_the_rest(session: Session, context: TrialContext) -> None:
    trials = [trial_of(session, name, STAGES[name]) for name in ("ATS", "EViT", "identity")]
    context.profile.take()
    results = run_group(trials, context)
    spent = context.profile.take()
    assert set(spent) >= {"images", "prefix", "evaluation", "bookkeeping"}
    assert sum(result.row["seconds"] for result in results) == pytest.approx(sum(spent.values()), rel=0.5)


def test_seconds_of_images_and_of_a_shared_prefix_are_divided_among_those_that_share_them(
    session: Session, context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only images and the shared blocks move: three trials share the images and the first three blocks,
    two of them the rest.
    """
    now = [0.0]
    compute, read = ReducedViT.cost, type(context.workload).batch

    def slowly(self: Any, start: int, stop: int) -> torch.Tensor:
        now[0] += 7.0
        return read(self, start, stop)

    def slow(self: ReducedViT, images: torch.Tensor, *, shared: Any = None) -> Any:
        now[0] += 60.0
        return compute(self, images, shared=shared)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ReducedViT, "cost", slow)
    monkeypatch.setattr(type(context.workload), "batch", slowly)
    trials = [trial_of(session, name, STAGES[name]) for name in ("ATS", "a stack", "EViT with ATS in it")]
    first = {"ATS": 3, "a stack": 6, "EViT with ATS in it": 4}
    found = {
        trial.variant: result.row["seconds"] for trial, result in zip(trials, run_group(trials, context), strict=True)
    }
    batches = 3
    by_block = {block: 60.0 * batches / sum(at >= block for at in first.values()) for block in (3, 4, 6)}
    for variant, at in first.items():
        blocks = sum(each for block, each in by_block.items() if block <= at)
        assert found[variant] == pytest.approx(7.0 * batches / len(first) + blocks), variant
    assert sum(found.values()) == pytest.approx(now[0])


def test_trials_of_two_models_do_not_go_together(session: Session, context: TrialContext) -> None:
    good = trial_of(session, "ATS", STAGES["ATS"])
    with pytest.raises(ValueError, match="one model"):
        run_group([good, dataclasses.replace(good, model="other")], context)
