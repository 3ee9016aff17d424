"""Evaluating a trial: what the numbers mean, against the model itself and slow references."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from ablations.measure.context import TrialContext
from ablations.measure.evaluate import run_trial, try_trial
from ablations.measure.metrics import patch_masks
from ablations.records.schema import ROW_SCHEMA
from ablations.records.wilson import wilson
from ablations.run.contexts import make_context
from ablations.run.session import Session, Settings, open_session
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.trial.trial import Trial, TrialError
from reducers import reduce_tokens
from reducers.hosts.protocol import HostBlock
from reducers.hosts.timm_vit import TimmViT
from tests.ablations.runs import SPEC


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.yaml").write_text(SPEC)
    return open_session(
        Settings(
            out=folder / "out", model="digits_vit_tiny", weights="random", limit=10, batch=4,
            specs=(str(folder / "tiny.yaml"),),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def context(session: Session) -> TrialContext:
    return make_context(session, torch.device("cpu"))


def trial_of(session: Session, stages: str) -> Trial:
    spec = parse_spec("{name: a, title: A, arms: [{variant: v, stages: %s}]}" % stages)  # noqa: UP031
    return expand(spec, session.target)[0]


def test_every_column_of_the_results_is_there(session: Session, context: TrialContext) -> None:
    row = run_trial(session.all_trials[0], context).row
    assert set(row) == set(ROW_SCHEMA.names)
    assert row["status"] == "ok" and row["error"] is None and row["images_per_second"] is None
    assert row["images"] == 10 and row["seconds"] > 0 and len(row["tokens"]) == context.facts.depth + 1


def test_identity_is_the_plain_model(session: Session, context: TrialContext) -> None:
    result = run_trial(trial_of(session, "[{at: all, stack: [{name: identity}]}]"), context)
    row, images = result.row, result.images
    assert row["agreement"] == 1 and row["top1"] == row["dense_top1"] == context.dense.top1
    assert row["gmacs_mean"] == pytest.approx(row["dense_gmacs"]) and row["gmacs_std"] == pytest.approx(0, abs=1e-9)
    assert row["tokens"] == [65.0] * 13 and row["coverage"] == 1 and row["class_kept"] == 1
    with torch.inference_mode():
        logits = context.model(context.workload.batch(0, 10))
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(context.workload.labels), reduction="none")
    np.testing.assert_allclose(images["loss"], losses.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(images["prediction"], logits.argmax(1).numpy())


def test_per_image_columns_follow_from_the_trace(session: Session, context: TrialContext) -> None:
    trial = next(trial for trial in session.all_trials if trial.variant == "ATS")
    result = run_trial(trial, context)
    images, workload = result.images, context.workload
    fast = reduce_tokens(context.model, trial.stages.placement(12)).eval()
    assert workload.masks is not None
    for index in range(len(workload)):
        with torch.inference_mode():
            _, trace = fast.trace(workload.batch(index, index + 1))
        last = trace.kept(11)[0].numpy()
        bits = [np.unpackbits(np.frombuffer(block, np.uint8))[:64].astype(bool) for block in images["kept"][index]]
        np.testing.assert_array_equal(bits[11], last)
        assert bits[2].all() and bits[3].sum() == images["tokens"][index][4] - 1
        cells = [
            workload.masks[index, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].any()
            for row in range(8)
            for column in range(8)
        ]
        assert images["coverage"][index] == pytest.approx(last[cells].sum() / sum(cells))
        assert images["gmacs"][index] == pytest.approx(float(trace.macs[0]) / 1e9)
    assert result.row["coverage"] == pytest.approx(np.mean(images["coverage"]))
    assert result.row["gmacs_std"] == pytest.approx(np.std(images["gmacs"]))


def test_the_batch_size_does_not_change_a_result(session: Session, context: TrialContext) -> None:
    trial = session.all_trials[0]
    whole, single = (run_trial(dataclasses.replace(trial, batch=batch), context).images for batch in (10, 1))
    np.testing.assert_array_equal(whole["prediction"], single["prediction"])
    assert whole["kept"] == single["kept"]


def test_random_reducers_follow_their_seed(session: Session, context: TrialContext) -> None:
    def kept(seed: int) -> list[list[bytes]]:
        stages = "[{at: 3, stack: [{name: random, seed: %d, budget: {count: 20}}]}]" % seed  # noqa: UP031
        return run_trial(trial_of(session, stages), context).images["kept"]

    assert kept(0) == kept(0) != kept(1)


def test_logits_that_are_not_finite_fail_the_trial_with_a_reason(session: Session, context: TrialContext) -> None:
    import copy

    broken = copy.deepcopy(context.model)
    with torch.no_grad():
        broken.blocks[5].mlp.fc1.weight[0, 0] = math.nan  # type: ignore[index, union-attr]
    result = try_trial(session.all_trials[0], dataclasses.replace(context, model=broken))
    assert not result.ok and "not finite" in result.row["error"] and "image 0" in result.row["error"]
    assert result.row["top1"] is None and result.images == {}


@pytest.mark.parametrize("field", ["weights_digest", "data_digest"])
def test_a_trial_planned_for_other_inputs_is_refused(field: str, session: Session, context: TrialContext) -> None:
    stale = dataclasses.replace(session.all_trials[0], **{field: "0" * 64})  # type: ignore[arg-type]
    with pytest.raises(TrialError, match="changed after the trial was planned"):
        run_trial(stale, context)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (7, 10), (750, 928), (1, 2160)])
def test_the_interval_is_wilsons(successes: int, total: int) -> None:
    expected = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    low, high = wilson(successes, total)
    assert (low, high) == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))
    assert 0 <= low <= successes / total <= high <= 1


def test_a_patch_belongs_to_the_object_if_any_pixel_does() -> None:
    masks = np.zeros((1, 4, 6), dtype=bool)
    masks[0, 3, 2] = True
    assert patch_masks(masks, (2, 3)).tolist() == [[False, False, False, False, True, False]]
    with pytest.raises(TrialError, match="do not divide"):
        patch_masks(masks, (3, 3))


def test_the_model_is_driven_as_the_trial_says_while_a_budget_is_sought_and_after(
    session: Session, context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimmViT, "options", {"fill": ("last", "zero")})
    seen: list[str] = []
    block = TimmViT.block

    def driven(host: TimmViT, index: int) -> HostBlock:
        seen.append(host.chosen["fill"])
        return block(host, index)

    monkeypatch.setattr(TimmViT, "block", driven)
    facts = dataclasses.replace(session.target.facts, options={"fill": ("last", "zero")})
    spec = parse_spec(
        "{name: a, title: A, arms: [{variant: v, vary: {fill: [last, zero]}, host: {fill: $fill}, target: [0.7], "
        "stages: [{at: 3, stack: [{name: topk, budget: {count: auto}}]}]}]}"
    )
    context = dataclasses.replace(context, facts=facts, probes={})
    for trial, fill in zip(
        expand(spec, dataclasses.replace(session.target, facts=facts)), ("last", "zero"), strict=True
    ):
        seen.clear()
        row = run_trial(trial, context).row
        assert row["fill"] == fill and row["spread"] is None and row["probes"] > 1
        assert set(seen) == {fill} and len(seen) > context.facts.depth
